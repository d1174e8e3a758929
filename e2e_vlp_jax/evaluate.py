"""Runs a config's evaluators on a checkpoint; writes WORKDIR/eval.json.

  python -m e2e_vlp_jax.evaluate --config configs/e2e_vlp.py:tiny \
      --checkpoint W --workdir W
"""
import logging
import os

import jax

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import workdir as workdir_lib
from e2e_vlp_jax.training import sharding


def evaluate(config, path, workdir):
  """Returns {'eval/<evaluator>/<metric>': value}."""
  params, model_state, meta = checkpoint.load(path)
  from e2e_vlp_jax import evaluation  # pylint: disable=g-import-not-at-top
  # The checkpoint's own vocabularies: the parameters belong to them.
  vocabularies = vocabularies_lib.Vocabularies.from_dict(meta)
  model = models.build(config, **vocabularies.sizes)
  models.check_variables(
      model, config, {'params': params, **model_state}, path,
      workdir_lib.differences(meta['config']['model'],
                              workdir_lib.to_dict(config.model)))
  mesh = sharding.make_mesh(config.mesh)
  evaluators = evaluation.Evaluators(config, model, vocabularies, mesh)
  # An unwritable folder is found before the minutes are spent.
  evaluation.check_writable(workdir)
  scores, pictures = evaluators.run({'params': params, **model_state},
                                    bar=jax.process_index() == 0)
  evaluation.write(workdir, meta['step'], scores, pictures)
  width = max(map(len, scores), default=0)
  for name, value in scores.items():
    print(f'{name:{width}}  {value:.4f}')
  print(f'written: {os.path.join(workdir, "eval.json")}, '
        f'{os.path.join(workdir, "report.html")}')
  return scores


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required', workdir=True)
    parser.add_argument('--checkpoint', required=True, metavar='DIR',
                        help='a WORKDIR, or one step of its checkpoints/')
    args, config = cli.parse(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    evaluate(config, args.checkpoint, args.workdir)


if __name__ == '__main__':
  main()
