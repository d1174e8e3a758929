"""Bad inputs of all commands: what is wrong, the exit code, and the line.

The table of this project's answers. A row is

  (what is wrong, command, function that makes the input, exit code, line)

where the function gets an empty folder as `In` and returns the arguments, and
the line is a regular expression. With exit code 2 it is the only line that
starts with 'error:'. With exit code 0 it is found among what is printed: the
command goes on, and says what it left out or changed.

To add rows for a command, add a list as those below.
"""
import importlib
import io
import json
import pathlib
import re
import zipfile

from PIL import Image
import pytest

from e2e_vlp_jax import errors

BOX = [3, 2, 10, 8]


def image(form='PNG', mode='RGB', size=(20, 16)):
  out = io.BytesIO()
  Image.new(mode, size, 1 if mode in 'FI' else None).save(out, form)
  return out.getvalue()


class In:
  """A folder for an input.

  Attributes:
    path: its pathlib.Path.
  """

  def __init__(self, path):
    self.path = path

  def put(self, name, content):
    """Writes a file: bytes, text, or a JSON value."""
    path = self.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(content if isinstance(content, str)
                      else json.dumps(content), encoding='utf-8')
    return str(path)

  def prepare(self, name, *argv):
    return [name, '--source', str(self.path), '--data_dir',
            str(self.path / 'out'), *argv]

  def coco(self, change=lambda c: None, argv=(), image_data=None, **entry):
    """Arguments of `prepare coco` for two images.

    Args:
      change: function that changes the content of the JSON file with boxes.
      argv: more arguments.
      image_data: bytes of the first image.
      **entry: keys of the first annotation.
    """
    entries = [dict(id=k, image_id=k, category_id=5, bbox=BOX, area=9.,
                    iscrowd=0) for k in range(2)]
    content = dict(
        images=[dict(id=k, file_name=f'{k}.png', width=20, height=16)
                for k in range(2)],
        annotations=entries, categories=[dict(id=5, name='dog')])
    entries[0] |= entry
    change(content)
    self.put('annotations/instances_train2017.json', content)
    for k in range(2):
      self.put(f'train2017/{k}.png', image_data if image_data and not k
               else image())
    return self.prepare('coco', *argv)

  def pairs(self, table, text, *argv):
    """Arguments of `prepare pairs` for a table and two images."""
    self.put(table, text)
    for k in range(2):
      self.put(f'{k}.png', image())
    return self.prepare('pairs', *argv)

  def genome(self, **files):
    good = dict(objects=[dict(image_id=1, objects=[])],
                region_descriptions=[dict(id=1, regions=[])])
    for name, content in {**good, **files}.items():
      self.put(f'{name}.json', content)
    self.put('VG_100K/1.jpg', image('JPEG'))
    return self.prepare('visual_genome')

  def nlvr(self, **entry):
    row = dict(sentence='a', label='true', identifier='1-0', directory='0',
               structured_rep=[[dict(x_loc=1, y_loc=2, size=10, type='circle',
                                     color='Yellow')], [], []])
    self.put('dev/images/0/dev-1-0-0.png', image(size=(400, 100)))
    self.put('dev/dev.json', json.dumps(row | entry))
    return self.prepare('nlvr1')

  def vqa(self, **entry):
    self.put('v2_OpenEnded_mscoco_test2015_questions.json', dict(questions=[
        dict(dict(question_id=1, image_id=5, question='is it?'), **entry)]))
    self.put('test2015/COCO_test2015_000000000005.jpg', image('JPEG'))
    return self.prepare('vqav2')

  def predict(self, name, data, *argv):
    return ['--checkpoint', str(self.path / 'none'), '--task', 'detect',
            '--image', self.put(name, data), *argv]


def _zipped(box, **entry):
  argv = box.coco()
  with zipfile.ZipFile(box.path / 'train2017.zip', 'w') as z:
    for k in range(2):
      z.writestr(f'train2017/{k}.png', image())
  data = bytearray((box.path / 'train2017.zip').read_bytes())
  data[data.index(b'PK\1\2') + entry['at']] = entry['value']
  box.put('train2017.zip', bytes(data))
  for k in range(2):
    (box.path / f'train2017/{k}.png').unlink()
  (box.path / 'train2017').rmdir()
  return argv


def _twice(key):
  return lambda c: c[key].append(dict(c[key][0], **(
      {'file_name': 'z.png'} if key == 'images' else {'name': 'cat'})))


