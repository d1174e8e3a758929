"""Captions with boxes: prepare, records, the op `grounding`, the page."""
import json

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import tokenizer as tokenizer_lib
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets.scenes import builder as scenes
from e2e_vlp_jax.data.datasets.scenes import facts
from e2e_vlp_jax.errors import UserError
from e2e_vlp_jax.evaluation import phrase_rows
from e2e_vlp_jax.tasks import base as tasks_base

WIDTH, HEIGHT = 80, 40
ROBERTA = tokenizer_lib.load_tokenizer('bpe', 'roberta-base')


def run(*args):
  prepare.main([str(a) for a in args])


def image(path, size=(WIDTH, HEIGHT)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (90, 120, 40)).save(path)


def read(folder, name, split='train'):
  split = records.open_split(str(folder), name, split)
  return [split.get(i) for i in range(len(split))]


def report(folder, name):
  path = records.dataset_folder(str(folder), name)
  with open(f'{path}/{records.REPORT}', encoding='utf-8') as f:
    return json.load(f)


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = isinstance(content, list) and path.suffix == '.jsonl'
  path.write_text('\n'.join(map(json.dumps, content)) if lines
                  else json.dumps(content))


def mdetr(captions):
  """MDETR's JSON of [(file name, caption, [(bbox, tokens_positive)])]."""
  out = dict(images=[], annotations=[], categories=[{'id': 1, 'name': 'x'}])
  for k, (name, caption, boxes) in enumerate(captions):
    out['images'].append(dict(id=k, file_name=name, height=HEIGHT, width=WIDTH,
                              caption=caption, original_img_id=name[0]))
    out['annotations'] += [dict(
        id=len(out['annotations']) + n, image_id=k, bbox=bbox, area=1,
        iscrowd=0, category_id=1, tokens_positive=words)
                           for n, (bbox, words) in enumerate(boxes)]
  return out


DOG, CAT = [8, 4, 24, 20], [40, 8, 32, 24]
CAPTIONS = [('a.png', 'A dog  and a cat', [(DOG, [[0, 5]]),
                                           (CAT, [[11, 16]])]),
            ('b.png', 'two dogs', [(DOG, [[0, 8]]), (CAT, [[0, 8]])]),
            ('a.png', 'the pets ', [(DOG, [[0, 8]])])]


@pytest.fixture
def source(tmp_path):
  for name in ('a', 'b'):
    image(tmp_path / 'source' / 'images' / 'deep' / f'{name}.png')
  return tmp_path / 'source'


# --- prepare grounding ------------------------------------------------------
def test_mdetr_json(source, tmp_path, capsys):
  write(source / 'final_flickr_train.json', mdetr(CAPTIONS))
  run('grounding', '--source', source, '--data_dir', tmp_path, '--name', 'g',
      '--show', 2)
  a, b = read(tmp_path, 'g')
  assert (a['image_id'], b['image_id']) == ('a', 'b')  # no image twice
  assert a['texts'] == ['A dog and a cat', 'the pets']
  assert [(p['text_number'], p['text'], p['spans']) for p in a['phrases']] == [
      (0, 'A dog', [(0, 5)]), (0, 'a cat', [(10, 15)]),
      (1, 'the pets', [(0, 8)])]
  np.testing.assert_allclose(a['phrases'][1]['bbox'], [.2, .5, .8, .9])
  assert len(b['phrases']) == 2 and b['phrases'][0]['spans'] == [(0, 8)]
  assert '5 phrases with boxes' in capsys.readouterr().out
  assert (tmp_path / 'g' / '1.0.0' / 'records.png').exists()


def lines(captions):
  """The same as ODVG; `tokens_positive` is left out."""
  corners = lambda x, y, w, h: [x, y, x + w, y + h]
  return [dict(filename=name, height=HEIGHT, width=WIDTH, grounding=dict(
      caption=caption, regions=[
          dict(bbox=corners(*bbox), phrase=' '.join(
              caption[a:b] for a, b in words)) for bbox, words in boxes]))
          for name, caption, boxes in captions]


