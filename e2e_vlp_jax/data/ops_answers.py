"""People's answers to a question -> soft targets for a list of answers."""
import collections

import numpy as np

from e2e_vlp_jax.data import vqa_answers
from e2e_vlp_jax.data.keys import Key
from e2e_vlp_jax.errors import UserError

# Target of an answer by the number of people, of ten, who gave it: 0, 1, 2, 3,
# or more (LXMERT and FIBER, write_vqa.py). With only one person it is 1.
_SCORES = (0., .3, .6, .9, 1.)
_MOST = 10  # answers kept per question: one for each person


def answers(context):
  """Soft targets of the row's question; `config.data.unit` is 'question'.

  An answer is looked up in the list first unchanged, then normalised as in the
  official accuracy. (LXMERT and FIBER only look it up unchanged; this changes
  the targets of 1.6 % of VQA v2's questions.)

  Reads questions and item.
  """
  known = context.answers.ids
  if not known:
    raise UserError("data.answers: no answer list; the op 'answers' needs one")
  if context.unit != 'question':
    raise UserError("pp: answers needs data.unit='question'; it is "
                    f'{context.unit!r}')

  def apply(example):
    ids = np.full((1, _MOST), -1, np.int32)
    scores = np.zeros((1, _MOST), np.float32)
    people = example['questions'][example['item']]['answers']
    for k, (i, score) in enumerate(targets(people, known)):
      ids[0, k], scores[0, k] = i, score
    return {**example, 'answer_ids': ids, 'answer_scores': scores,
            'task_mask/answer': (ids >= 0).any()}
  return apply


def targets(people, known):
  """[(answer id, score)] of at most `_MOST` answers, most common first.

  Args:
    people: list of answers, one per person.
    known: {answer: id}.
  """
  counts = collections.Counter()
  for answer in people:
    i = known.get(answer, known.get(vqa_answers.normalise(answer)))
    if i is not None:
      counts[i] += 1
  if len(people) == 1:
    return [(i, 1.) for i in counts]
  return [(i, _SCORES[min(n, len(_SCORES) - 1)])
          for i, n in counts.most_common(_MOST)]


def _draw_ids(draw):
  """One to ten different answers per question."""
  *rows, most = draw.shape
  number = draw.sizes['num_answers']
  ids = np.full(draw.shape, -1)
  order = np.argsort(draw.rng.random((*rows, number)), -1)[..., :most]
  ids[..., :order.shape[-1]] = order
  kept = np.arange(most) < draw.rng.integers(1, most + 1, rows)[..., None]
  return np.where(kept, ids, -1)


def _draw_scores(draw):
  return np.where(draw.batch['answer_ids'] >= 0,
                  draw.rng.choice(_SCORES[1:], draw.shape), 0)


OPS = {'answers': answers}
SIZES = {'answers': lambda: {'S': 1, 'N': _MOST}}
KEYS = {'answers': (
    Key('answer_ids', np.int32, 'SN', -1, 'answers of the answer list that '
        'people gave, N = 10 at most', _draw_ids),
    Key('answer_scores', np.float32, 'SN', 0, 'their soft targets: .3, .6, '
        '.9, 1', _draw_scores),
    Key('task_mask/answer', bool, '', False,
        'whether the list has an answer',
        lambda draw: (draw.batch['answer_ids'] >= 0).any((1, 2))),
)}
