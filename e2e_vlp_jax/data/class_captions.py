"""Class names as a caption: 'person. bicycle. traffic light'.

GLIP (Li et al., CVPR 2022) and FIBER's fine stage (Dou et al., NeurIPS 2022)
train on detection data in this form. The names of the classes that an image
has are kept, others are sampled as negatives, and all are shuffled.
"""
import re

import numpy as np

SEPARATOR = '. '
_ENDS = 2  # the special tokens before and after a text


def clean_name(name):
  """The words of a class: no '(...)', space for '_', no double space."""
  return re.sub(r'\(.*\)', '', name).replace('_', ' ').replace('  ', ' ')


def caption(names):
  """(the names as one caption, the span of each)."""
  spans, at = [], 0
  for name in names:
    spans.append((at, at + len(name)))
    at += len(name) + len(SEPARATOR)
  return SEPARATOR.join(names), spans


def cost(tokenizer, name):
  """Number of tokens that a name and the separator after it take.

  As the released code counts: the name alone, with the space after it as a
  token. Within a caption it takes fewer, see `cost_within`.
  """
  return len(tokenizer.encode(name + SEPARATOR)) - _ENDS


def cost_within(tokenizer, name):
  """Number of tokens that the separator before a name and the name take."""
  return len(tokenizer.encode(SEPARATOR + name)) - _ENDS


def fitting(costs, length):
  """How many of the names fit, from the first: positives of a caption.

  Args:
    costs: tokens of each name, see `cost`.
    length: L.
  """
  return int(np.sum(np.cumsum(costs) <= length - _ENDS))


def sampled(positives, candidates, costs, room, most, numbers,
            probabilities=(0., 0., .5)):
  """Names of classes that the image does not have.

  Args:
    positives: set of the names that the image has.
    candidates: all names.
    costs: function name -> tokens.
    room: tokens that are left for negatives.
    most: number of negatives to draw at most, before positives are discarded
      from them (FIBER: 85).
    numbers: 2 + len(candidates) random numbers in [0, 1).
    probabilities: of one negative, of none, and of `most`; the rest is for a
      uniform number from 1 to `most`. FIBER's released config has a fourth
      one, which its own code refuses; GLIP's and DesCo's configs have these.

  Returns:
    list of names.
  """
  one, none, full = np.cumsum(probabilities)
  kind, share = numbers[:2]
  most = min(most, len(candidates))
  count = (min(1, most) if kind < one else 0 if kind < none else
           most if kind < full else min(int(share * most) + 1, most))
  found = []
  for k in np.argsort(numbers[2:2 + len(candidates)], kind='stable')[:count]:
    name = candidates[k]
    if name in positives:
      continue
    room -= costs(name)
    if room <= 0:
      break
    found.append(name)
  return found


def chunks(names, tokenizer, length, most=None):
  """Cuts a list of class names into captions that the model can read.

  Args:
    names: cleaned names.
    tokenizer: a `tokenizer.Tokenizer`.
    length: L.
    most: names of a caption at most (LVIS: 40); None = as many as fit.

  Returns:
    list of lists of numbers into `names`, in order.
  """
  found = [[]]
  for k in range(len(names)):
    text, _ = caption([names[i] for i in (*found[-1], k)])
    full = (len(found[-1]) == most
            or len(tokenizer.encode(text)) > length)
    if full and found[-1]:
      found.append([])
    found[-1].append(k)
  return found
