"""What folders of both kinds, COCO's and YOLO's, are read into."""
import dataclasses
import re
from collections.abc import Callable

# How tools name the splits.
_SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation',
           'valid': 'validation', 'validation': 'validation',
           'test': 'test', 'testing': 'test'}
ORDER = ('train', 'validation', 'test')


@dataclasses.dataclass
class Split:
  """One split of a folder.

  Attributes:
    images: list, one entry an image, in the order in which they are written.
    records: function (split's name, images, limit) that yields at most `limit`
      records of some of the images.
  """
  images: list
  records: Callable


@dataclasses.dataclass
class Layout:
  """A folder.

  Attributes:
    splits: {'train' | 'validation' | 'test': `Split`}; all is 'train' if the
      folder names no splits.
    classes: names of the classes in the order of the folder's files.
    files: paths of the annotations, for the report's checksums.
  """
  splits: dict
  classes: list
  files: list


def split_named(*names):
  """The split that names of files or folders stand for, the first that does.

  'instances_val2017' -> 'validation'; None if none of them does.
  """
  for name in names:
    for word in re.split(r'[^a-z]+', name.lower()):
      if word in _SPLITS:
        return _SPLITS[word]
  return None
