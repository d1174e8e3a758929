"""`vqav2`: questions about COCO's photographs, with ten answers each.

  python -m e2e_vlp_jax.prepare vqav2 --source DIR --data_dir data

VQA v2 (Goyal et al., CVPR 2017), https://visualqa.org/download.html. --source
contains the unzipped files
  v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
  v2_mscoco_{train2014,val2014}_annotations.json
(or in a folder vqa/ or annotations/), and COCO's images,
  {train2014,val2014,test2015}/COCO_train2014_000000000009.jpg and so on, or
  {train2017,val2017,test2017}/000000000009.jpg, which have the same ids,
as folders or .zip, or the same under images/. The folders of 2014 and 2015 are
used if they exist.

Splits are train, validation, test and test_dev, which is a part of test and
written only if --splits names it. A record is an image with all its questions;
`kind` is the official answer_type. Test questions have no answers. The official
question_type is not stored, since it follows from the question's first words
(`vqa_answers.question_type`).

Questions whose image is missing or broken are left out; the report counts and
names them, and compares the numbers of questions and answers with the
published ones.
"""
import collections
import functools
import os
import sys

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values

# split: (name of its files, images of 2017 that hold the same ids,
# published questions, published answers).
_SPLITS = {
    'train': ('train2014', ('train2017', 'val2017'), 443_757, 4_437_570),
    'validation': ('val2014', ('train2017', 'val2017'), 214_354, 2_143_540),
    'test': ('test2015', ('test2017',), 447_793, 0),
    'test_dev': ('test-dev2015', ('test2017',), 107_394, 0)}
_DEFAULT = ('train', 'validation', 'test')
_FOLDERS = ('', 'vqa', 'annotations')


class Builder(base.RecordBuilder):
  """Joins questions, answers and images by their ids."""
  name = 'vqav2'
  PHOTOS = 'coco'
  NEEDS_SOURCE = True
  OPTIONS = {
      'splits': ('', 'which of train,validation,test,test_dev; default: the '
                 'first three, if their questions exist'),
      'limit': (0, 'images to keep per split, the first by id; 0 keeps all')}

  def annotation_files(self):
    return [path for split in self._wanted() for path in self._files(split)
            if path]

  def sources(self):
    return {split: self._read(split) for split in self._wanted()}

  def _wanted(self):
    """The splits to write."""
    found = self.named_splits(_SPLITS) or [
        s for s in _DEFAULT if self._find(_questions_of(s))]
    if not found:
      raise errors.UserError(
          f'no {_questions_of("train")} in {self.source!r} and no other '
          'questions of VQA v2; --source should be the folder that contains '
          'them')
    return found

  def _find(self, name):
    """The path of an official file, or None."""
    places = [os.path.join(self.source, f, name) for f in _FOLDERS]
    return next(filter(os.path.isfile, places), None)

  def _files(self, split):
    """(path of the questions, path of the annotations or None for tests)."""
    names = [_questions_of(split)]
    answered = bool(_SPLITS[split][3])
    if answered:
      names.append(f'v2_mscoco_{_SPLITS[split][0]}_annotations.json')
    paths = [self._find(name) for name in names]
    for name, path in zip(names, paths):
      if not path:
        raise errors.UserError(f'{split}: no {name} in {self.source!r}')
    return paths if answered else (*paths, None)

  def _read(self, split):
    """(number of images, function to iterate over the records)."""
    paths = self._files(split)
    questions = _questions(paths[0], split)
    annotations = _annotations(paths[1], split) if paths[1] else None
    by_image = collections.defaultdict(list)
    for question in questions.values():
      by_image[question['image_id']].append(question)
    if not by_image:
      raise errors.UserError(f'{paths[0]}: no questions')
    images, pattern = self._images(split)
    ids = sorted(by_image)
    most = min(self.options['limit'] or len(ids), len(ids))
    self._compare(split, len(questions), sum(
        len(a['answers']) for a in (annotations or {}).values()))
    return most, functools.partial(
        self._records, split, images, pattern, ids, by_image, annotations,
        most)

  def _images(self, split):
    """(the images, the pattern of their names)."""
    name, later, _, _ = _SPLITS[split]
    name = name.replace('-dev', '')
    for folders, pattern in (((name,), f'COCO_{name}_{{:012d}}.jpg'),
                             (later, '{:012d}.jpg')):
      try:
        return image_files.ImageFiles(self.source, [
            *folders, *(f'images/{f}' for f in folders)]), pattern
      except errors.UserError as e:
        error = e
    raise errors.UserError(f'{split}: no {name}/ or {name}.zip, and {error}')

  def _compare(self, split, questions, answers):
    """Prints the files' counts beside the published ones."""
    wanted = _SPLITS[split][2:]
    same = (questions, answers) == wanted
    # On stderr, like the progress bar; stdout is for the report.
    print(f'{self.name} {split}: {questions:,} questions, {answers:,} answers'
          + (', as published' if same else
             '; published: {:,} and {:,}'.format(*wanted)), file=sys.stderr)

  def _records(self, split, images, pattern, ids, by_image, annotations, most):
    report = self.reports[split]
    report.update(questions=0, answers=0)
    if annotations is not None:
      listed = {q['question_id'] for i in ids for q in by_image[i]}
      for i in annotations.keys() - listed:
        self.skip(split, 'answers to a question that is not listed', i)
    written = 0
    names = [pattern.format(i) for i in ids]
    for i, name, stored in zip(ids, names, images.load_all(names)):
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, name)
        for question in by_image[i]:
          self.skip(split, 'question about an image that is left out',
                    question['question_id'])
        continue
      questions = [q for q in (self._question(split, question, annotations)
                               for question in by_image[i]) if q]
      if not questions:
        self.skip(split, 'image: no question left', name, 'images')
        continue
      self.note_image(split, stored)
      yield base.record(image=stored.data, image_id=str(i),
                        height=stored.height, width=stored.width,
                        questions=questions)
      report['questions'] += len(questions)
      report['answers'] += sum(len(q['answers']) for q in questions)
      written += 1
      if written == most:
        return

  def _question(self, split, question, annotations):
    """A question of the record, or None if it is left out and counted."""
    i = question['question_id']
    note = functools.partial(self.note, split)
    text = base.clean(values.text(question['question'], 'question', note))
    if not text:
      return self.skip(split, 'question without words', i)
    if annotations is None:
      return dict(question=text, answers=[], kind='', id=i)
    if i not in annotations:
      return self.skip(split, 'question without answers', i)
    annotation = annotations[i]
    answers = []
    for answer in annotation['answers']:
      if not isinstance(answer, str) and _is_number(answer):
        note('answer that was a number, not text')
        answer = str(answer)
      if not isinstance(answer, str):
        self.skip(split, 'answer that is no text', i)
        continue
      if '|' in answer:  # It separates stored answers.
        note("answer with '|', which became a space")
        answer = answer.replace('|', ' ')
      # As in the official tool, before answers are compared.
      answers.append(values.text(answer, 'answer', note).replace(
          '\n', ' ').replace('\t', ' ').strip())
    if not answers:
      return self.skip(split, 'question without answers', i)
    kind = annotation.get('answer_type', '')
    kind = values.text(kind, 'kind') if isinstance(kind, str) else ''
    return dict(question=text, answers=answers, kind=kind, id=i)


