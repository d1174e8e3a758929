"""TensorBoard's event files.

Only this file uses clu, and imports it when it makes a writer: clu needs
TensorFlow, which a machine that only trains may lack.
"""
import logging
import os
import time

import numpy as np

# A mounted bucket shows a file when it is closed, so each file is closed after
# so many seconds and another one follows: 300 a day, which TensorBoard joins.
SECONDS_OF_A_FILE = 300


class EventFiles:
  """Writes scalars and images; without clu it warns and writes nothing.

  Args:
    folder: of the event files.
  """

  def __init__(self, folder):
    self._folder, self._writer, self._opened = os.fspath(folder), None, 0.
    try:
      from clu import metric_writers  # pylint: disable=g-import-not-at-top
      self._open = metric_writers.SummaryWriter
    except ImportError as e:
      logging.warning('no TensorBoard events: %s', e)
      self._open = None

  def scalars(self, step, values):
    """Writes {name: number} of a step."""
    if self._ready():
      self._writer.write_scalars(step, values)

  def images(self, step, pictures):
    """Writes {name: PIL image} of a step."""
    if self._ready():
      for name, image in pictures.items():
        self._writer.write_images(step, {name: np.asarray(image)[None]})

  def close(self):
    if self._writer is not None:
      self._writer.flush()
      self._writer.close()
      self._writer = None

  def _ready(self):
    """Whether there is a writer; opens it, or another one after a while."""
    now = time.monotonic()
    if self._writer is not None and now - self._opened > SECONDS_OF_A_FILE:
      self.close()
    if self._writer is None and self._open is not None:
      self._writer, self._opened = self._open(self._folder), now
    return self._writer is not None
