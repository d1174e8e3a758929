"""Five classes of COCO's photographs, as two labelling tools export them."""
import json

import yaml

# With their own ids, not contiguous and not in COCO's order.
CATEGORIES = {'chair': 7, 'person': 3, 'bottle': 40, 'car': 12, 'book': 90}


def chosen(shared):
  """The official content, reduced to these classes and ids."""
  path = shared / 'data' / 'coco' / 'annotations' / 'instances_val2017.json'
  content = json.loads(path.read_text())
  names = {c['id']: c['name'] for c in content['categories']}
  annotations = [
      {**a, 'category_id': CATEGORIES[names[a['category_id']]]}
      for a in content['annotations'] if not a['iscrowd']
      and names[a['category_id']] in CATEGORIES]
  used = {a['image_id'] for a in annotations}
  return {
      'images': [i for i in content['images'] if i['id'] in used],
      'annotations': annotations,
      'categories': [dict(id=k, name=n) for n, k in CATEGORIES.items()]}


def as_coco(shared, folder):
  """One JSON file above the images."""
  content = chosen(shared)
  _images(shared, content, folder / 'images')
  (folder / 'labels.json').write_text(json.dumps(content))


def as_yolo(shared, folder):
  """data.yaml, images/ and labels/, with enough decimals to lose nothing."""
  content = chosen(shared)
  _images(shared, content, folder / 'images')
  (folder / 'labels').mkdir()
  order = {k: i for i, k in enumerate(CATEGORIES.values())}
  for image in content['images']:
    width, height = image['width'], image['height']
    rows = [(order[a['category_id']], *a['bbox']) for a in
            content['annotations'] if a['image_id'] == image['id']]
    name = image['file_name'].replace('.jpg', '.txt')
    (folder / 'labels' / name).write_text(
        '\n'.join(f'{c} {(x + w / 2) / width:.9f} {(y + h / 2) / height:.9f} '
                  f'{w / width:.9f} {h / height:.9f}'
                  for c, x, y, w, h in rows))
  (folder / 'data.yaml').write_text(yaml.safe_dump(
      {'names': list(CATEGORIES), 'nc': len(CATEGORIES)}))


def _images(shared, content, folder):
  folder.mkdir(parents=True)
  for image in content['images']:
    name = image['file_name']
    (folder / name).symlink_to(
        shared / 'data' / 'coco' / 'images' / 'val2017' / name)