def test_odvg_is_the_same(source, tmp_path):
  """Phrases are looked for in the captions."""
  write(source / 'm.json', mdetr(CAPTIONS))
  write(source / 'o.jsonl', lines(CAPTIONS))
  for name in ('m.json', 'o.jsonl'):
    run('grounding', '--source', source, '--data_dir', tmp_path, '--name',
        name[0], '--annotations', name)
  for one, other in zip(read(tmp_path, 'm'), read(tmp_path, 'o')):
    assert one['texts'] == other['texts']
    for p, q in zip(one['phrases'], other['phrases'], strict=True):
      np.testing.assert_array_equal(p.pop('bbox'), q.pop('bbox'))
      assert p == q


def test_odvg_detection_and_its_label_map(source, tmp_path):
  boxes = [dict(bbox=[8, 4, 32, 24], label=2, category='cat')]
  write(source / 'd.jsonl', [dict(filename='a.png', height=HEIGHT, width=WIDTH,
                                  detection=dict(instances=boxes))])
  write(source / 'map.json', {'0': 'dog', '2': 'cat'})
  options = ('grounding', '--source', source, '--data_dir', tmp_path,
             '--annotations', 'd.jsonl')
  run(*options, '--label_map', 'map.json')
  (found,), = (r['objects'] for r in read(tmp_path, 'grounding'))
  assert found['label'] == 'cat'
  assert records.label_space(str(tmp_path), 'grounding').classes == [
      'dog', 'cat']
  write(source / 'map.json', {'0': 'dog', '2': 'mouse'})
  with pytest.raises(UserError, match="label 2 is 'mouse' in the label map, "
                     "but its category is 'cat'; .* 80 and of 91"):
    run(*options, '--label_map', 'map.json', '--name', 'other')


def test_what_cannot_be_used_is_counted(source, tmp_path):
  """A phrase that is not in its caption, characters outside, no words."""
  captions = [('a.png', 'A dog', [
      (DOG, [[0, 5]]), (DOG, [[0, 9]]), (DOG, [[3, 2]]), (DOG, []),
      (DOG, [[0, 4], [2, 5]]), ([0, 0, 0, 5], [[0, 5]]), (DOG, 'words')]),
              ('b.png', '  ', [(DOG, [[0, 1]])]),
              ('b.png', 'fine', [(CAT, [[0, 4]])])]
  write(source / 'm.json', mdetr(captions))
  write(source / 'o.jsonl', [dict(
      filename='b.png', height=HEIGHT, width=WIDTH, grounding=dict(
          caption='a dog', regions=[dict(bbox=[0, 0, 9, 9], phrase='a mouse'),
                                    dict(bbox=[0, 0, 9, 9], phrase='dog')]))])
  run('grounding', '--source', source, '--data_dir', tmp_path)
  found = report(tmp_path, 'grounding')['splits']['train']
  assert {k: v['count'] for k, v in found['skipped'].items()} == {
      'phrase: its characters lie outside its caption': 2,
      'phrase: no words of its caption': 1,
      'phrase: its characters are not pairs of numbers': 1,
      'box: no area': 1, 'phrase: its characters are spaces': 1,
      'empty caption': 1, 'phrase: not in its caption': 1}
  assert found['changed'] == {'spans of one phrase that overlap, joined': 1}
  a, b = read(tmp_path, 'grounding')
  assert [p['spans'] for p in a['phrases']] == [[(0, 5)], [(0, 5)]]
  assert b['texts'] == ['fine', 'a dog']
  assert [(p['text_number'], p['text']) for p in b['phrases']] == [
      (0, 'fine'), (1, 'dog')]


@pytest.mark.parametrize('name, content, words', [
    ('x.json', dict(images=[dict(id=1, file_name='a.png')], annotations=[]),
     "is not MDETR's JSON: it has no images with a caption"),
    ('x.json', dict(images=[dict(id=1, file_name='a.png', caption='a')],
                    annotations=[dict(image_id=2, bbox=DOG)]),
     r'annotations\[0\].image_id is 2, which no entry of images has'),
    ('x.jsonl', [dict(height=3)], "x.jsonl:1 has no 'filename'"),
    ('x.jsonl', [dict(filename='a.png')], "neither 'grounding' nor"),
    ('x.jsonl', [dict(filename='a.png', detection=dict(
        instances=[dict(bbox=DOG, label=3)]))], '--label_map')])
def test_bad_files(source, tmp_path, name, content, words):
  write(source / name, content)
  with pytest.raises(UserError, match=words):
    run('grounding', '--source', source, '--data_dir', tmp_path)


