"""The box that a referring expression means."""
import numpy as np

from e2e_vlp_jax.data import ops_boxes
from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.errors import UserError


def refexp(context):
  """The box of the row's expression; `config.data.unit` is 'refexp'.

  It is clipped to the window that `fit` shows. A box that a crop has removed
  is masked.

  Reads refexps and item; window, flipped.
  """
  if context.unit != 'refexp':
    raise UserError("pp: refexp needs data.unit='refexp'; it is "
                    f'{context.unit!r}')

  def apply(example):
    if 'window' not in example:
      raise UserError('pp: decode must stand before refexp')
    stored = example['refexps'][example['item']]['bbox']
    corners = ops_boxes.in_window(example, [stored])
    there = (corners[:, 2:] > corners[:, :2]).all()
    return {**example, 'task_mask/refer': there,
            'referred_box': ops_boxes.padded(corners if there else
                                             corners[:0], 1)}
  return apply


def _draw_box(draw):
  size = draw.rng.uniform(.1, .5, (*draw.shape[:-1], 2))
  return np.concatenate([draw.rng.uniform(size / 2, 1 - size / 2), size], -1)


OPS = {'refexp': refexp}
SIZES = {'refexp': lambda: {'S': 1}}
KEYS = {'refexp': (
    Key('referred_box', np.float32, 'S4', 0, 'cx, cy, w, h of the box that '
        'the expression means', _draw_box),
    Key('task_mask/refer', bool, '', False, 'whether the crop shows it', yes),
)}
