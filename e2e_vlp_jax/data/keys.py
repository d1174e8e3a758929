"""Batch keys, each declared once, next to the op that makes it.

An op file lists the keys of its ops under `KEYS`. These declarations tell the
pipeline which values of an example go into a batch, with their dtypes and
static shapes, and `synthetic` how to draw a batch without data. The table in
docs/data.md is generated from them.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from e2e_vlp_jax.errors import UserError

# Stands for the tokenizer's id of [PAD], unknown when a key is declared.
PAD_ID = '[PAD]'
# Ids of the special tokens in synthetic texts, as in our own vocabularies.
PAD, CLS, SEP, MASK = 0, 1, 2, 3
FIRST_WORD = 4


@dataclasses.dataclass(frozen=True)
class Draw:
  """Inputs of a function that draws a synthetic value.

  Attributes:
    rng: a numpy Generator.
    shape: shape of the array to return, including B.
    sizes: {letter: int}, B included, and vocab_size, num_classes,
      num_attributes, num_answers.
    batch: the keys drawn so far: those of earlier ops, and those before this
      one in its op's declaration.
  """
  rng: np.random.Generator
  shape: tuple
  sizes: dict
  batch: dict


@dataclasses.dataclass(frozen=True)
class Key:
  """One key of a batch.

  Attributes:
    name: the key.
    dtype: numpy dtype.
    shape: shape of one row, a letter or a digit per axis: 'M4' is [M, 4].
      Letters: S texts, L tokens, M boxes, K attributes (`config.data`), A
      answers, H and W of the bucket, and letters from `SIZES` of an op file. A
      key with an axis of size 0 is not made.
    padding: value of padding, within a row and for whole rows; `PAD_ID` for
      token ids.
    holds: its description, for the table in the docs.
    draw: function `Draw` -> array, a synthetic value for a whole batch.
    render: for pixels, a function (example, canvas) -> bool that writes the
      row's value into zeros and returns whether the image could be read.
      Rendering runs in parallel, after the ops. None: the value is
      `example[name]`.
  """
  name: str
  dtype: Any
  shape: str
  padding: Any
  holds: str
  draw: Callable[[Draw], np.ndarray]
  render: Callable | None = None

  def row_shape(self, sizes):
    """The shape of one row under {letter: size}."""
    unknown = [c for c in self.shape if not c.isdigit() and c not in sizes]
    if unknown:
      raise UserError(f'batch key {self.name!r}: the letter {unknown[0]!r} of '
                      f'its shape {self} has no size')
    return tuple(int(c) if c.isdigit() else sizes[c] for c in self.shape)

  def __str__(self):
    return f'{np.dtype(self.dtype).name} [{",".join("B" + self.shape)}]'


def yes(draw):
  """True for every row."""
  return np.ones(draw.shape, bool)


def _image_size(draw):
  mask = draw.batch['image_mask']
  return np.stack([mask.any(2).sum(1), mask.any(1).sum(1)], -1)


# Keys that the pipeline adds to those of the ops.
ALWAYS = (
    Key('example_id', np.int64, '', -1,
        'number of the example, for `Pipeline.unit` and `Pipeline.record`',
        lambda draw: np.arange(*draw.shape)),
    Key('image_size', np.int32, '2', 0,
        'height, width of the original, upright', _image_size),
    Key('valid', bool, '', False,
        'False for padding and unreadable records', yes),
)


def data_sizes(data_config):
  """{letter: size} that `config.data` decides."""
  return {'S': data_config['sentences'], 'L': data_config['max_text'],
          'M': data_config['max_boxes'], 'K': data_config['max_attributes']}