def _is_number(value):
  try:
    values.number(value, 'answer')
  except values.Wrong:
    return False
  return True


def _questions_of(split):
  return f'v2_OpenEnded_mscoco_{_SPLITS[split][0]}_questions.json'


def _questions(path, split):
  """{question_id: question} of an official file, its types checked."""
  return _by_id(path, 'questions', split, {
      'question_id': values.integer, 'image_id': values.integer,
      'question': lambda text, where: values.text(text, where) and text})


def _annotations(path, split):
  """{question_id: annotation}; keeps only the text of each answer.

  Ten answers per question as dicts would take gigabytes.
  """
  def text_of(item):
    return item['answer'] if 'answer' in item and 'answers' not in item else (
        item)
  return _by_id(path, 'annotations', split, {
      'question_id': values.integer, 'answers': _answers}, text_of)


def _answers(value, where):
  if not isinstance(value, list):
    raise values.Wrong(value, where, 'a list')
  return value


def _by_id(path, key, split, fields, hook=None):
  """The list `key` of a JSON file as {question_id: item}.

  Args:
    path: of the file.
    key: of the list.
    split: that the file should hold.
    fields: {key of an item: function of `values` that reads it}.
    hook: json's `object_hook`.

  Raises:
    UserError: unreadable, another kind of file or split, or two different
      items with the same id.
  """
  content = values.load_json(path, hook)
  if not isinstance(content, dict) or not isinstance(content.get(key), list):
    raise errors.UserError(f'{path}: no list {key!r}; is this an official '
                           'file of VQA v2?')
  held, wanted = content.get('data_subtype'), _SPLITS[split][0]
  # test-dev2015 is a part of test2015, and may be called so.
  if (held in {name for name, *_ in _SPLITS.values()}
      and held.replace('-dev', '') != wanted.replace('-dev', '')):
    raise errors.UserError(f'{path}: it holds {held} (data_subtype), and not '
                           f'{wanted}')
  items = values.objects(content[key], f'{path}: {key}')
  for k, item in enumerate(items):
    for name, read in fields.items():
      item[name] = read(item.get(name), f'{path}: {key}[{k}].{name}')
  return values.unique(items, 'question_id', f'{path}: {key}', values.integer)