# --- Flickr30k Entities -----------------------------------------------------
XML = ('<annotation><size><width>80</width><height>40</height></size>'
       '<object><name>7</name><name>8</name><bndbox><xmin>9</xmin>'
       '<ymin>5</ymin><xmax>33</xmax><ymax>25</ymax></bndbox></object>'
       '<object><name>9</name><nobox>1</nobox></object></annotation>')


def test_flickr30k_entities(tmp_path, capsys):
  source = tmp_path / 'source'
  image(source / 'flickr30k-images' / '1.jpg')
  for folder, name, text in (
      ('Annotations', '1.xml', XML), ('', 'val.txt', '1\n'),
      ('Sentences', '1.txt', '[/EN#7/people/other A man] in [/EN#9/scene a '
       'park] .\n[/EN#8/people Someone] .\n')):
    (source / folder).mkdir(parents=True, exist_ok=True)
    (source / folder / name).write_text(text)
  run('flickr30k_entities', '--source', source, '--data_dir', tmp_path)
  assert '1 images; published: 1,000' in capsys.readouterr().err
  record, = read(tmp_path, 'flickr30k_entities', 'validation')
  assert record['texts'] == ['A man in a park .', 'Someone .']
  assert [(p['text_number'], p['spans'], p['id'], p['kind'])
          for p in record['phrases']] == [
              (0, [(0, 5)], 7, 'people/other'), (1, [(0, 7)], 8, 'people')]
  np.testing.assert_allclose(record['phrases'][0]['bbox'], [.1, .1, .6, .4])
  changed = report(tmp_path, 'flickr30k_entities')['splits']['validation']
  assert changed['changed'] == {'phrase without a box, left out': 1}
  (source / 'Annotations' / '1.xml').write_text('<annotation>')
  with pytest.raises(UserError, match='1.xml is no readable XML file'):
    run('flickr30k_entities', '--source', source, '--data_dir',
        tmp_path / 'again')


# --- LVIS, and COCO's two numberings ----------------------------------------
def test_lvis(tmp_path, monkeypatch):
  from e2e_vlp_jax.data.datasets import lvis  # pylint: disable=g-import-not-at-top
  monkeypatch.setattr(lvis.Builder, 'NUM_CLASSES', 2)
  source = tmp_path / 'source'
  image(source / 'val2017' / '000000000001.png')
  content = dict(
      images=[dict(id=1, height=HEIGHT, width=WIDTH, neg_category_ids=[2],
                   not_exhaustive_category_ids=[1],
                   coco_url='http://x/val2017/000000000001.png')],
      categories=[dict(id=1, name='dog', frequency='f'),
                  dict(id=2, name='cat_(pet)', frequency='r')],
      annotations=[dict(id=5, image_id=1, category_id=1, bbox=DOG, area=9)])
  write(source / 'lvis_v1_minival.json', content)
  run('lvis', '--source', source, '--data_dir', tmp_path)
  record, = read(tmp_path, 'lvis', 'minival')
  assert [o['label'] for o in record['objects']] == ['dog']
  assert records.side_file(str(tmp_path), 'lvis', records.FEDERATED) == {
      'frequency': {'dog': 'f', 'cat_(pet)': 'r'},
      'images': {'1': {'absent': ['cat_(pet)'], 'incomplete': ['dog']}}}
  monkeypatch.setattr(lvis.Builder, 'NUM_CLASSES', 1203)
  with pytest.raises(UserError, match='has 2 categories; expected the 1203'):
    run('lvis', '--source', source, '--data_dir', tmp_path / 'again')


@pytest.mark.parametrize('ids, used, words', [
    (range(1, 81), 90, 'ids 1 to 80; are the boxes numbered 1 to 90'),
    (None, 12, 'ids 1 to 90; are the boxes numbered without gaps')])
def test_80_and_91_categories_mixed_up(tmp_path, ids, used, words):
  classes = label_space.LabelSpace.load('coco').classes
  if ids is None:
    whole = label_space.LabelSpace.load('coco91').classes
    ids = [whole.index(c) for c in classes]
  image(tmp_path / 's' / 'val2017' / '1.png')
  write(tmp_path / 's' / 'annotations' / 'instances_val2017.json', dict(
      images=[dict(id=1, file_name='1.png', height=HEIGHT, width=WIDTH)],
      categories=[dict(id=i, name=c) for i, c in zip(ids, classes)],
      annotations=[dict(id=k, image_id=1, category_id=i, bbox=DOG)
                   for k, i in enumerate((1, used))]))
  with pytest.raises(UserError, match=words):
    run('coco', '--source', tmp_path / 's', '--data_dir', tmp_path)


