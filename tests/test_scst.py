"""CIDEr optimisation: samples, rewards, the loss, and a stage of a run."""
import contextlib
import dataclasses
import json
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import train
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import ptb_tokenizer
from e2e_vlp_jax.evaluation import sampled_captions
from e2e_vlp_jax.models import beam_search
from e2e_vlp_jax.models import sampling
from e2e_vlp_jax.objectives import self_critical
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import stages
from tests import conformance
from tests import small_run
from tests import test_contract

CLS, SEP, PAD, MASK = 0, 2, 1, 3
IDS = dict(cls_id=CLS, sep_id=SEP, pad_id=PAD)


# --- Rewards ----------------------------------------------------------------
def test_the_released_rewards(shared):
  """CIDEr-D of FIBER's samples, by its own document frequencies."""
  path = shared / 'reference' / 'fiber_coarse' / 'captioning.npz'
  with np.load(path, allow_pickle=False) as f:
    want = {k: f[k] for k in f.files if k.startswith('cider.')}
  known = json.loads(str(want['cider.df_json']))
  references = json.loads(str(want['cider.references_json']))
  documents = {tuple(g): n for g, n in known['document_frequency']}
  words = lambda text: text.split()
  for held in (documents, {g: n for g, n in documents.items() if n > 1}):
    # What one image alone has counts like what none has.
    scorer = caption_metrics.Cider(held, known['ref_len'])
    found = [scorer.scores([words(h)], list(map(words, r)))[0] for h, r in zip(
        want['cider.hypotheses'].tolist(), references, strict=True)]
    np.testing.assert_allclose(found, want['cider.scores'], rtol=1e-12)
  # Its loss: a constant baseline of 1, samples of an image added up, percent.
  rewards = want['cider.scores'].reshape(4, 5)
  objective = self_critical.Objective(baseline='constant', scale=500.,
                                      truth=.3)
  told = np.log(np.random.default_rng(0).uniform(.1, .9, (4, 5)))
  logits, text = sentences(told)
  losses, _ = objective({'image_only': {'caption_logits': logits}}, {
      'text': text, 'text_mask': text != PAD,
      'task_mask/captioning': np.ones(4, bool),
      'advantages': np.float32(rewards - 1), 'rewards': np.float32(rewards)})
  total, weight = losses['policy']
  np.testing.assert_allclose(
      total / weight, .7 * (told * (100 - 100 * rewards)).sum() / 4, rtol=1e-5)
  total, weight = losses['truth']
  np.testing.assert_allclose(total / weight, .3 * np.log(8), rtol=1e-5)


def sentences(told):
  """(logits, texts) of one true caption and R drawn ones, of given likelihood.

  Args:
    told: [B, R] mean log-probability of the drawn tokens.
  """
  b, r = told.shape
  text = np.full((b, 1 + r, 6), PAD)
  text[:, :, :4] = [CLS, 5, 6, SEP]
  logits = np.zeros((b, 1 + r, 6, 8), np.float32)
  for i in range(b):
    for k in range(r):
      p = np.exp(told[i, k])
      for t, token in enumerate((5, 6, SEP)):
        logits[i, 1 + k, t] = np.log((1 - p) / 7)
        logits[i, 1 + k, t, token] = np.log(p)
  return logits, text


