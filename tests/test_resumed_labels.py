"""A run does not go on with other labels or answers than it was trained on."""
import json

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import train
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.training import checkpoint
from tests import small_run


def test_changed_labels_end_a_resumed_run(tiny_scenes, tmp_path):
  """The config is the same; the file with the labels is not."""
  path = tmp_path / 'labels.json'
  space = label_space.LabelSpace.load('scenes').to_dict()
  path.write_text(json.dumps(space))
  config = small_run.get_config('light')
  config.update_from_flattened_dict({
      'data.dir': str(tiny_scenes), 'data.labels': str(path),
      'total_steps': 1})
  train.train(config, str(tmp_path / 'w'))
  first, second, *rest = space['classes']
  for names, says in (
      ([second, first, *rest], f'class 0 is {first!r} there, {second!r} here'),
      ([first, second, *rest, 'cup'],
       f"class {len(rest) + 2} is none there, 'cup' here")):
    path.write_text(json.dumps({**space, 'classes': names}))
    with pytest.raises(errors.UserError, match=says) as e:
      train.train(config, str(tmp_path / 'w'))
    assert '\n' not in str(e.value) and 'checkpoints/1' in str(e.value)
  path.write_text(json.dumps(space))
  train.train(config, str(tmp_path / 'w'))


def test_answers_and_old_checkpoints():
  held = {'labels': {'classes': ['a']}, 'answers': ['yes', 'no']}
  checkpoint.check_names('f', held, {**held, 'labels': {
      'classes': ['a'], 'attributes': []}})
  with pytest.raises(errors.UserError, match="answer 1 is 'no' there, none"):
    checkpoint.check_names('f', held, {**held, 'answers': ['yes']})
  # Older checkpoints have no answers.
  del held['answers']
  checkpoint.check_names('f', held, {**held, 'answers': []})