# --- Scenes -----------------------------------------------------------------
def test_grounded_scenes():
  """Every mention has the objects that make its caption true, and no record
  is otherwise changed."""
  for split in ('train', 'unseen'):
    for i in range(30):
      plain = scenes.example(0, split, i)
      found = scenes.example(0, split, i, grounded=True)
      more = found['phrases'][len(plain['phrases']):]
      found['phrases'] = found['phrases'][:len(plain['phrases'])]
      assert base.canonical(found) == base.canonical(plain)
      scene = json.loads(plain['scene_json'])
      boxes = {tuple(base.stored_box(o['box'], 96, 96).tolist()): o
               for o in scene['objects']}
      for p in more:
        text = plain['texts'][p['text_number']]
        (first, end), = p['spans']
        assert text[first:end] == p['text']
        words = p['text'].split()[1:]
        o = boxes[tuple(p['bbox'].tolist())]
        shape = o['shape'] if p['text'][0] == 'a' else facts.PLURALS[o['shape']]
        assert set(words) <= {o['size'], o['texture'], o['colour'], shape}
      mentions = sum(t.count(' and ') for t in plain['texts'])
      assert len({(p['text_number'], *p['spans']) for p in more}) >= mentions


def test_an_ambiguous_mention_means_all_that_fit():
  scene = json.loads(scenes.example(0, 'validation', 0)['scene_json'])
  # Two cyan stars, one large and striped.
  _, (one, other) = facts.meant('a cyan star and a cyan star', scene)
  assert len(one) == len(other) == 2
  _, (one, other) = facts.meant('a large cyan star and a cyan star', scene)
  assert len(one) == len(other) == 1 and one != other
  assert facts.meant('a red star', scene) == ([], [])


# --- The op -----------------------------------------------------------------
def made(record, unit='text', train=True, length=64, seed=3, args='',
         string='decode|fit|grounding({})'):
  """The batch keys that the op makes of a record."""
  context = pp.Context(ROBERTA, label_space.LabelSpace.load('coco'), train, 1,
                       length, 4, 2, unit)
  return pp.build(string.format(args), context)({
      **record, 'item': 0, 'bucket': (32, 64), 'seed': seed,
      'partner_texts': (), 'has_boxes': bool(record['objects'])})


def words(row):
  return [ROBERTA.decode(row['text'][0][m])
          for m in row['span_mask'][row['box_mask']]]


def caption(*phrases, text='a dog and a cat'):
  return base.record(image=b'', image_id='1', height=HEIGHT, width=WIDTH,
                     texts=[text, 'other'], phrases=[
                         dict(bbox=base.stored_box(box), text='', spans=spans,
                              text_number=number, id=-1, kind='')
                         for box, spans, number in phrases])


def test_boxes_and_their_words():
  row = made(caption(((.1, .1, .4, .6), [(0, 5)], 0),
                     ((.5, .2, .9, .8), [(0, 5), (10, 15)], 0),
                     ((.5, .2, .9, .8), [(0, 5)], 1)))
  assert ROBERTA.decode(row['text'][0]) == 'a dog and a cat'
  assert words(row) == ['a dog', 'a dog a cat']
  np.testing.assert_allclose(row['boxes'][:2], [[.25, .35, .3, .5],
                                                [.7, .5, .4, .6]], atol=1e-6)
  assert row['lost_boxes'] == 0 and row['task_mask/grounding']
  assert not row['span_mask'][2:].any() and not row['boxes'][2:].any()


def test_boxes_that_agree_are_one():
  record = caption(((.1, .1, .5, .5), [(0, 5)], 0),
                   ((.1, .1, .5, .502), [(10, 15)], 0))
  assert words(made(record)) == ['a dog a cat']
  assert words(made(record, args='merge=0')) == ['a dog', 'a cat']


