"""Measures how fast a config trains on this machine and where time goes.

  python -m e2e_vlp_jax.benchmark --config configs/e2e_vlp.py:detr \\
      --batch-size 2 --steps 10 --peer hf_detr

Times the train step that `train` would run, on one random batch, without
TensorFlow and without data; `--data` also reads the config's own data. `--peer`
also times another library's step on the same batch, in turns with ours, and
`--score` the scoring of image-text pairs. A peer that does not train is timed
in turns with our inference. `--input` measures the input pipeline instead.
docs/pods.md explains the figures.
"""
import json
import os

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import peers
from e2e_vlp_jax.benchmarks import inference
from e2e_vlp_jax.benchmarks import peer as peer_lib
from e2e_vlp_jax.benchmarks import tables
from e2e_vlp_jax.benchmarks import train_step
from e2e_vlp_jax.training import allocator
from e2e_vlp_jax.training import compiler


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='instead of config.batch_size')
    parser.add_argument('--peer', metavar='NAME',
                        help='in turns with: ' + ', '.join(peers.names()))
    parser.add_argument('--peer-timeout', type=float, default=peer_lib.TIMEOUT,
                        metavar='S', help='give the peer up if it does not '
                                          'answer in S seconds')
    parser.add_argument('--data', action='store_true',
                        help="also on the config's own data")
    parser.add_argument('--input', action='store_true',
                        help='the input pipeline alone, against plain '
                             'decoding of the same files')
    parser.add_argument('--score', action='store_true',
                        help='also the scoring of image-text pairs')
    parser.add_argument('--deterministic', action='store_true',
                        help='on a GPU: the same bits in every run')
    parser.add_argument('--json', metavar='OUT', help='write the figures')
    args, config = cli.parse(parser, argv)
    if args.steps < 1:
      raise errors.UserError(f'--steps: {args.steps}; expected 1 or more')
    if not args.peer_timeout > 0:
      raise errors.UserError(f'--peer-timeout: {args.peer_timeout:g}; expected '
                             'seconds, more than 0')
    if args.batch_size is not None:
      config.batch_size = args.batch_size
    if args.json:
      files.check_writable('--json', args.json)
    if args.peer and (args.data or args.score) and (
        peers.load(args.peer).task):
      raise errors.UserError(
          f'--peer {args.peer}: times the inference of the task '
          f'{peers.load(args.peer).task!r}, hence without --data and --score')
    if args.peer:  # Leave it GPU memory; jax reads this at first use.
      os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    compiler.set_flags(args.deterministic)
    compiler.use_cache()
    if args.input:
      from e2e_vlp_jax.benchmarks import input_pipeline  # pylint: disable=g-import-not-at-top
      report = input_pipeline.measure(config)
      print(tables.input_pipeline(report))
    elif args.peer and peers.load(args.peer).task:
      report = inference.measure(config, args.peer, args.steps,
                                 args.peer_timeout)
      print(tables.inference(report))
    else:
      report = train_step.measure(
          config, args.steps, args.peer, args.data, args.score,
          peer_timeout=args.peer_timeout)
      print(tables.train_step(report))
    if args.json:
      with open(args.json, 'w') as f:
        json.dump(report, f, indent=1)


if __name__ == '__main__':
  allocator.keep_freed_memory()
  main()
