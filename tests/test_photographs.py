"""The paper's path on real photographs: ResNet, COCO records, buckets."""
import json

import numpy as np
import pytest

from e2e_vlp_jax import predict
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.training import checkpoint
from tests import narrow_resnet

pytestmark = pytest.mark.large


@pytest.fixture(scope='module')
def photographs(shared, tmp_path_factory):
  folder = tmp_path_factory.mktemp('photographs')
  prepare.main(['coco', '--source', str(shared / 'data' / 'coco'),
                '--data_dir', str(folder), '--limit', '8',
                '--captioned_only'])
  return folder


@pytest.mark.parametrize('arg, frozen_bn', [
    ('r50,side=96', True), ('detr,side=96', True), ('r50,side=96', False)])
@pytest.mark.slow
def test_sizes_train_and_predict(photographs, shared, tmp_path, request,
                                 compiles_much, arg, frozen_bn):
  """Two steps of the real configs, made small; then a checkpoint's use.

  Batch norm is trained on eight devices, which share its statistics; what is
  the same on any number of devices takes less memory on one.
  """
  if frozen_bn:
    request.getfixturevalue('one_device')
  config = narrow_resnet.get_config(arg)
  config.update_from_flattened_dict({
      'model.backbone.depth': 18,
      'model.encoder_layers': 1, 'model.decoder_layers': 2,
      'model.width': 64, 'model.ffn': 64, 'batch_size': 8,
      'eval_batch_size': 8, 'total_steps': 2, 'log_every_steps': 1,
      'samples.count': 2, 'data.dir': str(photographs)})
  if not frozen_bn:
    config.optim.groups = tuple(
        g for g in config.optim.groups if 'downsample_bn' not in g[0])
    # The trunk is the same for all objectives; one compiles in half the time.
    config.objectives.update(dict(mlm=0., itm=0., captioning=0.))
    config.evals = {'detection': config.evals.detection}
  for options in config.evals.values():
    options.max_examples = 8
  metrics = train.train(config, str(tmp_path / 'w'))
  assert 'eval/detection/AP50' in metrics
  assert all(np.isfinite(v) for v in metrics.values())
  assert len(list((tmp_path / 'w' / 'samples').glob('*.png'))) == 2
  _, state, _ = checkpoint.load(str(tmp_path / 'w'))
  moved = np.abs(state['batch_stats']['backbone']['layer4_0']['bn1']['mean'])
  assert (moved.max() > 0) == (not frozen_bn)

  photo = next((shared / 'data/coco/images/val2017').glob('*.jpg'))
  predict.main(['--checkpoint', str(tmp_path / 'w'), '--task', 'detect',
                '--image', str(photo), '--json', str(tmp_path / 'out.json'),
                '--picture', str(tmp_path / 'out.png'), '--threshold', '0'])
  found = json.loads((tmp_path / 'out.json').read_text())
  assert len(found['objects']) == config.model.num_queries
  height, width = found['image']['height'], found['image']['width']
  for one in found['objects']:
    x0, y0, x1, y1 = one['box']
    assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
