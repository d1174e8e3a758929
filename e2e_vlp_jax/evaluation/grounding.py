"""Phrases of captions: the recall of Flickr30k Entities."""
import numpy as np

from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import prompts
from e2e_vlp_jax.tasks import detect
from e2e_vlp_jax.tasks import ground

HEADLINES = {'R1': 'phrases right', 'R5': 'among 5', 'R10': 'among 10'}
NO_CURVE = ('R_any', 'merged_R1', 'merged_R5', 'merged_R10', 'merged_R_any',
            'lost_phrases')
GIVES = (*HEADLINES, *NO_CURVE, 'R*/*', 'merged_R*/*')
_RANKS = (1, 5, 10)
_RIGHT = .5  # IoU of a right box


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, kinds=False):
  """R@1, R@5, R@10 of phrases with boxes.

  A phrase is found at k if one of its k best boxes has an IoU of .5 or more
  with any of its true boxes or, for the metrics `merged_`, with the box around
  all of them. Phrases without a true box do not count.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'text' (its caption) or 'image'
      (all captions of a record that have phrases).
    max_examples: None = all.
    progress: called with the number of examples done.
    kinds: also the recall of each kind of phrase ('R1/people').

  Returns:
    {'R1', 'R5', 'R10', 'R_any'} (R_any: any of all boxes that were found), the
    same `merged_`, and 'lost_phrases', the share of phrases that lie beyond
    the tokens that the model reads, which count as not found.
  """
  task = predictor.task('ground')
  found, truth, lost = [], [], 0
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    captions = {i: captions_of(*pipeline.unit(i), pipeline.unit_name)
                for i in ids.tolist() if i >= 0}
    for k in range(max(map(len, captions.values()), default=0)):
      asked = {i: c[k] for i, c in captions.items() if k < len(c)}
      made = {i: predictor.phrase_inputs(
          [(c['text'], [p['spans'] for p in c['phrases']])], 1)
              for i, c in asked.items()}
      arrays = predictor.run(
          variables, {**batch, **inputs.rows_of(
              batch, made, predictor.phrase_inputs([], 1))}, task)
      for row, i in enumerate(ids.tolist()):
        if i not in asked:
          continue
        one = {name: x[row] for name, x in arrays.items()}
        for n, phrase in enumerate(asked[i]['phrases']):
          found.append(ground.of_label(one, 0, n)[0])
          truth.append(phrase)
          lost += not made[i]['phrase_tokens'][0, n].any()
  if not truth:
    return {}
  scores = {}
  for prefix, merged in (('', False), ('merged_', True)):
    for (rank, kind), value in recall(found, truth, merged).items():
      name = f'{prefix}R{rank}' if rank > 0 else f'{prefix}R_any'
      if kind == 'all':
        scores[name] = value
      elif kinds:
        scores[f'{name}/{kind}'] = value
  return {**scores, 'lost_phrases': lost / len(truth)}


def captions_of(record, item, unit):
  """The captions of a record that have phrases with boxes.

  Args:
    record: as `records.Split.get` returns it.
    item: number of the text, if the unit is 'text'.
    unit: 'text' or 'image'.

  Returns:
    list of {'text', 'phrases': [{'spans', 'boxes' (pixels), 'kinds'}]}; a text
    with more phrases than `prompts.MOST_PHRASES` comes several times.
  """
  size = np.array([record['width'], record['height']] * 2)
  captions = {}
  for p in record['phrases']:
    number = p['text_number']
    if number < 0 or unit == 'text' and number != item:
      continue
    phrase = captions.setdefault(number, {}).setdefault(
        tuple(p['spans']), dict(spans=p['spans'], boxes=[],
                                kinds=[k for k in p['kind'].split('/') if k]))
    phrase['boxes'].append(p['bbox'][[1, 0, 3, 2]] * size)
  most = prompts.MOST_PHRASES
  return [{'text': record['texts'][number],
           'phrases': list(phrases.values())[start:start + most]}
          for number, phrases in sorted(captions.items())
          for start in range(0, len(phrases), most)]


def recall(found, truth, merged=False):
  """Recall at 1, 5, 10 and of all boxes (rank -1), in all and by kind.

  Args:
    found: for each phrase its boxes [N, 4], best first.
    truth: for each phrase {'boxes': true boxes, at least one, 'kinds': names}.
    merged: compare with the box around the true boxes.

  Returns:
    {(rank, kind): share}; kind 'all' counts every phrase once.
  """
  hits, total = {}, {}
  for boxes, phrase in zip(found, truth, strict=True):
    true = np.asarray(phrase['boxes'], float).reshape(-1, 4)
    if merged:
      true = np.concatenate([true[:, :2].min(0), true[:, 2:].max(0)])[None]
    right = (detect.iou(boxes, true) >= _RIGHT).any(1)
    for rank in (*_RANKS, -1):
      hit = right[:rank].any() if rank > 0 else right.any()
      for kind in ('all', *phrase['kinds']):
        hits[rank, kind] = hits.get((rank, kind), 0) + bool(hit)
        total[rank, kind] = total.get((rank, kind), 0) + 1
  return {key: hits[key] / total[key] for key in total}
