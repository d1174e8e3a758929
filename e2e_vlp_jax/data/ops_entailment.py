"""What follows from the image for the row's text, as a class."""
import numpy as np

from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.errors import UserError, nearest

LABELS = ('entailment', 'neutral', 'contradiction')


def entailment_labels(context, labels=LABELS):
  """The class of the row's text; `config.data.unit` is 'entailment'.

  Reads entailment and item.

  Args:
    context: the unit.
    labels: names of the classes, in their order.
  """
  if context.unit != 'entailment':
    raise UserError("pp: entailment_labels needs data.unit='entailment'; it is "
                    f'{context.unit!r}')
  ids = {name: k for k, name in enumerate(labels)}

  def apply(example):
    label = example['entailment'][example['item']]['label']
    if label and label not in ids:
      raise UserError(f'entailment: no label {label!r}' + nearest(label, ids))
    return {**example, 'task_mask/entail': bool(label),
            'entailment_labels': np.full(1, ids.get(label, -1), np.int32)}
  return apply


OPS = {'entailment_labels': entailment_labels}
SIZES = {'entailment_labels': lambda labels: {'S': 1}}
KEYS = {'entailment_labels': (
    Key('entailment_labels', np.int32, 'S', -1,
        '0 the text is entailed by the image, 1 neutral, 2 contradicted, -1 '
        'unknown', lambda draw: draw.rng.integers(0, 3, draw.shape)),
    Key('task_mask/entail', bool, '', False, 'whether that is known', yes))}