def test_the_gradient_follows_the_advantage():
  """Better captions become likelier; rows without captions do nothing."""
  rng = np.random.default_rng(1)
  b, s, r, l, v = 3, 2, 4, 7, 9
  text = rng.integers(4, v, (b, s + r, l))
  lengths = rng.integers(2, l + 1, (b, s + r))
  mask = np.arange(l) < lengths[..., None]
  advantages = rng.normal(size=(b, r)).astype(np.float32)
  batch = {'text': text, 'text_mask': mask, 'advantages': advantages,
           'rewards': np.abs(advantages),
           'task_mask/captioning': np.array([True, True, False])}
  objective = self_critical.Objective(samples=r)

  def loss(logits):
    losses, metrics = objective({'image_only': {'caption_logits': logits}},
                                batch)
    assert set(losses) == {'policy'}
    total, weight = losses['policy']
    return total / weight, (weight, metrics['sampled_cider'])
  logits = rng.normal(size=(b, s + r, l, v)).astype(np.float32)
  (value, (weight, (reward, count))), gradient = jax.value_and_grad(
      loss, has_aux=True)(logits)
  assert weight == count == 2 * r
  np.testing.assert_allclose(reward, np.abs(advantages[:2]).sum(), rtol=1e-6)
  expected = 0.
  for i in range(2):
    for k in range(r):
      row = logits[i, s + k].astype(np.float64)
      logp = row - np.log(np.exp(row).sum(-1, keepdims=True))
      n = lengths[i, s + k] - 1
      mean = np.mean([logp[t, text[i, s + k, t + 1]] for t in range(n)])
      expected -= advantages[i, k] * mean / weight
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert not gradient[2].any() and not gradient[:, :s].any()
  for i in range(2):
    for k in range(r):
      # Descending raises the drawn token if the advantage is positive.
      step = -gradient[i, s + k, 0, text[i, s + k, 1]]
      assert np.sign(step) == np.sign(advantages[i, k])


# --- Samples ----------------------------------------------------------------
def test_captions_are_drawn_from_the_model():
  """Frequencies of first and second tokens, against the causal pass."""
  case = conformance.Case.build(test_contract.small_config('e2e_vlp'))
  count, length = 1500, 4
  draw = jax.jit(lambda v, b, key: sampling.captions(
      case.model, v, b, key, max_length=length, count=count,
      forbidden=(CLS, PAD, MASK), **IDS))
  tokens, mask = map(np.asarray, draw(case.variables, case.batch,
                                      jax.random.key(0)))
  assert tokens.shape == mask.shape == (3, count, length)
  assert (tokens[:, :, 0] == CLS).all() and mask[:, :, 0].all()
  ended = (tokens == SEP).cumsum(-1) - (tokens == SEP) > 0
  assert (tokens[ended] == PAD).all() and (mask == ~ended).all()
  assert not np.isin(tokens[:, :, 1:][mask[:, :, 1:]], (CLS, PAD, MASK)).any()
  ids = np.full((3, 1, length), PAD)
  ids[:, 0, 0] = CLS
  out = case.run({'image_only': ('captioning',)}, text=jnp.asarray(ids),
                 text_mask=jnp.asarray(ids != PAD))
  logits = np.array(out['image_only']['caption_logits'])[:, 0, 0]
  logits[:, [CLS, PAD, MASK]] = -1e9
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  found = np.stack([np.bincount(row, minlength=p.shape[1])
                    for row in tokens[:, :, 1]]) / count
  assert np.abs(found - p).max() < 5 * np.sqrt(.25 / count)
  again, _ = draw(case.variables, case.batch, jax.random.key(0))
  np.testing.assert_array_equal(tokens, again)
  other, _ = draw(case.variables, case.batch, jax.random.key(1))
  assert (tokens != np.asarray(other)).any()


# --- The stage --------------------------------------------------------------
def get_config(data_dir, steps=6, last=4, mesh=None, **options):
  """A small caption run whose last steps are CIDEr's."""
  config = small_run.get_config('light')
  config.data.dir = str(data_dir)
  config.objectives.update(dict(mlm=0., itm=0., captioning=1.))
  config.total_steps, config.batch_size = steps, 8
  config.data.sentences = 1
  config.last_stage = dict(
      steps=last, objectives=dict(self_critical=1.),
      schedule=dict(schedule='constant', learning_rate=1e-3, warmup_steps=0))
  config.objective_options.self_critical = dict(
      dict(samples=3, baseline='others', scale=1., truth=.2), **options)
  if mesh:
    config.mesh.update(mesh)
  return config


def three_stages(data_dir, **mesh):
  """As FIBER's recipe: a step of cross-entropy, one of GOLD, 4 of CIDEr."""
  config = get_config(data_dir, mesh=mesh)
  config.warm_start.update(dict(steps=1, objectives=dict(captioning=1.)))
  config.objectives.update(dict(captioning=0., gold=1.))
  return config


