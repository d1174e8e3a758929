"""Whether the row's statement is true, as a class."""
import numpy as np

from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.errors import UserError


def statement_labels(context):
  """The label of the row's statement; `config.data.unit` is 'statement'.

  Reads statements and item.
  """
  if context.unit != 'statement':
    raise UserError("pp: statement_labels needs data.unit='statement'; it is "
                    f'{context.unit!r}')

  def apply(example):
    statement = example['statements'][example['item']]
    known = statement['has_label']
    label = int(statement['label']) if known else -1
    return {**example, 'statement_labels': np.full(1, label, np.int32),
            'task_mask/reason': known}
  return apply


OPS = {'statement_labels': statement_labels}
SIZES = {'statement_labels': lambda: {'S': 1}}
KEYS = {'statement_labels': (
    Key('statement_labels', np.int32, 'S', -1,
        '1 if the statement is true, 0 if it is false, -1 unknown',
        lambda draw: draw.rng.integers(0, 2, draw.shape)),
    Key('task_mask/reason', bool, '', False, 'whether that is known', yes))}
