"""MDETR's JSON: COCO's layout with captions and the characters of each box.

  images: id, file_name, height, width, caption; one entry a caption
  annotations: image_id, bbox, tokens_positive [[first, after the last], ...]

(Kamath et al., ICCV 2021; its Flickr30k, mixed and RefCOCO files.) An image of
several captions has several entries; here it is one `grounded.Image`.
"""
import collections

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import grounded
from e2e_vlp_jax.data.datasets import values


def is_mdetr(content):
  """Whether the content of a JSON file has this layout."""
  return (isinstance(content, dict) and all(
      isinstance(content.get(k), list) for k in ('images', 'annotations'))
          and any('caption' in i for i in content['images'][:1]
                  if isinstance(i, dict)))


def read(path, content, expressions=False):
  """The `grounded.Image`s of a file, in its order.

  Args:
    path: of the file, for messages.
    content: of the file.
    expressions: each caption is an expression with one box.

  Raises:
    UserError: entries without what they must have, or that contradict each
      other.
  """
  images = values.objects(content['images'], f'{path}: images')
  by_id = values.unique(images, 'id', f'{path}: images', values.identity)
  boxes = collections.defaultdict(list)
  for k, a in enumerate(values.objects(content['annotations'],
                                       f'{path}: annotations')):
    where = f'{path}: annotations[{k}]'
    i = values.field(values.identity, a, 'image_id', where)
    if i not in by_id:
      raise errors.UserError(f'{where}.image_id is {i!r}, which no entry of '
                             'images has')
    boxes[i].append((f'annotations[{k}]', a))
  found = {}
  for k, (i, entry) in enumerate(by_id.items()):
    where = f'{path}: images[{k}]'
    name = values.field(values.text, entry, 'file_name', where)
    text = values.field(values.text, entry, 'caption', where)
    size = [values.integer(entry[s], f'{where}.{s}', 1)
            if entry.get(s) is not None else None for s in ('height', 'width')]
    image = found.setdefault(name, grounded.Image(
        name, _image_id(entry, name), *size))
    phrases = [grounded.Phrase(
        a.get('bbox'), f'{name}#{a.get("id", here)}',
        a.get('tokens_positive') or []) for here, a in boxes[i]
        if not a.get('iscrowd')]
    if not expressions:
      image.captions.append((text, phrases))
    elif len(phrases) == 1:
      phrases[0].id = i if isinstance(i, int) else -1
      image.expressions.append((text, phrases[0]))
    else:
      raise errors.UserError(f'{where}: an expression with {len(phrases)} '
                             'boxes; expected one (finetune_refcoco*.json)')
  return list(found.values())


def _image_id(entry, name):
  """The image's id in its dataset, which captions of one image share."""
  for key in ('original_img_id', 'original_id'):
    if entry.get(key) is not None:
      return entry[key]
  return name
