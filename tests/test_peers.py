"""Peers: what they compute, and that one which hangs or dies is reported."""
from concurrent import futures
import functools
import importlib.util
import json
import multiprocessing
import sys
import time

import numpy as np
import pytest

from e2e_vlp_jax import benchmark
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import peers
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.peers import process
from e2e_vlp_jax.benchmarks import peer as peer_lib
from e2e_vlp_jax.benchmarks import tables
from tests import commands

TINY = ['--config', 'configs/e2e_vlp.py:tiny', '--batch-size', '8',
        '--config.model.encoder_layers=1', '--config.model.decoder_layers=1']
SMALL_DETR = ['--config', 'configs/e2e_vlp.py:detr,side=64',
              '--config.model.backbone.depth=18',
              '--config.model.encoder_layers=1',
              '--config.model.decoder_layers=2',
              '--config.model.width=32', '--config.model.ffn=32']


def request(*argv, batch_size=2, **sizes):
  """What a peer is built from: (config, batch, sizes)."""
  config = cli.parse(cli.parser('', config='required'), argv)[1]
  sizes = dict(vocab_size=5, num_classes=7, num_attributes=0, **sizes)
  return config, synthetic.synthetic_batch(
      config.data, batch_size=batch_size, **sizes), sizes


# --- hf_detr ----------------------------------------------------------------
def test_detr_trains(torch_extra):
  peer = peers.build('hf_detr', *request(*SMALL_DETR))
  losses = [peer.step() for _ in range(3)]
  assert losses[-1] != losses[0]
  # Stem and first stage are frozen, as in DETR; the rest is trained.
  trained = sum(x.numel() for x in peer._parameters)
  assert .9 * peer.parameters < trained < peer.parameters
  assert 'torch' in peer.version
  assert peer.details() == {}


def test_detr_is_compiled_without_its_loss(torch_extra, monkeypatch):
  """The loss is that of transformers, and no graph of the compiler has it."""
  import torch  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.peers import hf_detr  # pylint: disable=g-import-not-at-top
  # Dynamo's graphs without code generation, which takes minutes.
  monkeypatch.setattr(torch, 'compile',
                      functools.partial(torch.compile, backend='eager'))
  peer = hf_detr.Peer(*request(*SMALL_DETR), compiled=True)
  peer._model.eval()  # Without dropout.
  pixels, mask = peer._inputs
  loss = float(peer.loss().detach())
  theirs = peer._model(pixel_values=pixels, pixel_mask=mask,
                       labels=peer._labels).loss
  assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
  found = peer.details()
  assert 'torch.compile' in peer.version
  assert 0 < found['graphs'] < 10
  assert found['graph_breaks'] < 10
  assert not [r for r in found['graph_break_reasons'] if 'scipy' in r]


@pytest.mark.slow
def test_benchmark_against_detr(torch_extra, one_device, tmp_path):
  out = tmp_path / 'report.json'
  benchmark.main([*SMALL_DETR, '--batch-size', '8', '--steps', '2', '--peer',
                  'hf_detr', '--json', str(out)])
  report = json.loads(out.read_text())
  peer = report['peer']
  assert peer['name'] == 'hf_detr' and not peer['timed_out']
  assert peer['failed'] is None
  assert peer['ratio'] == pytest.approx(
      report['images_per_s'] / peer['images_per_s'])
  # The same architecture: only frozen BN's numbers are no parameters there.
  assert abs(report['parameters'] / peer['parameters'] - 1) < .01


# --- two_stage --------------------------------------------------------------
ANSWER = 'configs/finetune.py:answer,system=e2e_vlp,size=tiny'


def two_stage_answer():
  """(parameters, scores, details(), features, boxes) of one question."""
  peer = peers.build('two_stage', *request('--config', ANSWER, batch_size=1,
                                           num_answers=11))
  peer._detector.rpn._post_nms_top_n['testing'] = 40  # Of 300: costs less.
  scores, details = peer.step(), peer.details()
  with peer._torch.inference_mode():
    features, boxes = peer._regions()
  return peer.parameters, scores.numpy(), details, features.numpy(
      ), boxes.numpy()


def test_two_stage_answers(torch_extra):
  """The features of 36 boxes inside the image, and a score for each answer.

  In another process, as the two models and their maps take 1.8 GiB.
  """
  if importlib.util.find_spec('torchvision') is None:
    pytest.skip('needs the extra [two-stage]')
  with futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn')) as pool:
    parameters, scores, details, features, boxes = pool.submit(
        two_stage_answer).result()
  assert scores.shape == (1, 11)
  assert details == {'image': [600, 600], 'proposals': 40, 'regions': 36}
  assert features.shape == (1, 36, 2048) and features.std() > 0
  assert (boxes[..., 2:] > boxes[..., :2]).all()
  assert boxes.min() >= 0 and boxes.max() <= 1
  assert len(np.unique(boxes[0], axis=0)) == 36
  # ResNet-101 and LXMERT, as published.
  assert 250e6 < parameters < 300e6


@pytest.mark.slow
def test_benchmark_against_two_stages(torch_extra, tmp_path, capsys):
  pytest.importorskip('torchvision', reason='needs the extra [two-stage]')
  out = tmp_path / 'report.json'
  benchmark.main(['--config', ANSWER, '--batch-size', '1', '--steps', '1',
                  '--peer', 'two_stage_fpn', '--peer-timeout', '600',
                  '--json', str(out)])
  report = json.loads(out.read_text())
  assert report['task'] == 'answer' and report['peer']['proposals'] == 300
  assert report['peer']['ratio'] == pytest.approx(
      report['images_per_s'] / report['peer']['images_per_s'])
  assert "parameters for 'answer'" in capsys.readouterr().out