def log_of(workdir):
  """{step: metrics} of a run's training."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: row for row in rows if 'train/loss' in row}


def parameters(workdir):
  params, _, _ = checkpoint.load(str(workdir))
  return params


@pytest.fixture(scope='module')
def one_run(tiny_scenes, tmp_path_factory):
  """A run on one device of the eight, for the others to equal."""
  workdir = tmp_path_factory.mktemp('scst') / 'run'
  train.train(three_stages(tiny_scenes, data=8), str(workdir))
  return workdir


def test_a_run_with_three_stages(one_run):
  log = log_of(one_run)
  assert list(log) == [1, 2, 3, 4, 5, 6]
  assert 'train/captioning' in log[1] and 'train/gold' not in log[1]
  assert 'train/gold' in log[2] and 'train/captioning' not in log[2]
  assert .1 <= log[2]['train/gold_weight'] <= 1
  for k in (3, 4, 5, 6):
    assert not {'train/captioning', 'train/gold'} & set(log[k])
    assert np.isfinite(log[k]['train/self_critical'])
    assert log[k]['train/sampled_cider'] >= 0
    assert log[k]['train/learning_rate'] == pytest.approx(1e-3)
    np.testing.assert_allclose(
        log[k]['train/self_critical'],
        log[k]['train/policy'] + log[k]['train/truth'], rtol=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(one_run, tiny_scenes,
                                                    tmp_path):
  """Stopped in the middle of the last stage."""
  shutil.copytree(one_run, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
  assert (tmp_path / 'again' / 'checkpoints' / '4').exists()
  train.train(three_stages(tiny_scenes, data=8), str(tmp_path / 'again'))
  jax.tree.map(np.testing.assert_array_equal, parameters(one_run),
               parameters(tmp_path / 'again'))


@pytest.mark.slow
def test_another_mesh_draws_the_same(one_run, tiny_scenes, tmp_path):
  """Parameters split over four devices: the same samples and rewards."""
  train.train(three_stages(tiny_scenes, data=2, fsdp=4),
              str(tmp_path / 'run'))
  ours, theirs = log_of(tmp_path / 'run'), log_of(one_run)
  for k in (3, 4):
    for name in ('loss', 'sampled_cider', 'grad_norm'):
      np.testing.assert_allclose(ours[k][f'train/{name}'],
                                 theirs[k][f'train/{name}'], rtol=2e-3,
                                 atol=1e-5)


def test_advantages(tiny_scenes):
  """The feeder against CIDEr and baselines that are computed one by one."""
  config = get_config(tiny_scenes, baseline='greedy')
  feeder, state, batch, pipeline, tokenizer = fed_by(config)
  found = jax.device_get(feeder(state, batch))
  assert found['text'].shape == (8, 1 + 3, config.data.max_text)
  np.testing.assert_array_equal(found['text'][:, :1], batch['text'])
  every = [[t for t in r['texts'] if t.strip()]
           for _, r in pipeline.every_record()]
  assert len(every) == 64
  words = lambda text: [*ptb_tokenizer.tokenize_all([text])[0], '<eos>']
  frequencies = caption_metrics.document_frequencies(
      [list(map(words, own)) for own in every])

  def cider(tokens, i):
    tokens = tokens.tolist()
    end = tokens.index(tokenizer.sep_id) if tokenizer.sep_id in tokens else (
        len(tokens))
    return caption_metrics.cider(
        [words(tokenizer.decode(tokens[:end]))],
        [list(map(words, pipeline.record(i)['texts']))], frequencies)[0]
  ids = np.asarray(batch['example_id']).tolist()
  wanted = np.array([[cider(tokens, i) for tokens in row[1:]]
                     for row, i in zip(found['text'], ids)])
  np.testing.assert_allclose(found['rewards'], wanted, rtol=1e-5)
  likeliest = beam_search.generate(
      feeder_model(feeder), state.variables, batch, cls_id=tokenizer.cls_id,
      sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id,
      max_length=config.data.max_text)[0]
  np.testing.assert_allclose(found['advantages'], wanted - np.array(
      [[cider(t, i)] for t, i in zip(np.asarray(likeliest), ids)]), atol=1e-5)
  # The other baselines, of the same samples.
  base = {'others': lambda k: np.delete(wanted, k, 1).mean(1),
          'constant': lambda k: 1.}
  for baseline, of in base.items():
    feeder._objective = dataclasses.replace(feeder._objective,  # pylint: disable=protected-access
                                            baseline=baseline)
    found = jax.device_get(feeder(state, batch))
    np.testing.assert_allclose(found['advantages'], np.stack(
        [wanted[:, k] - of(k) for k in range(3)], 1), atol=1e-5)


def fed_by(config):
  """(Feeder, state, first batch on the devices, pipeline, tokenizer)."""
  config.total_steps = config.last_stage.steps
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    vocabularies, data, assembly, _ = train._prepare(  # pylint: disable=protected-access
        config, folder, False, stack)
    feeder = sampled_captions.Feeder(assembly.feeding(), assembly,
                                     vocabularies.tokenizer, data)
    return (feeder, assembly.init(), sharding.shard_batch(
        assembly.mesh, data.batch(0)), data, vocabularies.tokenizer)


def feeder_model(feeder):
  """The model that a feeder draws from."""
  return feeder._draw.__wrapped__.args[0].model  # pylint: disable=protected-access


def test_the_stage_alone_can_be_compiled_without_data(tiny_scenes):
  """For preflight and benchmark."""
  config = get_config(tiny_scenes)
  sizes = vocabularies_lib.Vocabularies.load(config.data).sizes
  assembly = assemble.Assembly(
      config, models.build(config, **sizes), sharding.make_mesh(config.mesh),
      synthetic.synthetic_batch(config.data, batch_size=1, **sizes))
  assert assembly.batch_target(8)['text'].shape == (
      8, 4, config.data.max_text)
  assembly.trace(8)


# --- Bad configs ------------------------------------------------------------
@pytest.mark.parametrize('change, wanted', [
    (dict(baseline='gready'), "did you mean 'greedy'"),
    (dict(samples=1), "samples: 1; expected at least 2 with baseline='others'"),
    (dict(truth=1.), 'truth: 1.0; expected at least 0 and less than 1')])
def test_options_that_cannot_be(tiny_scenes, change, wanted):
  config = get_config(tiny_scenes, **change)
  built = objectives.build(config, weights=config.last_stage.objectives)
  with pytest.raises(errors.UserError, match=wanted):
    built['self_critical'][1].check(config, None)


def test_it_stands_alone_and_needs_a_decoder(tiny_scenes):
  config = get_config(tiny_scenes)
  built = objectives.build(config, weights=dict(self_critical=.7,
                                                captioning=.3))
  with pytest.raises(errors.UserError, match='only objective of its stage; '
                     'found captioning'):
    objectives.check(built, None, config)
  soho = test_contract.small_config('soho')
  model = models.build(soho, **conformance.SIZES)
  built.pop('captioning')
  with pytest.raises(errors.UserError, match="needs the head 'captioning'.*"
                     "model 'soho'"):
    objectives.check(built, model, soho)


@pytest.mark.parametrize('steps, last, wanted', [
    (3, 4, 'total_steps: 3 and warm_start.steps: 0 and last_stage.steps: 4'),
    (3, -1, 'last_stage.steps: -1')])
def test_numbers_of_steps_that_cannot_be(tiny_scenes, steps, last, wanted):
  config = get_config(tiny_scenes, steps=steps, last=last)
  with pytest.raises(errors.UserError, match=wanted):
    stages.stages(config)


def test_stages_share_the_steps(tiny_scenes):
  config = get_config(tiny_scenes, steps=9, last=4)
  config.warm_start.steps = 2
  found = stages.stages(config)
  assert [(s.start, s.end, s.key) for s in found] == [
      (0, 2, 'warm_start.schedule'), (2, 5, 'optim'),
      (5, 9, 'last_stage.schedule')]
  config.total_steps = 6
  assert [s.key for s in stages.stages(config)] == [
      'warm_start.schedule', 'last_stage.schedule']
  config.last_stage.schedule.b1 = .5
  with pytest.raises(errors.UserError, match=r'last_stage\.schedule\.b1'):
    stages.stages(config)
