"""FIBER's claim: coarse then fine, and fusion in the trunk, help grounding.

  python -m e2e_vlp_jax.prepare scenes --grounded --data_dir data
  python -m e2e_vlp_jax.compare --study configs/studies/grounding.py \
      --workdir W

Three arms train the fine stage of `tiny` on `scenes` for equal steps: after the
coarse stage, from scratch, and after the same coarse stage but without
cross-attention, so that no box depends on the text and tokens meet image
features in the last product alone. The second arm has no coarse steps to make
up for them, as in the paper's comparison.

Measured: whether the best box of a phrase is right (R@1), and the average
precision of boxes found from class names, on held-out scenes and on
colour-shape pairs that training never shows.

Argument: steps=N of the coarse stage (3400), fine=N of the fine one (1500).
"""
from configs import common
from e2e_vlp_jax import study

_MEASURES = {'phrases R@1': 'grounding/R1',
             'class names AP': 'class_prompts/AP',
             'class names AP50': 'class_prompts/AP50',
             'phrases R@1, unseen pairs': 'grounding_unseen/R1'}


def get_study(arg=None):
  options = common.parse_options(
      arg.split(',') if arg else [], {'steps': int, 'fine': int})
  steps, fine_steps = options.get('steps'), options.get('fine')
  length = lambda n: {'total_steps': n} if n else {}

  fine = lambda **overrides: study.Step('configs/fiber_fine.py:tiny', {
      'eval_every_steps': 0, **length(fine_steps), **overrides})
  return study.Study(
      title='FIBER: grounding with and without the coarse stage and fusion',
      arms={
          'coarse, then fine': {
              'coarse': study.Step('configs/fiber.py:tiny', {
                  'eval_every_steps': 0, **length(steps)}),
              'fine': fine(init_from='{coarse}')},
          'fine alone': {'fine': fine()},
          'no cross-attention': {'fine': fine(**{
              'init_from': '{coarse, then fine/coarse}',
              'model.cross_attention': False})}},
      measures={label: ('fine', f'eval/{metric}')
                for label, metric in _MEASURES.items()})
