"""Damaged annotation files: one line, or the records that a plain reading has.

500 seeded mutations each of a COCO JSON, of Visual Genome's files, of a tar
shard and of a table; no TFDS files are written.
"""
import io
import json
import random
import tarfile

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import coco
from e2e_vlp_jax.data.datasets import pairs
from e2e_vlp_jax.data.datasets import visual_genome
from tests import mutations
from tests import plain_reading

COUNT = 500
SIZES = {1: (60, 40), 2: (40, 60), 3: (50, 50), 4: (60, 40)}


def png(size, grey):
  out = io.BytesIO()
  Image.new('RGB', size, (grey,) * 3).save(out, 'PNG')
  return out.getvalue()


IMAGES = {i: png(size, 40 * i) for i, size in SIZES.items()}


def generated(builder):
  """The stored records of train, or the line that the user reads.

  Anything but a UserError is a traceback, and fails the test.
  """
  try:
    most, read = builder.sources()['train']
    # pylint: disable-next=protected-access
    found = [e for _, e in builder._generate_examples('train', most, read)]
  except errors.UserError as e:
    said = ' '.join(str(e).split())
    assert said and said.encode('utf-8', 'backslashreplace')
    return None, said
  for e in found:
    texts = [e['image_id'], *e['texts'], *(o['label'] for o in e['objects'])]
    assert all(t == t.encode().decode() for t in texts)
    for o in e['objects']:
      assert np.isfinite(o['bbox']).all() and 0 < o['area'] < 1e6
      assert -2**63 <= o['id'] < 2**63 and isinstance(o['is_crowd'], bool)
  json.dumps(builder.reports)
  return found, None