COCO = [
    ('no such folder', lambda i: ['coco', '--source', str(i.path / 'x'),
                                  '--data_dir', str(i.path / 'out')], 2,
     'neither .*instances_train2017.json nor'),
    ('a file of another name', lambda i: [i.put('train.json', {}), i.prepare(
        'coco')][1], 2, 'neither .*prepare own'),
    ('JSON that is cut', lambda i: [i.coco(), i.put(
        'annotations/instances_train2017.json', '{"images": [')][0], 2,
     'instances_train2017.json is not readable JSON'),
    ('a list where an object is expected', lambda i: [i.coco(), i.put(
        'annotations/instances_train2017.json', [])][0], 2,
     "no list 'images'"),
    ('an image that is no object', lambda i: i.coco(
        lambda c: c['images'].append(3)), 2,
     r'images\[2\] is 3; expected an object'),
    ('an image without an id', lambda i: i.coco(
        lambda c: c['images'][1].pop('id')), 2, r"images\[1\] has no 'id'"),
    ('a file name that is a number', lambda i: i.coco(
        lambda c: c['images'][1].update(file_name=3)), 2,
     r'images\[1\].file_name is 3; expected text'),
    ('a width of 0', lambda i: i.coco(
        lambda c: c['images'][1].update(width=0)), 2,
     r'images\[1\].width is 0; expected a positive whole number'),
    ('an id of two images', lambda i: i.coco(_twice('images')), 2,
     "same id 0, but differ: file_name '0.png' and 'z.png'"),
    ('an id of two categories', lambda i: i.coco(_twice('categories')), 2,
     "same id 5, but differ: name 'dog' and 'cat'"),
    ('another file name in the captions', lambda i: [i.coco(), i.put(
        'annotations/captions_train2017.json', dict(
            images=[dict(id=0, file_name='q.png')], annotations=[]))][0], 2,
     "images\\[0\\] is 'q.png', but '0.png' has the same id 0"),
    ('boxes without categories', lambda i: i.coco(
        lambda c: c.pop('categories')), 2, "no list 'categories'"),
    ('not one box of a known category', lambda i: i.coco(
        lambda c: [a.update(category_id=9) for a in c['annotations']]), 2,
     'none of 2 boxes can be used; .*; 2 box: category 9 is not listed'),
    ('a category id that is no number', lambda i: i.coco(category_id=True), 0,
     r'skipped 1: box: category_id is not a whole number \(0.png#0 \(True'),
    ('a category id as text', lambda i: i.coco(category_id='5'), 0, '2 boxes'),
    ('a crowd flag as text', lambda i: i.coco(iscrowd='1'), 0,
     '2 boxes, of which 1 crowds'),
    ('a crowd flag that is none', lambda i: i.coco(iscrowd='maybe'), 0,
     r"skipped 1: box: iscrowd is not true or false \(0.png#0 \('maybe'"),
    ('an area that is NaN', lambda i: i.coco(area=float('nan')), 0,
     "changed 1: area replaced by the box's"),
    ('a box of three numbers', lambda i: i.coco(bbox=[1, 2, 3]), 0,
     'skipped 1: box: not four finite numbers'),
    ('a box without an area', lambda i: i.coco(bbox=[1, 1, 1e-9, 1e-9]), 0,
     'skipped 1: box: no area'),
    ('a box of four letters', lambda i: i.coco(bbox='1234'), 0,
     'skipped 1: box: not four finite numbers'),
    ('an annotation of no image', lambda i: i.coco(image_id=77), 0,
     'annotations of an image that is not listed'),
    ('an image id that is null', lambda i: i.coco(image_id=None), 0,
     r'skipped 1: box: image_id is not a whole number \(annotations\[0\]'),
    ('half an emoji in a category', lambda i: i.coco(
        lambda c: c['categories'][0].update(name='dog\ud83d')), 0,
     r'changed 1: text with half a character'),
    ('half an emoji in a file name', lambda i: i.coco(
        lambda c: c['images'][0].update(file_name='x\ud83d.png')), 0,
     r'skipped 1: image: no such image file \(x\\ud83d.png\)'),
    ('a caption that is NaN', lambda i: [i.coco(), i.put(
        'annotations/captions_train2017.json', dict(images=[], annotations=[
            dict(id=1, image_id=0, caption=float('nan'))]))][0], 0,
     'skipped 1: caption: caption is not text'),
    ('captioned_only without captions', lambda i: i.coco(
        argv=['--captioned_only']), 2,
     'captioned_only: no annotation file .*captions_train2017.json'),
    ('an image of floats', lambda i: i.coco(image_data=image('TIFF', 'F')), 0,
     'skipped 1: image: .*floats, of which none is known to be white'),
    ('an image of 32-bit integers', lambda i: i.coco(
        image_data=image('TIFF', 'I')), 0, 'skipped 1: image: .*32-bit'),
    ('a HEIC photograph', lambda i: i.coco(
        image_data=b'\0\0\0\x18ftypheic\0\0\0\0'), 0,
     'it is a HEIC or HEIF photograph, not an image .*convert it to JPEG'),
    ('a web page instead of an image', lambda i: i.coco(
        image_data=b'<!DOCTYPE html><html>'), 0, 'it is a web page'),
    ('an encrypted zip', lambda i: _zipped(i, at=8, value=1), 2,
     'train2017.zip: .*it is encrypted; unpack the file'),
    ('a zip in Deflate64', lambda i: _zipped(i, at=10, value=9), 2,
     r'train2017.zip: .*compression method 9 \(Deflate64\); unpack the file'),
    ('a zip with a damaged member', lambda i: _zipped(i, at=16, value=0), 0,
     'skipped 1: image: it cannot be read'),
    ('a zip that is none', lambda i: [i.coco(), (
        i.path / 'train2017').rename(i.path / 'y'), i.put(
            'train2017.zip', b'PK')][0], 2, 'train2017.zip: File is not a zip'),
    ('nothing but crowds', lambda i: i.coco(
        lambda c: [a.update(iscrowd=1) for a in c['annotations']]), 0,
     'warning: coco train: all 2 boxes are crowds'),
    ('more than half of the images are missing', lambda i: i.coco(
        lambda c: c['images'].extend(dict(id=k, file_name=f'{k}.png', width=20,
                                          height=16) for k in (7, 8, 9))), 2,
     'coco train: only 2 of 5 images can be used; the most frequent reason, 3 '
     'times: image: .*7.png.*; nothing is written; with --allow_losses'),
    ('the same, and the others are wanted', lambda i: i.coco(
        lambda c: c['images'].extend(dict(id=k, file_name=f'{k}.png', width=20,
                                          height=16) for k in (7, 8, 9)),
        argv=['--allow_losses']), 0,
     'warning: coco train: only 2 of 5 images can be used; the most frequent'),
    ('a data folder that is a file', lambda i: [i.coco(), [
        'coco', '--source', str(i.path), '--data_dir', i.put('f', 'x')]][1], 2,
     '--data_dir .*cannot be written'),
]
PAIRS = [
    ('a quotation mark that is not closed', lambda i: i.pairs(
        't.csv', 'image,text\n0.png,one\n1.png,"two\n'), 2,
     't.csv: .*row that begins in line 3 is not valid.*quotation mark'),
    ('a comma that is not quoted', lambda i: i.pairs(
        't.csv', 'image,text\n0.png,a dog, a cat\n1.png,two\n'), 0,
     r'skipped 1: row with more fields than the first \(2\)'),
    ('two columns of a name', lambda i: i.pairs(
        't.csv', 'image,text,text\n0.png,a,b\n'), 2,
     "2 columns are called 'text'"),
    ('a column that is not there', lambda i: i.pairs(
        't.csv', 'image,text\n0.png,a\n', '--text', 'tex'), 2,
     "no column 'tex'; did you mean 'text'"),
    ('a row of JSON that is a list', lambda i: i.pairs(
        't.jsonl', '{"image": "0.png", "text": "a"}\n[]\n'), 2,
     't.jsonl: not readable after row 1: row 2 is not a JSON object'),
    ('a text that is a number', lambda i: i.pairs(
        't.jsonl', '{"image": "0.png", "text": 3}\n'
        '{"image": "1.png", "text": "a"}\n'), 0,
     'skipped 1: row without a text'),
    ('a list of texts and others', lambda i: i.pairs(
        't.jsonl', '{"image": "0.png", "text": ["a", null]}\n'), 0,
     'changed 1: list of texts with an item that is no text'),
    ('a quotation mark that ends in a later row', lambda i: i.pairs(
        't.csv', 'image,text\n0.png,"a\n1.png,b"\n'), 0,
     'changed 1: text of several lines'),
    ('half an emoji', lambda i: i.pairs(
        't.jsonl', '{"image": "0.png", "text": "a\\ud83d"}\n'), 0,
     'changed 1: text with half a character'),
    ('a table that is not UTF-8', lambda i: i.pairs(
        't.csv', b'image,text\n0.png,\xff\n'), 2, 'not readable after row 0'),
    ('a URL instead of a file', lambda i: i.pairs(
        't.csv', 'image,text\nhttp://a/b.png,x\n'), 2,
     't.csv:2: the image is a URL.*download the images first'),
    ('a damaged shard', lambda i: [i.put('0.tar', b'x' * 2048), i.prepare(
        'pairs')][1], 2,
     '0.tar: no pair of an image and a text; rest of a shard: '),
]
OTHERS = [
    ('an id of two items', lambda i: i.genome(objects=[
        dict(image_id=1, objects=[]), dict(image_id='1', objects=[{}])]), 2,
     'objects.json: item 1 is another item of image_id 1'),
    ('two lists in a file', lambda i: i.genome(
        objects='[{"image_id": 1, "objects": []}] []'), 2,
     'objects.json is not a readable JSON list: byte 32: more after the'),
    ('a phrase that is a number', lambda i: i.genome(region_descriptions=[
        dict(id=1, regions=[dict(region_id=8, phrase=3)])]), 0,
     r'skipped 1: phrase: empty \(1#8\)'),
    ('a name that is a number', lambda i: i.genome(objects=[
        dict(image_id=1, objects=[dict(object_id=4, names=[3])])]), 2,
     'none of 1 boxes can be used; 1 box: no name'),
    ('a label that is neither true nor false', lambda i: i.nlvr(label='maybe'),
     2, "dev.json:1: not an NLVR example: .*label is 'maybe'"),
    ('a sentence that is null', lambda i: i.nlvr(sentence=None), 2,
     'dev.json:1: .*sentence is None; expected text'),
    ('an object outside of the image', lambda i: i.nlvr(structured_rep=[[dict(
        x_loc=1e9, y_loc=2, size=10, type='circle', color='Yellow')]]), 2,
     'dev.json:1: .*outside of the image'),
    ('a question id that is no number', lambda i: i.vqa(question_id='x'), 2,
     r"questions\[0\].question_id is 'x'; expected a whole number"),
    ('a question that is null', lambda i: i.vqa(question=None), 2,
     r'questions\[0\].question is None; expected text'),
    ('an option of another dataset', lambda i: [
        'scenes', '--data_dir', str(i.path), '--upright'], 2,
     "unknown argument '--upright'"),
    ('a report that is damaged', lambda i: [i.put(
        'scenes/1.0.0/prepare_report.json', '{'), [
            'scenes', '--data_dir', str(i.path)]][1], 2,
     'prepare_report.json cannot be read .*remove .*scenes/1.0.0'),
]
PREDICT = [
    ('no such image', lambda i: i.predict('a.png', b'')[:-1] + ['no.png'], 2,
     "no image file 'no.png'"),
    ('an image of floats', lambda i: i.predict('a.tif', image('TIFF', 'F')), 2,
     'a.tif.*floats, of which none is known to be white'),
    ('a HEIC photograph', lambda i: i.predict(
        'a.heic', b'\0\0\0\x18ftypheic\0\0\0\0'), 2,
     "a.heic' is a HEIC .*convert it to JPEG or PNG first"),
    ('a text that is not UTF-8', lambda i: i.predict(
        'a.png', image(), '--task', 'match', '--text', 'caf\udce9'), 2,
     r"text 'caf\\udce9' is not UTF-8"),
]
TABLE = [('prepare', *row) for rows in (COCO, PAIRS, OTHERS) for row in rows]
TABLE += [('predict', *row) for row in PREDICT]


@pytest.mark.parametrize('command, what, make, code, line', TABLE,
                         ids=[f'{row[0]}: {row[1]}' for row in TABLE])
def test_bad_input(command, what, make, code, line, tmp_path, capsys):
  del what
  argv = make(In(pathlib.Path(tmp_path)))
  module = importlib.import_module(f'e2e_vlp_jax.{command}')
  got = 0
  try:
    with errors.exit_on_user_error():
      module.main(argv)
  except SystemExit as e:
    got = e.code
  out, err = capsys.readouterr()
  assert got == code, err[-2000:]
  assert (out + err).encode()  # A report can always be printed.
  said = [x for x in err.splitlines() if x.startswith('error: ')]
  assert len(said) == (code == 2)
  found = said if code == 2 else (out + err).splitlines()
  assert any(re.search(line, x) for x in found), found


def test_the_table_is_long():
  assert len(TABLE) >= 60
