"""What folders of both kinds, COCO's and YOLO's, are read into."""
import dataclasses
import re
from typing import Any, Callable, Optional

# How tools name the splits.
_SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation',
           'valid': 'validation', 'validation': 'validation',
           'test': 'test', 'testing': 'test'}
ORDER = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Box:
  """A box of the annotations, not yet checked.

  Attributes:
    name: names the annotation in the report.
    label: name of its class.
    xywh: left, top, width, height in pixels of an image of the item's size;
      fractions of it if the item is relative.
    crowd: whether it stands for many objects.
    area: pixels of that image, or None: the box's own.
    id: number, or -1.
  """
  name: str
  label: str
  xywh: Any
  crowd: bool = False
  area: Optional[float] = None
  id: int = -1


@dataclasses.dataclass(frozen=True)
class Item:
  """An image and its annotations.

  Attributes:
    name: of the image file, as `Split.load` takes it.
    image_id: text.
    size: (height, width) that the boxes refer to; None: the upright image's.
    boxes: list of `Box`.
    texts: list of captions, not yet checked.
    relative: whether the boxes are fractions of the image, not pixels.
  """
  name: str
  image_id: str
  size: Any
  boxes: list
  texts: list
  relative: bool = False


@dataclasses.dataclass
class Split:
  """One split of a folder.

  Attributes:
    items: list of `Item`, in the order in which they will be written.
    load: function: list of names -> iterator of a `Stored` or a UserError each.
    skipped: [(reason, name)] of what is left out.
    changed: [text] of what is kept, but changed.
  """
  items: list
  load: Callable
  skipped: list = dataclasses.field(default_factory=list)
  changed: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Layout:
  """A folder.

  Attributes:
    splits: {'train' | 'validation' | 'test': `Split`}.
    named: whether the folder names its splits; else all is 'train'.
    classes: names of the classes in the order of the folder's files.
    files: paths of the annotations, for the report's checksums.
  """
  splits: dict
  named: bool
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
