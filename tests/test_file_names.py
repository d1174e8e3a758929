"""Names of files in annotations and on the disk."""
import unicodedata
import zipfile

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import image_files

NFD = unicodedata.normalize('NFD', 'Capture d’écran é.png')


def files(tmp_path, names, zipped):
  """ImageFiles of a folder or a zip file; each file holds its name."""
  if zipped:
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as z:
      for n in names:
        z.writestr(f'train/{n}', n)
  else:
    for n in names:
      (tmp_path / 'train' / n).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / 'train' / n).write_text(n)
  return image_files.ImageFiles(str(tmp_path), ['train'])


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('there, asked', [
    (['a.png'], {'a.png': 'a.png'}),
    ([NFD], {unicodedata.normalize('NFC', NFD): NFD}),
    (['é.png'], {unicodedata.normalize('NFD', 'é.png'): 'é.png'}),
    (['a b.png'], {'a%20b.png': 'a b.png'}),
    (['a%20b.png'], {'a%20b.png': 'a%20b.png'}),
    (['x/a.png'], {'x\\a.png': 'x/a.png'}),
    (['x/a.png'], {'a.png': 'x/a.png'}),
    (['a.png'], {'C:\\Users\\me\\a.png': 'a.png'}),
    (['a.PNG'], {'a.png': 'a.PNG'}),
    (['x/é.png'], {'images/x%2F%C3%A9.png': 'x/é.png'}),
    # Two files could be meant.
    (['x/a.png', 'y/a.png'], {'a.png': None, 'z/a.png': None,
                              'x/a.png': 'x/a.png'}),
    # Two names could mean the file.
    (['a.png'], {'x/a.png': None, 'y/a.png': None}),
    (['a.png'], {'a.png': 'a.png', 'A.png': None, 'x/a.png': None}),
    (['a.png'], {'b.png': None, 'a': None, '': None, '..': None,
                 '\ud83d.png': None, 'a\0.png': None})])
def test_names(tmp_path, there, asked, zipped):
  found = files(tmp_path, there, zipped)
  found._names = image_files.file_names.Names(list(asked))  # pylint: disable=protected-access
  for name, path in asked.items():
    if path is None:
      with pytest.raises(errors.UserError, match='no such image file'):
        found.read(name)
    else:
      data, similar = found.read(name)
      assert data.decode() == path
      assert similar == (name != path)


def test_names_of_a_zip_without_the_flag_of_utf8(tmp_path):
  files(tmp_path, ['测试.png'], True)
  path = tmp_path / 'train.zip'
  data = bytearray(path.read_bytes())
  for mark, at in ((b'PK\1\2', 9), (b'PK\3\4', 7)):
    data[data.index(mark) + at] &= 0xf7
  path.write_bytes(data)
  found = image_files.ImageFiles(str(tmp_path), ['train'])
  assert found.read('测试.png') == ('测试.png'.encode(), False)
