"""Referring expressions: how often the best box is the right one."""
import numpy as np

from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.tasks import detect

HEADLINES = {'accuracy': 'expressions right'}
NO_CURVE = ('giou_P1', 'giou_P5', 'giou_P10')
GIVES = (*HEADLINES, *NO_CURVE)
_RANKS = (1, 5, 10)


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Share of expressions whose best box has an IoU of .5 or more.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'refexp'.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'accuracy'} and, as MDETR and FIBER count, 'giou_P1', 'giou_P5',
    'giou_P10': whether one of the first boxes has a generalised IoU of .5 or
    more. Generalised IoU is never above IoU, so giou_P1 <= accuracy.
  """
  task = predictor.task('refer')
  found, true = [], []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    batch = {**batch, **_marked_words(predictor, pipeline, batch)}
    boxes = predictor.run(variables, batch, task, boxes=max(_RANKS))['boxes']
    for row, example_id in enumerate(ids.tolist()):
      if example_id >= 0:
        record, k = pipeline.unit(example_id)
        y0, x0, y1, x1 = record['refexps'][k]['bbox'].astype(float)
        h, w = record['height'], record['width']
        found.append(boxes[row, 0])
        true.append([x0 * w, y0 * h, x1 * w, y1 * h])
  if not found:
    return {}
  by_giou = precision(found, true, detect.generalised_iou)
  return {'accuracy': precision(found, true, detect.iou)[1],
          **{f'giou_P{k}': v for k, v in by_giou.items()}}


def _marked_words(predictor, pipeline, batch):
  """The tokens of the words that name the object, if the dataset marks them.

  MDETR's files do; the other words of the expression are then only context.
  """
  made = {}
  for i in np.asarray(batch['example_id'])[batch['valid']].tolist():
    record, k = pipeline.unit(i)
    item = record['refexps'][k]
    spans = item['spans'] or [(0, len(item['text']))]
    made[i] = predictor.phrase_inputs([(item['text'], [spans])], 1)
  return inputs.rows_of(batch, made, predictor.phrase_inputs([], 1))


def precision(found, true, overlap, least=.5):
  """Share of expressions with the right box among the first 1, 5 and 10.

  Args:
    found: for each expression boxes [N, 4], best first.
    true: for each expression its box [4], x0, y0, x1, y1.
    overlap: function of boxes [N, 4] and [M, 4] -> [N, M].
    least: overlap of a right box.

  Returns:
    {1: share, 5: share, 10: share}.
  """
  hits = np.zeros(len(_RANKS))
  for boxes, box in zip(found, true, strict=True):
    right = overlap(boxes, [box])[:, 0] >= least
    hits += [right[:k].any() for k in _RANKS]
  return dict(zip(_RANKS, (hits / max(len(true), 1)).tolist()))
