"""What `compare` compares: plain data for configs/studies."""
import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Step:
  """One run of an arm.

  Attributes:
    spec: 'path.py:ARG' of its config. `{name}` stands for the folder of the
      arm's step of this name; `{other arm/name}` for that of another arm,
      which must come before.
    overrides: {config key: value}; in texts, `{name}` stands for a folder too.
  """
  spec: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
  """What is compared.

  Attributes:
    title: one line.
    arms: {name: {name of a step: Step}}, in the order in which they run.
    measures: {label: (name of a step, metric)}; an arm without the step has
      no value.
    seeds: number of seeds by default.
  """
  title: str
  arms: Mapping[str, Mapping[str, Step]]
  measures: Mapping[str, tuple[str, str]]
  seeds: int = 3
