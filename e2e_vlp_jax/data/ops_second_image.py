"""The second image of a statement, in the bucket of the first."""
import numpy as np

from e2e_vlp_jax.data import ops_image
from e2e_vlp_jax.data.keys import Key
from e2e_vlp_jax.errors import UserError


def second_image(context):
  """Places the other image of the row's statement in the same way as the first.

  It fits or fills the same bucket. It is shown whole: no crop, mirroring or
  RandAugment of the first applies to it. A statement about one image has an
  empty second image, with a mask that is False everywhere.

  Needs `config.data.unit` to be 'statement'. Reads second, the
  result of `records.second_image`.
  """
  if context.unit != 'statement':
    raise UserError("pp: second_image needs data.unit='statement'; it is "
                    f'{context.unit!r}')
  decode = ops_image.decode(context)

  def apply(example):
    if 'place' not in example:
      raise UserError('pp: fit or squash must stand before second_image')
    if example['second'] is None:
      return {**example, 'second_plan': None,
              'second_image_mask': np.zeros(example['bucket'], bool)}
    plan = example['place'](decode({**example['second'],
                                    'bucket': example['bucket']}))
    return {**example, 'second_plan': plan,
            'second_image_mask': plan['image_mask']}
  return apply


def _render(example, canvas):
  plan = example['second_plan']
  return plan is None or ops_image.render(plan, canvas)


OPS = {'second_image': second_image}
KEYS = {'second_image': (
    Key('second_image_mask', bool, 'HW', False,
        'True on the second image; nowhere if the statement has none',
        ops_image.draw_mask),
    Key('second_image', np.uint8, 'HW3', 0, "RGB; a statement's other image",
        ops_image.draw_pixels('second_image_mask'), _render),
)}