def test_words_that_are_cut_off_lose_their_boxes(caplog):
  text = 'a dog ' * 30 + 'and a cat'
  row = made(caption(((.1, .1, .5, .5), [(0, 5)], 0),
                     ((.1, .1, .9, .9), [(len(text) - 5, len(text))], 0),
                     text=text), length=16)
  assert words(row) == ['a dog'] and row['lost_boxes'] == 1
  assert 'no word within data.max_text=16' in caplog.text


def objects(*labels, **more):
  return base.record(
      image=b'', image_id='1', height=HEIGHT, width=WIDTH, objects=[
          dict(bbox=base.stored_box((.1 * k, .1, .1 * k + .3, .9)), label=label,
               attributes=[], is_crowd=False, area=1., id=k)
          for k, label in enumerate(labels)], **more)


def test_class_names_as_a_caption():
  record = objects('dog', 'traffic light', 'dog')
  rows = [made(record, 'image', seed=s, length=256) for s in range(6)]
  for row in rows:
    assert words(row) == ['dog', 'traffic light', 'dog']
  texts = [ROBERTA.decode(row['text'][0]) for row in rows]
  assert len(set(texts)) == 6  # shuffled, with other negatives
  again = made(record, 'image', seed=0, length=256)
  assert ROBERTA.decode(again['text'][0]) == texts[0]
  none = made(record, 'image', args='negatives=0')
  assert sorted(ROBERTA.decode(none['text'][0]).split('. ')) == [
      'dog', 'traffic light']
  every = made(record, 'image', args='negatives=-1', length=256)
  assert len(ROBERTA.decode(every['text'][0]).split('. ')) == 80
  # In evaluation all that fit, in the order of the label space.
  assert ROBERTA.decode(made(record, 'image', train=False, length=256)
                        ['text'][0]).startswith('person. bicycle. car. ')


def test_classes_that_do_not_fit_lose_their_boxes():
  row = made(objects('traffic light', 'fire hydrant', 'parking meter'), 'image',
             length=10)
  assert row['lost_boxes'] == 2 and len(words(row)) == 1


def test_a_crowd_is_no_box():
  record = objects('dog', 'cat')
  record['objects'][0]['is_crowd'] = True
  assert words(made(record, 'image')) == ['cat']


def test_an_image_has_captions_and_classes():
  record = objects('dog', texts=['a dog'], phrases=[dict(
      bbox=base.stored_box((.1, .1, .4, .9)), text='a dog', text_number=0,
      spans=[(0, 5)], id=-1, kind='')])
  shown = [ROBERTA.decode(made(record, 'image', seed=s,
                               args='class_share=.5, negatives=0')['text'][0])
           for s in range(40)]
  assert 5 < shown.count('a dog') < 35 and set(shown) == {'a dog', 'dog'}
  assert words(made(record, 'image')) == ['a dog']


def test_an_expression():
  item = dict(text='the dog on the left', spans=[(4, 7)], id=-1,
              bbox=base.stored_box((.1, .1, .4, .9)))
  record = base.record(image=b'', image_id='1', height=HEIGHT, width=WIDTH,
                       refexps=[item], texts=[item['text']])
  assert words(made(record, 'refexp')) == ['dog']
  item['spans'] = []
  assert words(made(record, 'refexp')) == ['the dog on the left']
  # Every pipeline tries its ops on this; no box is lost.
  assert made(records.nothing(), 'refexp')['lost_boxes'] == 0


def test_mirrored_images():
  """Only where left and right are swapped in the text; spans move along."""
  text = 'the left dog and a right paw'
  record = caption(((.1, .1, .4, .6), [(0, 12)], 0),
                   ((.7, .2, .9, .8), [(17, 28)], 0), text=text)
  string = 'decode|flip(p=1., swap_words={})|fit|grounding'
  row = made(record, string=string.format(True))
  assert ROBERTA.decode(row['text'][0]) == 'the right dog and a left paw'
  assert words(row) == ['the right dog', 'a left paw']
  np.testing.assert_allclose(row['boxes'][0], [.75, .35, .3, .5], atol=1e-6)
  row = made(record, string=string.format(False))
  assert words(row) == ['the left dog', 'a right paw']
  np.testing.assert_allclose(row['boxes'][0], [.25, .35, .3, .5], atol=1e-6)


