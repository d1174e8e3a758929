"""Computes which unit goes into which row of which batch, without state.

Everything has a closed form, so batch 10,000,000 costs as much as batch 0 and
a resumed run replays nothing.

1. Batch t belongs to one bucket (a static image shape). `interleave` deals
   the batches to the buckets in proportion to the weight of their units, and
   counts how many batches the bucket had before. Within blocks of 64 batches
   the buckets are shuffled by (seed, block); a pattern such as 0,1,0,1 could
   alias with periodic events such as logging every k steps.
2. The rows of all batches of a bucket are numbered 0, 1, 2, ...;
   `interleave` deals them to the sources in proportion to their weights in
   that bucket, and counts how many rows the source had before: c.
3. Row c of a (source, bucket) with n units is number c % n of epoch c // n,
   in the order of that epoch: `rng.permute`, keyed by (seed, source, bucket,
   epoch). Every unit comes once per epoch.
"""
import fractions
import functools

import numpy as np

from e2e_vlp_jax.data import rng

_BLOCK = 64
_SHARES = 1 << 24  # the shares of a mixture are multiples of 1/_SHARES


def shares(weights):
  """Non-negative weights -> int64 that sum to 2^24, positive ones at least 1.
  """
  weights = [fractions.Fraction(w) for w in weights]
  total = sum(weights)
  out = [max(1, int(w * _SHARES / total)) if w else 0 for w in weights]
  out[int(np.argmax(out))] += _SHARES - sum(out)
  return np.array(out, np.int64)


def interleave(slot, parts):
  """Deals the slots 0, 1, 2, ... to parts in proportion, evenly spread.

  Args:
    slot: int64 array.
    parts: int64 [n], from `shares`.

  Returns:
    (part, count), int64 arrays like `slot`: the part that gets the slot, and
    how many earlier slots that part got.
  """
  slot = np.asarray(slot, np.int64)
  if len(parts) == 1:
    return np.zeros_like(slot), slot
  middle = len(parts) // 2
  first, total = int(parts[:middle].sum()), int(parts.sum())
  before = slot * first // max(total, 1)
  is_first = (slot + 1) * first // max(total, 1) > before
  part, count = interleave(before, parts[:middle])
  other, other_count = interleave(slot - before, parts[middle:])
  return (np.where(is_first, part, other + middle),
          np.where(is_first, count, other_count))


class TrainOrder:
  """The endless order of a mixture; see the module's docstring.

  Args:
    members: members[source][bucket] is an int64 array of unit numbers.
    weights: weight of each source.
    batch_size: rows of the global batch.
    seed: int.
  """

  def __init__(self, members, weights, batch_size, seed):
    self._members, self._batch_size, self._seed = members, batch_size, seed
    weight = [[fractions.Fraction(w) * len(m) / sum(map(len, row))
               for m in row] for row, w in zip(members, weights)]
    columns = list(zip(*weight))
    self._bucket_shares = shares([sum(c) for c in columns])
    self._source_shares = [shares(c) if any(c) else None for c in columns]
    self._block = functools.lru_cache(8)(self._dealt_block)

  def __call__(self, t):
    """(bucket, source int64 [B], unit number int64 [B]) of batch t."""
    block, offset = divmod(t, _BLOCK)
    buckets, counts = self._block(block)
    bucket = int(buckets[offset])
    same = buckets == bucket
    count = np.sort(counts[same])[same[:offset].sum()]
    rows = count * self._batch_size + np.arange(self._batch_size)
    source, count = interleave(rows, self._source_shares[bucket])
    unit = np.zeros_like(rows)
    for s in np.unique(source):
      mine, members = source == s, self._members[s][bucket]
      epoch, position = np.divmod(count[mine], len(members))
      found = np.zeros_like(position)
      for e in np.unique(epoch):
        now = epoch == e
        found[now] = rng.permute(
            position[now], len(members),
            rng.fold(self._seed, 1, int(s), bucket, int(e)))
      unit[mine] = members[found]
    return bucket, source, unit

  def _dealt_block(self, block):
    """(bucket, count) of the batches of a block, from `interleave`; shuffled.
    """
    return interleave(
        block * _BLOCK + rng.permute(np.arange(_BLOCK), _BLOCK,
                                     rng.fold(self._seed, 0, block)),
        self._bucket_shares)


class EvalOrder:
  """Every unit once, in order within its bucket; -1 pads the last batch.

  Args and result as `TrainOrder`; `len()` is the number of batches.
  """

  def __init__(self, members, batch_size):
    self._batches = []
    for bucket in range(len(members[0])):
      source = np.concatenate([np.full(len(row[bucket]), s)
                               for s, row in enumerate(members)])
      unit = np.concatenate([row[bucket] for row in members])
      pad = -len(unit) % batch_size
      source, unit = (np.pad(x, (0, pad), constant_values=-1)
                      for x in (source, unit))
      self._batches += [
          (bucket, source[k:k + batch_size], unit[k:k + batch_size])
          for k in range(0, len(unit), batch_size)]

  def __len__(self):
    return len(self._batches)

  def __call__(self, t):
    return self._batches[t]
