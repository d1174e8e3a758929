"""How many boxes the classes of a label space have in training.

`prepare` counts them once, so that the start of a run reads no records.
"""
import collections
import json
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import records

_NAMED = 10  # classes that a line names


def counts(data, labels):
  """Boxes of each class in the training data, without crowds.

  Args:
    data: `config.data`; reads dir and train.
    labels: a `label_space.LabelSpace`.

  Returns:
    {class: number of boxes}, or None if a dataset was prepared before `prepare`
    counted them.
  """
  found = collections.Counter()
  for source in data.train:
    folder = records.prepared_folder(data.dir, source['name'])
    with open(os.path.join(folder, records.REPORT), encoding='utf-8') as f:
      split = json.load(f)['splits'].get(source['split'], {})
    if 'classes' not in split:
      return None
    for name, number in split['classes'].items():
      try:
        found[labels.classes[labels.class_id(name)]] += number
      except errors.UserError:
        continue  # Of another dataset of the mixture, or not wanted.
  return {name: found[name] for name in labels.classes}


def without_boxes(data, labels):
  """A line that names the classes that training cannot learn; '' if none.

  Only where the datasets have brought their own classes: of a joint label
  space a run often uses a part.
  """
  if 'prepared' not in data.labels:
    return ''
  found = counts(data, labels)
  none = [name for name, number in (found or {}).items() if not number]
  if not none:
    return ''
  some = ', '.join(none[:_NAMED]) + ', ...' * (len(none) > _NAMED)
  return (f'{len(none)} of {len(found)} classes have no box in training and '
          f'will not be found: {some}')
