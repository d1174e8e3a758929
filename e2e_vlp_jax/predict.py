"""Images in, JSON and an annotated picture out.

  python -m e2e_vlp_jax.predict --checkpoint W --task detect \
      --image photo.jpg --json out.json --picture out.png

Needs only a checkpoint, which contains its config, tokenizer and labels, and no
TensorFlow. Without --json the JSON goes to standard output. Boxes are x0, y0,
x1, y1 in pixels of the upright image. With several --image the JSON is a list,
and each image gets its own picture: out_0.png, out_1.png, ... A task that takes
two images reads them in pairs: left, right, left, right, ... A text that is
longer than the model reads is named on standard error, and under `cut_texts` in
the JSON: its tokens, how many the model reads, and the part that it reads.

Tasks:
"""
import json
import logging
import os
import sys

from PIL import Image

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.evaluation import pictures
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.tasks import base


def predict(args):
  """Runs the command line; returns the content of the JSON."""
  # Cheap checks come first: loading a checkpoint takes seconds.
  task = base.load(args.task, '--task')
  options = {k: getattr(args, k) for k in _options()
             if getattr(args, k) is not None}
  task.full_options(options)
  groups = task.group_images(args.image)
  task.check_texts(args.text, len(groups), options)
  images = [tuple(map(photographs.decode_image, paths)) for paths in groups]
  outputs = _picture_names(args.picture, len(images))
  for name, path in [('json', args.json), *(('picture', p) for p in outputs)]:
    _check_writable(name, path)

  predictor, variables = predictor_lib.Predictor.from_checkpoint(
      args.checkpoint)
  results = predictor.predict(variables, images, args.task, args.text,
                              **options)
  for cut in {c.text: c for r in results for c in r.cut_texts}.values():
    print(f'warning: --text {_short(cut.text)}: {cut.tokens} tokens, of which '
          f'this model reads {cut.max_text} (data.max_text), to '
          f'{_short(cut.read, end=True)}', file=sys.stderr)
  found = [r.to_json() for r in results]
  if len(found) == 1:
    found, = found
  written = json.dumps(found, indent=1)
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as f:
      f.write(written + '\n')
  else:
    print(written)
  for shown, result, path in zip(images, results, outputs):
    pictures.draw(shown, [result]).save(path)
  return found


def _short(text, end=False):
  """The first or last 60 characters, quoted."""
  if len(text) > 60:
    text = '...' + text[-60:] if end else text[:60] + '...'
  return repr(text)


def _options():
  """{option: [(task, Option)]} of all tasks."""
  found = {}
  for name in base.names():
    for key, option in base.load(name).options.items():
      found.setdefault(key, []).append((name, option))
  return found


def _picture_names(path, count):
  """One file name for each image: 'out.png' -> out_0.png, ... if several."""
  if not path or count == 1:
    return [path] * bool(path)
  stem, end = os.path.splitext(path)
  return [f'{stem}_{i}{end}' for i in range(count)]


def _check_writable(name, path):
  """UserError unless the output file can be opened for writing."""
  if not path:
    return
  known = Image.registered_extensions()
  if name == 'picture' and known.get(
      os.path.splitext(path)[1].lower()) not in Image.SAVE:
    raise errors.UserError(f'--picture {path}: not a picture file; expected a '
                           'name that ends in .png or .jpg')
  files.check_writable(f'--{name}', path)


def _parser():
  """The argument parser; finds the tasks and their options."""
  doc = __doc__ + ''.join(f'  {n:10} {base.load(n).summary}\n'
                          for n in base.names())
  parser = cli.parser(doc)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a WORKDIR, or one step of its checkpoints/; may be '
                      'in a bucket, gs://BUCKET/NAME')
  parser.add_argument('--task', required=True, help=' | '.join(base.names()))
  parser.add_argument('--image', required=True, action='append', metavar='F',
                      help='JPEG, PNG, ...; may be given several times')
  asked = [n for n in base.names() if base.load(n).takes_text]
  parser.add_argument('--text', action='append', metavar='T',
                      help=f'for {", ".join(asked)}; may be given several '
                      'times')
  parser.add_argument('--json', metavar='OUT', help='JSON file to write')
  parser.add_argument('--picture', metavar='OUT',
                      help='picture to write, .png or .jpg')
  for name, uses in _options().items():
    option = uses[0][1]
    parser.add_argument(
        f'--{name}', type=type(option.default),
        help='; '.join(f'{o.help} (for {task}; default {o.default})'
                       for task, o in uses))
  return parser


def main(argv=None):
  with errors.exit_on_user_error():
    args, _ = cli.parse(_parser(), argv)
    # Orbax warns about a file that we do not need to read a single item.
    logging.getLogger('absl').setLevel(logging.ERROR)
    predict(args)


if __name__ == '__main__':
  main()