def test_an_image_without_anything_is_masked():
  row = made(objects(), 'image')
  assert not row['task_mask/grounding'] and not row['text_mask'].any()
  # A caption whose phrases have no boxes is trained to find nothing.
  row = made(caption(), 'text')
  assert row['task_mask/grounding'] and not row['box_mask'].any()


def test_refusals():
  with pytest.raises(UserError, match="grounding needs data.unit to be one of"):
    made(caption(), 'question')
  with pytest.raises(UserError, match='decode must stand before grounding'):
    context = pp.Context(ROBERTA, label_space.LabelSpace.load('coco'), True, 1,
                         8, 4, 2, 'text')
    pp.build('grounding', context)({**caption(), 'item': 0, 'seed': 0})


def test_batches_are_a_function_of_seed_and_step(tmp_path):
  run('scenes', '--grounded', '--data_dir', tmp_path, '--num_train', 12,
      '--num_validation', 0, '--num_test', 0, '--num_unseen', 0)
  words_ = vocabularies.Vocabularies(
      tokenizer_lib.load_tokenizer('wordpiece', 'scenes'),
      label_space.LabelSpace.load('scenes'))
  open_ = lambda: pipeline_lib.Pipeline(
      dict(dir=str(tmp_path), buckets=((32, 32),), sentences=1, max_text=32,
           max_boxes=6, max_attributes=2, threads=1), vocabularies=words_,
      sources=[dict(name='scenes', split='train')], seed=5, batch_size=4,
      pp='decode|fit|grounding(class_share=.3)', train=True)
  one, other = open_(), open_()
  other.batch(0)
  for t in (3, 1):
    a, b = one.batch(t), other.batch(t)
    for key, value in a.items():
      np.testing.assert_array_equal(value, b[key], key)
    assert a['span_mask'].shape == (4, 6, 32) and a['box_mask'].any(1).all()
    assert (a['span_mask'].any(-1) == a['box_mask']).all()
    # No special token and no padding names a box.
    assert not (a['span_mask'] & ~a['text_mask']).any()
    assert not a['span_mask'][..., 0].any()


# --- The page ---------------------------------------------------------------
def test_words_in_the_colours_of_their_boxes():
  ink = tasks_base.INK
  assert phrase_rows.marked('a dog and a cat', [(0, 5, 'r'), (10, 15, 'b')]
                            ) == [('a dog', 'r'), ('and', ink), ('a cat', 'b')]
  # The shorter one of two that overlap; nothing is lost at the ends.
  assert phrase_rows.marked('a red dog', [(0, 9, 'r'), (2, 5, 'b')]) == [
      ('a', 'r'), ('red', 'b'), ('dog', 'r')]
  record = {**caption(((.1, .1, .4, .6), [(0, 5)], 0),
                      ((.5, .2, .9, .8), [(0, 5)], 0),
                      ((.5, .3, .9, .8), [(10, 15)], 0)),
            'refexps': [dict(text='the dog', spans=[], id=-1,
                             bbox=base.stored_box((.1, .1, .4, .6)))]}
  boxes, rows, said = phrase_rows.of_record(record)
  first, second, third = (b.colour for b in boxes)
  assert first == second != third
  assert [c for _, c in rows[0][1:]] == [first, ink, third]
  assert said[0][1] == ('the dog', first)


# --- Few images of own classes (ODinW) --------------------------------------
def test_shots(tmp_path):
  """Images in their order, each with a class that still lacks some."""
  source, boxes = tmp_path / 'source', []
  labels = [[0], [0], [0, 1], [1], [0], [2], []]
  for k, some in enumerate(labels):
    image(source / 'train' / f'{k}.png')
    boxes += [dict(image_id=k, category_id=c, bbox=DOG) for c in some]
  write(source / 'train' / '_annotations.coco.json', dict(
      images=[dict(id=k, file_name=f'{k}.png', height=HEIGHT, width=WIDTH)
              for k in range(len(labels))],
      categories=[dict(id=k, name=c) for k, c in enumerate('abc')],
      annotations=[dict(id=n, **a) for n, a in enumerate(boxes)]))
  for shots, wanted in ((0, '0123456'), (1, '025'), (2, '01235')):
    run('own', '--source', source, '--data_dir', tmp_path, '--name',
        f'shots{shots}', '--shots', shots, '--validation_share', 0)
    assert ''.join(r['image_id'] for r in read(tmp_path, f'shots{shots}')
                   ) == wanted
