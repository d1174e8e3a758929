"""One image in, JSON and an annotated picture out.

  python -m e2e_vlp_jax.predict --checkpoint W --task detect \
      --image photo.jpg --json out.json --picture out.png

Needs a checkpoint alone (it carries its config, tokenizer and labels), and
no TensorFlow. Without --json the JSON goes to the standard output. Boxes are
x0, y0, x1, y1 in pixels of the upright image.
"""
import json
import logging
import os

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import predictor as predictor_lib


def predict(args):
  """Does what the command line asks for; returns the JSON's dict."""
  # What is cheap to find wrong is found first: loading takes seconds.
  if args.task not in predictor_lib.TASK_HEADS:
    raise errors.UserError(
        f'--task: no task {args.task!r}'
        + errors.nearest(args.task, predictor_lib.TASK_HEADS))
  if not 0 <= args.threshold <= 1:
    raise errors.UserError(f'--threshold: {args.threshold} is not in 0..1')
  from e2e_vlp_jax.data import photographs  # pylint: disable=g-import-not-at-top
  image = photographs.decode_image(args.image)
  for name in ('json', 'picture'):
    _check_writable(name, getattr(args, name))

  predictor, variables = predictor_lib.Predictor.from_checkpoint(
      args.checkpoint)
  out = predictor.predict(variables, image, args.task, args.text,
                          threshold=args.threshold, beams=args.beams)
  written = json.dumps(out, indent=1)
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as f:
      f.write(written + '\n')
  else:
    print(written)
  if args.picture:
    from e2e_vlp_jax.evaluation import pictures  # pylint: disable=g-import-not-at-top
    pictures.draw(image, objects=out.get('objects'),
                  caption=out.get('caption', {}).get('text'),
                  matches=out.get('match')).save(args.picture)
  return out


def _check_writable(name, path):
  """UserError unless the output file can be opened for writing."""
  if not path:
    return
  from PIL import Image  # pylint: disable=g-import-not-at-top
  known = Image.registered_extensions()
  if name == 'picture' and known.get(
      os.path.splitext(path)[1].lower()) not in Image.SAVE:
    raise errors.UserError(f'--picture {path}: not a picture\'s name; try '
                           'one that ends in .png or .jpg')
  try:
    with open(path, 'ab'):
      pass
  except OSError as e:
    raise errors.UserError(f'--{name} {path}: cannot be written '
                           f'({e.strerror})') from e


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__)
    parser.add_argument('--checkpoint', required=True, metavar='DIR',
                        help='a WORKDIR, or one step of its checkpoints/')
    parser.add_argument('--task', required=True,
                        help=' | '.join(predictor_lib.TASK_HEADS))
    parser.add_argument('--image', required=True, metavar='F',
                        help='JPEG, PNG, ...')
    parser.add_argument('--text', action='append', metavar='T',
                        help='for match; may be given several times')
    parser.add_argument('--json', metavar='OUT', help='JSON file to write')
    parser.add_argument('--picture', metavar='OUT',
                        help='picture to write, .png or .jpg')
    parser.add_argument('--threshold', type=float, default=.5,
                        help='least score of an object (default 0.5)')
    parser.add_argument('--beams', type=int, default=1,
                        help='width of the caption search (default 1)')
    args, _ = cli.parse(parser, argv)
    # Orbax warns of a file that reading an item alone does not need.
    logging.getLogger('absl').setLevel(logging.ERROR)
    predict(args)


if __name__ == '__main__':
  main()
