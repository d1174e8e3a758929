"""Label spaces: the class and attribute names of a model.

Prepared data stores labels as names; a label space turns them into ids when
they are read, so one prepared folder serves every label space. Spaces are
JSON files in `labels/`:

  scenes  the drawn scenes: 6 shapes; 8 colours, 2 sizes, 3 textures.
  coco    the 80 object classes of COCO 2017, in the order of their category
          ids; no attributes.
  coco91  the same classes at their category ids 0 to 90, as in published
          detectors; ids that COCO never used are 'N/A <id>'.
  joint   COCO's 80, then the 1600 Visual Genome objects of bottom-up
          attention, then shapes; attributes are Visual Genome's 400, then
          those of the drawn scenes and of NLVR. Names are not repeated. A
          Visual Genome entry with several names ('television,tv') belongs to
          the class that one of them already names, if any; its other names are
          aliases. Source: peteanderson80/bottom-up-attention (MIT),
          data/genome/1600-400-20.

`data.labels='prepared'` stands for the spaces that `prepare` stored with the
datasets of `data.train`, joined; 'joint+prepared' for a shipped space and
after it the names that only those have.
"""
import dataclasses
import functools

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import shipped

_FOLDER = 'labels'


@dataclasses.dataclass(frozen=True)
class LabelSpace:
  """Names and their ids.

  Attributes:
    classes: class names; the position is the id.
    attributes: attribute names; the position is the id. May be empty.
    attribute_groups: group -> the attribute names that exclude each other
      (scenes: colour, size, texture). Other attributes are independent.
    class_aliases: other name -> class name.
    attribute_aliases: other name -> attribute name.
  """
  classes: list
  attributes: list
  attribute_groups: dict
  class_aliases: dict = dataclasses.field(default_factory=dict)
  attribute_aliases: dict = dataclasses.field(default_factory=dict)

  @classmethod
  def load(cls, name):
    """Reads the shipped space `name`, or a JSON file of the same form.

    Raises:
      UserError: no such space, or a file without one.
    """
    return shipped.load(_FOLDER, name, 'labels', 'a label space',
                        cls.from_dict)

  @classmethod
  def from_dict(cls, d):
    """The inverse of `to_dict`."""
    space = cls(list(d['classes']), list(d['attributes']),
                {k: list(v) for k, v in d['attribute_groups'].items()},
                dict(d.get('class_aliases', {})),
                dict(d.get('attribute_aliases', {})))
    for kind in (space.classes, space.attributes):
      repeated = {n for n in kind if kind.count(n) > 1}
      if repeated:
        raise ValueError(f'repeated names {sorted(repeated)}')
    return space

  def to_dict(self):
    """The whole label space as a JSON-able dict."""
    return dataclasses.asdict(self)

  def class_id(self, name):
    """The id of class `name`; raises UserError with the nearest name."""
    return _look_up('class', self._class_ids, name)

  def attribute_id(self, name):
    """The id of attribute `name`; raises UserError with the nearest name."""
    return _look_up('attribute', self._attribute_ids, name)

  @functools.cached_property
  def _class_ids(self):
    return _ids(self.classes, self.class_aliases)

  @functools.cached_property
  def _attribute_ids(self):
    return _ids(self.attributes, self.attribute_aliases)


def union(spaces):
  """The names of all spaces; a name keeps the first place it has.

  An alias for which another space has a class of its own is left out.
  """
  spaces = list(spaces)
  joined = lambda lists: list(dict.fromkeys(n for x in lists for n in x))
  classes = joined(s.classes for s in spaces)
  attributes = joined(s.attributes for s in spaces)
  groups = {}
  for space in spaces:
    for group, held in space.attribute_groups.items():
      groups[group] = joined([groups.get(group, []), held])
  aliases = lambda maps, names_: {
      a: n for m in reversed(list(maps)) for a, n in m.items()
      if a not in names_}
  return LabelSpace(
      classes, attributes, groups,
      aliases((s.class_aliases for s in spaces), set(classes)),
      aliases((s.attribute_aliases for s in spaces), set(attributes)))


def _ids(names_, aliases):
  ids = {n: k for k, n in enumerate(names_)}
  return {**{a: ids[n] for a, n in aliases.items()}, **ids}


def _look_up(kind, ids, name):
  if name not in ids:
    raise errors.UserError(f'{kind} {name!r} is not in the label space'
                           + errors.nearest(name, ids))
  return ids[name]


def names():
  """Names of the shipped label spaces."""
  return shipped.names(_FOLDER)