def test_an_inference_peer_is_compared_with_our_inference(stub, tmp_path):
  stub('pass', task='answer')
  out = tmp_path / 'report.json'
  benchmark.main(['--config', ANSWER, '--batch-size', '1', '--steps', '2',
                  '--peer', 'stub', '--json', str(out)])
  report = json.loads(out.read_text())
  assert report['task'] == 'answer' and 'flops_per_step' not in report
  assert report['images_per_s'] > 0 and report['peer']['ratio'] < 1
  assert 100_000 < report['parameters'] < 1_000_000


# --- The process ------------------------------------------------------------
STUB = '''
import os, subprocess, sys, time
class Peer:
  task, extra = {task!r}, 'stubs'
  version, parameters = 'stub 1', len('seven..')
  def __init__(self, config, batch, sizes):
    self.count, self.mean = 0, float(batch['image'].mean())
  def step(self):
    self.count += 1
    {step}
  def details(self):
    return {{'mean': self.mean}}
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
  """Makes `stub` a peer whose step runs the given code."""
  folder = tmp_path / 'stubs'
  folder.mkdir()
  # A folder of peers beside the real ones, here and in the child.
  (tmp_path / 'sitecustomize.py').write_text(
      f'from e2e_vlp_jax import peers\npeers.__path__.append({str(folder)!r})')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(peers, '__path__', [*peers.__path__, str(folder)])

  def write(step, task=None):
    (folder / 'stub.py').write_text(STUB.format(step=step, task=task))
    monkeypatch.delitem(sys.modules, 'e2e_vlp_jax.peers.stub', raising=False)
  return write


def started(timeout=60.):
  config, batch, sizes = request(*SMALL_DETR)
  return process.Process('stub', config, batch, sizes, timeout), batch


def test_a_peer_has_the_same_batch(stub):
  stub('pass')
  peer, batch = started()
  assert (peer.version, peer.parameters) == ('stub 1', 7)
  peer.step()
  assert peer.failure is None and len(peer.times) == 1
  assert peer.details() == {'mean': pytest.approx(batch['image'].mean())}
  peer.close()
  assert peer._child.poll() is not None


def alive(process):
  """Whether it is neither gone nor waits to be collected."""
  try:
    with open(f'/proc/{process}/stat', encoding='utf-8') as f:
      return f.read().split()[2] != 'Z'
  except OSError:
    return False


def test_a_peer_that_hangs_is_killed_with_all_that_it_started(stub, tmp_path):
  stub(f'''if self.count == 2:
      compiler = subprocess.Popen(['sleep', '1000'])
      open({str(tmp_path / "pid")!r}, 'w').write(str(compiler.pid))
      while True: pass''')
  peer, _ = started()
  peer.step()
  peer._timeout = 1.
  peer.step()
  assert peer.failure == {'timed_out': True, 'during': 'a step',
                          'waited_s': 1.}
  assert peer._child.poll() is not None
  compiler = (tmp_path / 'pid').read_text()
  for _ in range(100):  # On a busy machine it takes a while to die.
    if not alive(compiler):
      break
    time.sleep(.1)
  assert not alive(compiler)
  peer.step()  # It is not asked again.
  assert len(peer.times) == 1 and peer.details() == {}


@pytest.mark.parametrize('step,expected', [
    ('raise MemoryError("of the\\n card")', 'MemoryError: of the card'),
    ('os._exit(3)', 'its process ended (3)'),
])
def test_a_peer_that_fails_is_one_line(stub, step, expected):
  stub(step)
  peer, _ = started()
  peer.step()
  assert peer.failure == {'failed': expected, 'during': 'its first step'}
  report = peer_lib.report(peer, 1., 2)
  assert expected in tables.peer_rows(report)[0][1]


def test_the_rest_of_the_report_comes(stub, one_device, tmp_path, capsys):
  stub('while True: pass')
  out = tmp_path / 'report.json'
  benchmark.main([*TINY, '--steps', '1', '--peer', 'stub', '--peer-timeout',
                  '5', '--json', str(out)])
  report = json.loads(out.read_text())
  assert report['images_per_s'] > 0 and report['parts']
  assert report['peer']['timed_out'] and report['peer']['name'] == 'stub'
  assert 'no answer in 5 s during' in capsys.readouterr().out


# --- Bad input --------------------------------------------------------------
refused = functools.partial(commands.refused, benchmark.main)


def test_a_peer_of_another_architecture(torch_extra, capsys):
  line = refused(*TINY, '--peer', 'hf_detr', capsys=capsys)
  assert 'configs/e2e_vlp.py:detr' in line


@pytest.mark.parametrize('argv,expected', [
    (['--config', ANSWER, '--peer', 'two_stage', '--data'],
     ["'answer'", 'without --data']),
    ([*TINY, '--peer', 'two_stage'], ['no answer head', 'finetune.py:answer,']),
])
def test_what_an_inference_peer_needs(argv, expected, capsys):
  line = refused(*argv, capsys=capsys)
  for part in expected:
    assert part in line


def test_a_peer_that_is_not_installed(capsys, monkeypatch, tmp_path):
  (tmp_path / 'torch.py').write_text(
      'raise ModuleNotFoundError("No module named torch", name="torch")')
  monkeypatch.syspath_prepend(tmp_path)
  line = refused(*SMALL_DETR, '--batch-size', '8', '--peer', 'hf_detr',
                 capsys=capsys)
  assert 'needs torch' in line and "pip install -e '.[torch]'" in line


def test_an_unknown_peer_starts_no_process(monkeypatch):
  monkeypatch.setattr(process.subprocess, 'Popen', None)
  with pytest.raises(errors.UserError, match="did you mean 'hf_detr'"):
    process.Process('hf_dert', *request(*SMALL_DETR), 1.)
