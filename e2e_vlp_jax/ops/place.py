"""Where the program that is being traced will run.

Some operations have one form for each platform, and a kernel runs on one chip's
rows, so it needs to know how the batch is split. A step says both by `on`,
around its tracing.
"""
import contextlib
import contextvars
from typing import Any, NamedTuple

import jax

_PLACE = contextvars.ContextVar('place', default=None)


class Place(NamedTuple):
  """Devices of a step.

  Attributes:
    mesh: its mesh.
    axes: names of the mesh's axes over which batches are split.
  """
  mesh: Any
  axes: tuple[str, ...]

  @property
  def platform(self):
    """'cpu', 'gpu' or 'tpu'."""
    return self.mesh.devices.flat[0].platform


@contextlib.contextmanager
def on(mesh, axes):
  """Within it, programs are traced for a mesh; see `Place`."""
  token = _PLACE.set(Place(mesh, tuple(axes)))
  try:
    yield
  finally:
    _PLACE.reset(token)


def current():
  """The `Place` of `on`; None outside of it."""
  return _PLACE.get()


def platform():
  """'cpu', 'gpu' or 'tpu': that of `on`, outside of it jax's own choice."""
  place = current()
  return place.platform if place else jax.default_backend()