def run(build, mutate, plain, least):
  """Compares both readings of `COUNT` mutations.

  Args:
    build: function that makes a builder.
    mutate: function of a random.Random that writes the files.
    plain: function that reads them plainly, and one that turns a stored record
      into the same form.
    least: share of the mutations that must give records, so that a reader
      that refuses everything fails.
  """
  read, form = plain
  accepted, lines = 0, set()
  for seed in range(COUNT):
    mutate(random.Random(seed))
    found, said = generated(build())
    if found is None:
      lines.add(said)
      continue
    accepted += 1
    wanted, got = read(), [form(e) for e in found]
    assert len(got) == len(wanted), (seed, got, wanted)
    for a, b in zip(got, wanted):
      assert same(a, b), (seed, a, b)
  print(f'{accepted} of {COUNT} gave records; {len(lines)} lines, such as:',
        *sorted(lines)[::max(1, len(lines) // 8)], sep='\n  ')
  assert accepted >= least * COUNT


def same(a, b):
  if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
    return len(a) == len(b) and all(map(same, a, b))
  if isinstance(a, float) and isinstance(b, float):
    return abs(a - b) < 1e-5
  return a == b


def corners(bbox):
  y0, x0, y1, x1 = map(float, bbox)
  return x0, y0, x1, y1


def test_coco(tmp_path):
  for kind in ('annotations', 'train2017'):
    (tmp_path / kind).mkdir()
  for i, data in IMAGES.items():
    (tmp_path / 'train2017' / f'{i}.png').write_bytes(data)
  images = [dict(id=i, file_name=f'{i}.png', width=w, height=h)
            for i, (w, h) in SIZES.items()]
  labels = [dict(id=0, name='dog'), dict(id=7, name='cat')]
  boxes = [dict(id=k, image_id=1 + k % 4, category_id=7 * (k % 3 > 0),
                bbox=[3 * k, 2, 10.5, 8], area=60., iscrowd=int(k == 4))
           for k in range(8)]
  captions = [dict(id=k, image_id=1 + k % 4, caption=f'caption {k}')
              for k in range(6)]
  paths = [tmp_path / 'annotations' / f'{n}_train2017.json'
           for n in ('instances', 'captions')]

  def mutate(rng):
    contents = [dict(images=images, annotations=boxes, categories=labels),
                dict(images=images, annotations=captions)]
    which = rng.random() < .3
    for k, (path, content) in enumerate(zip(paths, contents)):
      if k == which:
        content = mutations.damaged(content, rng)
        path.write_bytes(mutations.text_of(content, rng))
      else:
        path.write_text(json.dumps(content))

  def form(e):
    return e['image_id'], e['texts'], [
        (corners(o['bbox']), o['label'], o['is_crowd'], o['id'])
        for o in e['objects']]
  sizes = {f'{i}.png': size for i, size in SIZES.items()}
  run(lambda: coco.Builder(data_dir=str(tmp_path / 'x'), source=str(tmp_path)),
      mutate, (lambda: plain_reading.coco(*(p.read_bytes() for p in paths),
                                          sizes), form), .5)


def test_visual_genome(tmp_path, monkeypatch):
  (tmp_path / 'VG_100K').mkdir()
  for i, data in IMAGES.items():
    (tmp_path / 'VG_100K' / f'{i}.jpg').write_bytes(data)
  space = label_space.LabelSpace.load('joint')
  monkeypatch.setattr(label_space.LabelSpace, 'load', lambda _: space)
  known = [{**a, **{n: n for n in names}} for a, names in (
      (space.class_aliases, space.classes),
      (space.attribute_aliases, space.attributes))]
  good = {
      'image_data': [dict(image_id=i, width=w, height=h, coco_id=None)
                     for i, (w, h) in SIZES.items()],
      'objects': [dict(image_id=i, objects=[
          dict(object_id=10 * i + k, names=[('dog', 'cat', 'tree')[k]],
               x=3 * k, y=2, w=20, h=9, merged_object_ids=[90 + k])
          for k in range(3)]) for i in SIZES],
      'attributes': [dict(image_id=i, attributes=[
          dict(object_id=10 * i, attributes=['brown', 'small and wet']),
          dict(object_id=91, attributes=['green'])]) for i in SIZES],
      'region_descriptions': [dict(id=i, regions=[
          dict(region_id=k, phrase=f'phrase {k}', x=1, y=2, width=9, height=8)
          for k in range(2)]) for i in SIZES]}
  content = {}

  def mutate(rng):
    content.clear()
    which = rng.choice(list(good))
    for name, items in good.items():
      content[name] = (mutations.text_of(mutations.damaged(items, rng), rng)
                       if name == which else json.dumps(items).encode())
      (tmp_path / f'{name}.json').write_bytes(content[name])

  def form(e):
    return e['image_id'], e['texts'], [
        (corners(o['bbox']), o['label'],
         o['attributes'].split('|') if o['attributes'] else [])
        for o in e['objects']], len(e['phrases'])
  run(lambda: visual_genome.Builder(data_dir=str(tmp_path / 'x'),
                                    source=str(tmp_path)),
      mutate, (lambda: plain_reading.genome(content, SIZES, known), form), .5)


def test_tar_shard(tmp_path):
  path = tmp_path / '0.tar'

  def mutate(rng):
    members = []
    for k in range(4):
      members.append((f'{k}.png', IMAGES[k + 1]))
      note = mutations.damaged({'caption': f'text {k}', 'url': 'x'}, rng) if (
          rng.random() < .3) else {'caption': f'text {k}'}
      if k % 2:
        members.append((f'{k}.json', mutations.text_of(note, rng)))
      else:
        members.append((f'{k}.txt', f'text {k}'.encode()))
    if rng.random() < .5:
      _damage_members(members, rng)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.USTAR_FORMAT) as f:
      for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        f.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    path.write_bytes(mutations.bytes_damaged(data, rng)
                     if rng.random() < .5 else data)

  form = lambda e: (e['image_id'].rpartition('/')[2], e['texts'])
  run(lambda: pairs.Builder(data_dir=str(tmp_path / 'x'),
                            source=str(tmp_path)),
      mutate, (lambda: plain_reading.shard(path.read_bytes()), form), .6)


def _damage_members(members, rng):
  """One member is lost, repeated, renamed or damaged."""
  k = rng.randrange(len(members))
  name, data = members[k]
  members[k:k + 1] = rng.choice((
      [], [(name, data), (name, b'other')], [(f'x{name}', data)],
      [(name, mutations.bytes_damaged(data, rng))], [(name, b'')],
      [(name.upper(), data)]))


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl'])
def test_table(tmp_path, kind):
  for i, data in IMAGES.items():
    (tmp_path / f'{i}.png').write_bytes(data)
  path = tmp_path / f't.{kind}'
  good = [dict(image=f'{1 + k % 4}.png', text=f'text {k}', more='x')
          for k in range(6)]

  def mutate(rng):
    rows = mutations.damaged(good, rng) if rng.random() < .7 else good
    if kind == 'jsonl':
      lines = [json.dumps(r) for r in rows]
    else:
      mark = {'csv': ',', 'tsv': '\t'}[kind]
      rows = [dict.fromkeys(good[0]), *(r for r in rows
                                        if isinstance(r, dict))]
      lines = [mark.join(rows[0]), *(mark.join(
          _cell(v, kind) for v in r.values()) for r in rows[1:])]
    data = '\n'.join(lines).encode('utf-8', 'replace')
    path.write_bytes(mutations.bytes_damaged(data, rng)
                     if rng.random() < .5 else data)

  form = lambda e: (e['image_id'], e['texts'])
  names = {f'{i}.png' for i in IMAGES}
  run(lambda: pairs.Builder(data_dir=str(tmp_path / 'x'),
                            source=str(tmp_path)), mutate,
      (lambda: plain_reading.table(path.read_bytes(), kind, names), form), .4)


def _cell(value, kind):
  text = str(value)
  if kind == 'csv' and any(c in text for c in ',"\n'):
    return '"' + text.replace('"', '""') + '"'
  return text
