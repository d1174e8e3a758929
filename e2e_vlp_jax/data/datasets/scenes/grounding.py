"""Which objects of a scene the words of a caption mean."""
import itertools
import re

from e2e_vlp_jax.data.datasets.scenes import draw as scene_draw
from e2e_vlp_jax.data.datasets.scenes import facts

_either = lambda words: f'(?:{"|".join(words)})'
_SPEC = (rf'(?:{_either(scene_draw.SIZES)} )?'
         rf'(?:{_either(scene_draw.TEXTURES)} )?{_either(scene_draw.COLOURS)} ')
_MENTION = re.compile(rf'\ban? {_SPEC}{_either(scene_draw.SHAPES)}\b')
_COUNTED = re.compile(rf'\b{_either(facts.NUMBERS[2:])} {_SPEC}'
                      rf'{_either(facts.PLURALS.values())}\b')


def phrases(caption, scene):
  """[((first character, after the last), [object])] of a true caption.

  A mention such as 'a red circle' means every object that can be meant so that
  the whole caption is true; 'two red circles' means both.
  """
  found = []
  counted, mentioned = facts.meant(caption, scene)
  for pattern, groups in ((_COUNTED, counted), (_MENTION, mentioned)):
    found += zip((m.span() for m in pattern.finditer(caption)), groups)
  return found


def all_phrases(texts, scene):
  """Items for `phrases` of a record: (number of the text, span, object)."""
  return list(itertools.chain.from_iterable(
      ((k, span, o) for span, objects in phrases(text, scene)
       for o in objects) for k, text in enumerate(texts)))
