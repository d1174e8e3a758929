"""Optimizers and schedules as the original SOHO and FIBER have them.

Arrays: soho/soho_optim_lr.npz and soho_pretrain_train_step.npz,
fiber_coarse/optim.npz of the reference data.
"""
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import optim as optim_lib
from tests import parity
from tests import test_parity_fiber_coarse as fiber_tests

pytestmark = pytest.mark.large

reference, queued = fiber_tests.reference, fiber_tests.queued


def load(shared, name):
  with np.load(shared / 'reference' / f'{name}.npz') as f:
    return {k: f[k] for k in f.files}


def options(**changes):
  return ml_collections.ConfigDict(dict(
      schedule='constant', learning_rate=1e-4, warmup_steps=0, decay_steps=(),
      decay_factor=.1, final_fraction=0., b1=.9, b2=.999, eps=1e-6,
      weight_decay=.01, clip_norm=0., momentum=.9, groups=(('.*', {}),))
                                   | changes)


def relative(ours, expected):
  """Largest difference, of the expected array's largest value."""
  return np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()


SOHO_GROUPS = ((r'sgd|backbone\..*', dict(
    lr_multiplier=100., weight_decay=1e-4, optimizer='sgd')),
               (r'.*', dict(optimizer='adamw_hf')))


def test_soho_optimizer(shared, record_property):
  """Six steps; gradients of 1e-6 to 1 show where eps is added."""
  data = load(shared, 'soho/soho_optim_lr')
  config = options(groups=SOHO_GROUPS)
  names = ('adamw', 'sgd')
  params = {k: jnp.asarray(data[f'{k}/p0']) for k in names}
  tx = optim_lib.make_optimizer(config, params,
                                optim_lib.make_schedule(config, 100))
  state, worst = tx.init(params), 0.
  usual = options(groups=(SOHO_GROUPS[0], (r'.*', {})))
  usual = optim_lib.make_optimizer(usual, params,
                                   optim_lib.make_schedule(usual, 100))
  usual_state, usual_params = usual.init(params), params
  update = jax.jit(tx.update)
  for i in range(6):
    grads = {k: jnp.asarray(data[f'{k}/grad{i}']) for k in names}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for k in names:
      step = data[f'{k}/p{i + 1}'] - data[f'{k}/p{i}']
      ours = np.asarray(params[k]) - data[f'{k}/p{i}']
      # Of a step of 1e-4 in numbers near 1, float32 has 3 digits.
      worst = max(worst, np.abs(ours - step).max())
    updates, usual_state = usual.update(grads, usual_state, usual_params)
    usual_params = optax.apply_updates(usual_params, updates)
  parity.note(record_property, 'SOHO optimizer: parameters after each of 6 '
              'steps', 'the original optimizer', worst, 5e-7)
  # torch's AdamW, with its eps after the correction, would be seen.
  assert np.abs(usual_params['adamw'] - data['adamw/p6']).max() > 2e-6


def test_soho_step_of_the_whole_model(shared, record_property):
  """Clipping, groups and frozen parameters of one step, gradients given."""
  data = load(shared, 'soho/soho_pretrain_train_step')
  names, sgd, trained = (data[f'optim_group_{k}'] for k in (
      'names', 'is_sgd', 'requires_grad'))
  frozen = r'backbone\.(conv1|bn1|layer1)\..*'
  config = options(groups=((frozen, dict(freeze=True)), *SOHO_GROUPS),
                   clip_norm=10.)
  keys = [k for k in names if f'state_before/{k}' in data]
  params = {k: jnp.asarray(data[f'state_before/{k}']) for k in keys}
  grads = {k: jnp.asarray(data.get(f'grad/{k}', np.zeros_like(params[k])))
           for k in keys}
  tx = optim_lib.make_optimizer(config, params,
                                optim_lib.make_schedule(config, 100))
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  after = optax.apply_updates(params, updates)
  assert set(keys) == set(names) and len(keys) > 100
  labels = optim_lib.group_of(params, config.groups)
  for name, is_sgd, wants in zip(names, sgd, trained):
    assert labels[name] == ('0' if not wants else '1' if is_sgd else '2'), name
  worst = max(np.abs(np.asarray(after[k]) - data[f'param_after/{k}']).max()
              for k in keys if f'param_after/{k}' in data)
  assert sum(f'param_after/{k}' in data for k in keys) > 100
  moved = [k for k in keys if not np.array_equal(after[k], params[k])]
  assert len(moved) > 80
  parity.note(record_property, f'SOHO step: {len(keys)} parameters, clipped '
              'gradients given', 'the original optimizer', worst, 1e-6)


@pytest.mark.parametrize('name, decays', [
    ('pretrain_60iters_per_epoch', (25 * 60, 35 * 60)),
    ('vqa_100iters_per_epoch', (12 * 100, 16 * 100))])
