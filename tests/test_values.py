"""Values of annotations are read by type, in one place."""
import json
import math

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import values

NAN, INF = math.nan, math.inf
HALF = '\ud83d'
NO_NUMBERS = (None, True, False, '', 'x', '3,5', '1_000', 'nan', 'inf',
              '\u0663', NAN, INF, -INF, 10**400, '1e999', [3], {}, '3 4')

GOOD = [
    (values.number, 3, 3.), (values.number, ' 3.5 ', 3.5),
    (values.number, '-.5e1', -5.), (values.positive, '2', 2.),
    (values.integer, 3, 3), (values.integer, 3., 3), (values.integer, '3', 3),
    (values.integer, '-3', -3), (values.integer, '3.0', 3),
    (values.integer, str(2**63 - 1), 2**63 - 1),
    (values.identity, '07', 7), (values.identity, 'a7', 'a7'),
    *[(values.flag, v, False) for v in (0, 0., False, '0', 'false', 'No')],
    *[(values.flag, v, True) for v in (1, 1., True, '1', ' TRUE', 'yes')],
    (values.text, 'a 漢', 'a 漢'), (values.text, '', ''),
    (values.text, f'a {HALF}', 'a \ufffd'),
    (values.text, f'{HALF}\ude00', '😀'),  # Two halves are a whole.
    (values.texts, 'a', ['a']), (values.texts, ['a', 'b'], ['a', 'b']),
    (values.texts, ['a', None, 3], ['a']),
    (values.box, [1, '2', 3.5, 4], (1., 2., 3.5, 4.))]
BAD = [
    *[(f, v) for f in (values.number, values.integer, values.positive)
      for v in NO_NUMBERS],
    *[(values.identity, v) for v in (None, True, ' ', NAN, [3], 3.5)],
    (values.positive, 0), (values.positive, '-1'), (values.integer, 3.5),
    (values.integer, 2**63), (values.integer, '9' * 5000),
    *[(values.flag, v) for v in (None, '', 'maybe', 2, NAN, [], [1], {})],
    *[(f, v) for f in (values.text, values.texts)
      for v in (None, NAN, 3, True, {}, [3], [None, ['a']])],
    (values.text, ['a']), (values.texts, []),
    *[(values.box, v) for v in (None, 'abcd', '1234', [1, 2, 3], [1] * 5,
                                [1, 2, 3, NAN], [1, 2, 3, [4]], {})]]


@pytest.mark.parametrize('read, value, meant', GOOD)
def test_what_is_read(read, value, meant):
  found = read(value, 'f.json: a[3].x')
  assert found == meant and type(found) is type(meant)  # pylint: disable=unidiomatic-typecheck


@pytest.mark.parametrize('read, value', BAD)
def test_what_is_wrong(read, value):
  with pytest.raises(errors.UserError) as e:
    read(value, 'f.json: a[3].x')
  said = str(e.value)
  assert said.startswith('f.json: a[3].x is ') and '; expected ' in said
  assert len(said) < 150 and said.isprintable()
  assert e.value.reason.startswith('x is not ')  # The same for all values.


def test_a_changed_text_is_told():
  told = []
  values.texts(['a', f'b {HALF}', '漢', None], 'x', told.append)
  assert told == [values.HALF, values.NO_TEXT]


def test_ids_are_unique_unless_entries_are_equal():
  read = lambda entries: values.unique(entries, 'id', 'f.json: images',
                                       values.integer)
  a, b = dict(id=1, file_name='a.png', w=3), dict(id='1', file_name='b.png')
  assert read([a, dict(a), dict(a, id=2)]).keys() == {1, 2}
  with pytest.raises(errors.UserError, match=(
      r"images\[0\] and \[2\] have the same id 1, but differ: file_name "
      r"'a.png' and 'b.png'")):
    read([a, dict(a, id=2), b])
  with pytest.raises(errors.UserError, match=r"images\[0\] has no 'id'"):
    read([{}])


def test_lists_of_objects():
  assert values.objects([{}, {}], 'f.json: images') == [{}, {}]
  for wrong, says in ((None, 'images is None; expected a list'),
                      ({}, 'expected a list'),
                      ([{}, 3], r'images\[1\] is 3; expected an object')):
    with pytest.raises(errors.UserError, match=says):
      values.objects(wrong, 'f.json: images')


def test_json_files(tmp_path):
  path = tmp_path / 'f.json'
  path.write_text(json.dumps({'a': 'ü'}), encoding='utf-8-sig')
  assert values.load_json(path) == {'a': 'ü'}
  for content in (b'{', b'', b'\xff\xfe{\0', b'[' * 100_000, b'9' * 9999):
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match='f.json is not readable JSON'):
      values.load_json(path)
  for wrong in (tmp_path / 'g.json', tmp_path):
    with pytest.raises(errors.UserError, match='no annotation|not readable'):
      values.load_json(wrong)
