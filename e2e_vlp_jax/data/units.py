"""Units: what a row of a batch shows, `config.data.unit`.

With 'image' a row is a record. With the others it is one item of a list in the
record: a record with five questions gives five rows per epoch, each with the
number of its item.
"""
import dataclasses

from e2e_vlp_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Unit:
  """One kind of row.

  Attributes:
    name: the value of `config.data.unit`.
    field: the record's list of items; None: the record itself is the row.
    text: the item's key that holds its text; None: the item is the text.
  """
  name: str
  field: str | None = None
  text: str | None = None

  def text_of(self, record, item):
    """The text of an item of a record."""
    found = record[self.field][item]
    return found[self.text] if self.text else found


_UNITS = {unit.name: unit for unit in (
    Unit('image'), Unit('text', 'texts'),
    Unit('question', 'questions', 'question'),
    Unit('statement', 'statements', 'statement'),
    Unit('entailment', 'entailment', 'text'),
    Unit('refexp', 'refexps', 'text'))}
# Units by their list in the record.
BY_FIELD = {unit.field: unit for unit in _UNITS.values() if unit.field}


def find(name):
  """The unit of this name.

  Raises:
    UserError: there is none; suggests the nearest.
  """
  if name not in _UNITS:
    raise UserError(f'data.unit: {name!r}' + nearest(name, _UNITS))
  return _UNITS[name]
