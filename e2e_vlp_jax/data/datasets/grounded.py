"""Records with captions whose phrases have boxes; several datasets share it.

A dataset gives its images as `Image`s. Here, boxes are clipped to the image,
the words of each phrase are found in its caption, and what cannot be used is
left out and counted.
"""
import dataclasses
from collections.abc import Sequence
from typing import Any

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import spans as spans_lib
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import values


@dataclasses.dataclass
class Phrase:
  """A box and the words that name it.

  Attributes:
    xywh: left, top, width, height in pixels; unchecked.
    name: of the annotation, for reports.
    spans: [(first character, after the last)] in the caption; unchecked. None:
      they are looked for.
    text: the phrase; None: what stands at its spans.
    id: of the entity, -1 = none.
    kind: such as 'people'.
  """
  xywh: Any
  name: str
  spans: Any = None
  text: str | None = None
  id: int = -1
  kind: str = ''


@dataclasses.dataclass
class Image:
  """An image; the sizes are None where the files give none.

  Attributes:
    file_name, id, height, width: of the image.
    captions: list of (text, [Phrase]).
    objects: list of dict(xywh, label, name, and if known crowd, area, id).
    expressions: list of (text, Phrase).
  """
  file_name: str
  id: Any
  height: int | None = None
  width: int | None = None
  captions: Sequence[Any] = dataclasses.field(default_factory=list)
  objects: Sequence[Any] = dataclasses.field(default_factory=list)
  expressions: Sequence[Any] = dataclasses.field(default_factory=list)


def joined(images):
  """One image for each file, with all that its entries have."""
  found = {}
  for image in images:
    first = found.setdefault(image.file_name, image)
    if first is not image:
      for key in ('captions', 'objects', 'expressions'):
        getattr(first, key).extend(getattr(image, key))
  return list(found.values())


class GroundedRecords(base.RecordBuilder):
  """Turns `Image`s into records."""

  def grounded_records(self, split, images, files, limit, known=None):
    """Records of images.

    Args:
      split: name of the split.
      images: list of `Image`s.
      files: `image_files.ImageFiles`.
      limit: most records to yield.
      known: names of all images of the files; default: of `images`.
    """
    report = self.reports[split]
    report.update(phrases=0, expressions=0)
    names = [i.file_name for i in images]
    written = 0
    for image, stored in zip(images, files.load_all(names, known)):
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, image.file_name)
        continue
      size = image.height, image.width
      if None in size:
        self.note(split, 'size of the image taken from its file')
        size = stored.size_in_file
      place = lambda p, s=stored, h=size: self.box(split, 'box', p.name, p.xywh,
                                                   s, *h)
      texts, phrases = [], []
      for text, some in image.captions:
        text, found = self._caption(split, text, some, place, len(texts))
        if text:
          texts.append(text)
          phrases += found
      refexps = list(filter(None, (self._expression(split, text, p, place)
                                   for text, p in image.expressions)))
      objects = list(filter(None, (self._object(split, o, stored, size)
                                   for o in image.objects)))
      if not (texts or refexps or objects):
        self.skip(split, 'image: nothing that can be used', image.file_name)
        continue
      self.note_image(split, stored)
      report['phrases'] += len(phrases)
      report['expressions'] += len(refexps)
      yield base.record(
          image=stored.data, image_id=str(image.id), height=stored.height,
          width=stored.width, texts=texts, phrases=phrases, refexps=refexps,
          objects=objects)
      written += 1
      if written == limit:
        return

  def _caption(self, split, text, phrases, place, number):
    """(clean text, items of `phrases`) of a caption; ('', []) if it is empty.
    """
    boxes, found = [], []
    for phrase in phrases:
      words = self._spans(split, text, phrase, [s for f in found for s in f])
      box = words and place(phrase)
      if box:
        boxes.append((phrase, box))
        found.append(words)
    text, found = spans_lib.clean(text, found)
    if not text:
      self.skip(split, 'empty caption')
      return '', []
    return text, [
        dict(bbox=base.stored_box(box), text_number=number, spans=words,
             text=base.clean(p.text) if p.text is not None else ' '.join(
                 text[a:b] for a, b in words), id=p.id, kind=p.kind)
        for (p, box), words in zip(boxes, found)]

  def _spans(self, split, text, phrase, taken):
    """The checked spans of a phrase, or None if it is left out and counted."""
    skip = lambda why: self.skip(split, f'phrase: {why}', phrase.name, 'boxes')
    if phrase.spans is None:
      span = spans_lib.find(phrase.text or '', text, taken)
      return [span] if span else skip('not in its caption')
    try:
      found = [tuple(values.integer(v, 'span', 0) for v in span)
               for span in phrase.spans]
    except (TypeError, values.Wrong):
      return skip('its characters are not pairs of numbers')
    if not found:
      return skip('no words of its caption')
    if not all(len(s) == 2 and s[0] < s[1] <= len(text) for s in found):
      return skip('its characters lie outside its caption')
    if not all(text[a:b].strip() for a, b in found):
      return skip('its characters are spaces')
    if phrase.text is not None and base.clean(' '.join(
        text[a:b] for a, b in found)) != base.clean(phrase.text):
      self.note(split, 'phrase that differs from the words at its characters')
    joined = spans_lib.joined(found)
    if len(joined) < len(found):
      self.note(split, 'spans of one phrase that overlap, joined')
    return joined

  def _expression(self, split, text, phrase, place):
    """An item of `refexps`, or None."""
    words = []
    if phrase.spans:
      words = self._spans(split, text, phrase, ())
      if not words:
        return None
    box = place(phrase)
    text, (words,) = spans_lib.clean(text, [words])
    if not text:
      return self.skip(split, 'empty expression', phrase.name)
    if not box:
      return None
    return dict(text=text, bbox=base.stored_box(box), spans=words, id=phrase.id)

  def _object(self, split, found, stored, size):
    """An item of `objects`, or None."""
    box = self.box(split, 'box', found['name'], found['xywh'], stored, *size)
    if box is None:
      return None
    return dict(bbox=base.stored_box(box), label=found['label'], attributes=[],
                is_crowd=found.get('crowd', False), id=found.get('id', -1),
                area=self.area(split, found.get('area'), found['xywh'], box,
                               stored, *size))