def test_soho_schedule(shared, record_property, name, decays):
  curve = load(shared, 'soho/soho_optim_lr')[f'lr/{name}']
  config = options(schedule='step', warmup_steps=1000, warmup_init=1 / 3,
                   decay_steps=decays)
  ours = jax.vmap(optim_lib.make_schedule(config, len(curve)))(
      jnp.arange(len(curve)))
  worst = max(relative(ours, curve[:, 0]), relative(100 * ours, curve[:, 1]))
  parity.note(record_property, f'SOHO learning rate, {name}: relative to its '
              'peak', 'the original schedule', worst, 1e-6)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_fiber_schedule(shared, record_property, name):
  curve = load(shared, 'fiber_coarse/optim')[f'schedule_{name}_warm10_total100']
  config = options(schedule=name, learning_rate=1., warmup_steps=10,
                   warmup_init=0.)
  ours = np.asarray(jax.vmap(optim_lib.make_schedule(config, 100))(
      jnp.arange(len(curve))))
  assert not ours[100:].any()  # transformers' cosine rises again there
  parity.note(record_property, f'FIBER learning rate, {name}: 101 steps',
              'the original schedule (transformers 4.6)',
              np.abs(ours - curve)[:101].max(), 1e-6)


def test_fiber_group_rates(shared):
  """The rates that the original's five steps had, in six groups."""
  data = load(shared, 'fiber_coarse/optim')
  config = options(schedule='linear', warmup_steps=2, warmup_init=0.)
  rates = [float(optim_lib.make_schedule(config, 20)(i)) for i in range(5)]
  factors = data['group_base_lr'] / 1e-4
  np.testing.assert_allclose(np.outer(rates, factors), data['step_group_lrs'],
                             rtol=1e-6)


def test_warmup_without_a_first_fraction():
  """As before the option: the first step has 1 / warmup_steps."""
  schedule = optim_lib.make_schedule(
      options(learning_rate=1., warmup_steps=4), 10)
  np.testing.assert_allclose([schedule(i) for i in range(6)],
                             [.25, .5, .75, 1, 1, 1])


def test_unknown_optimizer_is_named():
  config = options(groups=(('.*', dict(optimizer='adamw_fh')),))
  with pytest.raises(errors.UserError, match="did you mean 'adamw_hf'"):
    optim_lib.make_optimizer(config, {'a': jnp.zeros(2)}, lambda count: 1.)


@pytest.mark.slow
def test_fiber_five_steps(record_property, reference, queued, compiles_much):
  """FIBER trained as the original: its losses, its parameters afterwards.

  In evaluation mode, with the hardest negatives and a queue that stands
  still, as the reference was made.
  """
  want = reference('optim')
  params = queued[1]['params']
  config = fiber_tests.reference_config(queue=fiber_tests.QUEUE)
  config.optim.update(dict(learning_rate=1e-4, warmup_steps=2))
  tx = optim_lib.make_optimizer(config.optim, params,
                                optim_lib.make_schedule(config.optim, 20))
  gradients = fiber_tests.gradients(queued)

  @jax.jit
  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
  state, after, worst = tx.init(params), params, 0.
  for expected in want['step_losses_mlm_itc_itm_total']:
    (total, (_, terms)), grads = gradients(after)
    after, state = update(grads, state, after)
    got = [terms['mlm'], terms['itc'], terms['itm'], total]
    worst = max(worst, np.abs(np.array(got) - expected).max())
  parity.note(record_property, 'FIBER, five optimizer steps: losses',
              'the original code (stored)', worst, 1e-4)

  before, after = (fiber_tests.theirs(parity.flat({'params': x}))
                   for x in (params, after))
  moved = {name: l2 for name, l2 in zip(want['param_names'],
                                        want['update_l2_after_5_steps'])
           if name in after}
  assert len(moved) > 640
  worst, count = 0., 0
  for name, l2 in moved.items():
    # Biases of keys have gradients of rounding alone, which Adam enlarges.
    if not name.endswith(('.key.bias', 'qkv.bias', 'qkv_text_i2t.bias')):
      ours = np.linalg.norm((after[name] - before[name]).astype(np.float64))
      worst, count = max(worst, abs(ours - l2) / max(l2, 1e-9)), count + 1
  parity.note(record_property, f'FIBER, five optimizer steps: how far {count} '
              'tensors moved, relative', 'the original code (stored)', worst,
              1e-2)
  worst = max(np.abs(after[k.removeprefix('after5.')] - x).max()
              for k, x in want.items() if k.startswith('after5.'))
  parity.note(record_property, 'FIBER, five optimizer steps: 14 tensors',
              'the original code (stored)', worst, 1e-5)
