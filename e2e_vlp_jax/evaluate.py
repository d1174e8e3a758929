"""Runs evaluators on a checkpoint; writes WORKDIR/eval.json and report.html.

  python -m e2e_vlp_jax.evaluate --checkpoint W --workdir W
  python -m e2e_vlp_jax.evaluate --checkpoint W --workdir E \
      --tasks detection,caption --limit 200
  python -m e2e_vlp_jax.evaluate --config configs/e2e_vlp.py:tiny \
      --checkpoint W --workdir E

  python -m e2e_vlp_jax.evaluate --checkpoint W --workdir E --split test

The evaluators are those of --config, or else of the checkpoint's own config.
--tasks selects some of them, by the names or types of evaluators or by names of
tasks (`python -m e2e_vlp_jax.predict --help` lists those). A task that the
config does not evaluate is evaluated on its held-out split of the dataset that
the model was trained on, or else of the task's default dataset. --split takes
another split of the same datasets.
"""
import logging
import os

import jax
import ml_collections

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import evaluators as evaluators_lib
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.evaluation import variables as variables_lib
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.storage import staging
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import allocator
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import workdir as workdir_lib


def evaluate(config, path, workdir, tasks=None, limit=None, data_dir=None,
             split=None):
  """Returns {'eval/<evaluator>/<metric>': value}.

  Args:
    config: whole config, or None: the checkpoint's own.
    path: of the checkpoint; it and `workdir` may be in a bucket.
    workdir: gets the results.
    tasks: names of evaluators or of tasks to evaluate; None = all.
    limit: maximum number of examples of each evaluator; None = the config's.
    data_dir: folder of the prepared data; None = `config.data.dir`.
    split: of the evaluators' datasets; None = the config's.
  """
  params, model_state, meta = checkpoint.load(path)
  stored = meta['config']
  if config is None:
    config = ml_collections.ConfigDict(stored)
    # The run's mesh need not fit the devices here.
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.data.dir = data_dir or config.data.dir
  paths.check_local('data.dir', config.data.dir)
  if not os.path.isdir(config.data.dir):
    raise errors.UserError(
        f'data.dir: no folder {config.data.dir!r}; name the folder of the '
        'prepared data with --data_dir DIR')
  added = select(config, tasks, limit)
  if split:
    for options in (*config.evals.values(), config.samples):
      options.source = dict(options.source, split=split)
  # The parameters belong to the checkpoint's own vocabularies.
  vocabularies = vocabularies_lib.Vocabularies.from_dict(meta)
  model = models.build(config, **vocabularies.sizes)
  # A head that is not there is more to the point than data that are not there.
  predictor = predictor_lib.Predictor(model, config, vocabularies, path=path)
  for name in added:
    predictor.task(name)
  variables = {'params': params, **model_state}
  variables_lib.check(
      model, config, vocabularies.sizes, variables, path,
      workdir_lib.differences(stored['model'],
                              workdir_lib.to_dict(config.model)),
      objectives.requests(objectives.build(ml_collections.ConfigDict(stored))))
  evaluators = evaluators_lib.Evaluators(config, model, vocabularies,
                                         sharding.make_mesh(config.mesh), path)
  with staging.opened(workdir) as folder:
    # Check now, since an evaluation takes minutes.
    staging.check_folder('--workdir', folder)
    details = {}
    scores, pictures = evaluators.run(variables, bar=jax.process_index() == 0,
                                      details=details)
    evaluators_lib.write(folder, meta['step'], scores, pictures, details)
  width = max(map(len, scores), default=0)
  for name, value in scores.items():
    print(f'{name:{width}}  {value:.4f}')
  print(f'written: {os.path.join(workdir, "eval.json")}, '
        f'{os.path.join(workdir, "report.html")}')
  return scores


def select(config, tasks=None, limit=None):
  """Keeps only the requested evaluators in `config.evals`.

  Adds those of requested tasks that have none there.

  Args:
    config: whole config; changed in place.
    tasks: names of evaluators, of their types, or of tasks; None = all.
    limit: maximum number of examples of each evaluator, and of pictures.

  Returns:
    names of the tasks whose evaluators were added.

  Raises:
    UserError: a name that is none of these, or that selects nothing here.
  """
  if limit is not None and limit < 1:
    raise errors.UserError(f'--limit: {limit}; expected at least 1')
  here = {name: {name, options.type} for name, options in config.evals.items()}
  for name in base.names():
    ways = {how.evaluator for how in base.load(name).ways}
    for found in here.values():
      if ways & found:
        found.add(name)
  known = sorted({*evaluators_lib.names(), *base.names(), *here})
  wanted = set(here) if tasks is None else set()
  added = []
  for task in tasks or ():
    if task not in known:
      raise errors.UserError(f'--tasks: no evaluator or task {task!r}'
                             + errors.nearest(task, known))
    found = {name for name, own in here.items() if task in own}
    if not found and task in base.names() and (ways := base.load(task).ways):
      trained = {name for name, weight in config.objectives.items() if weight}
      how = next((w for w in ways if trained.issuperset(w.objectives)), ways[0])
      found = {how.evaluator}
      added.append(task)
      with config.unlocked():
        config.evals[how.evaluator] = how.evaluation(
            [source['name'] for source in config.data.train],
            config.data.pp_eval)
      here[how.evaluator] = {how.evaluator, task}
    if not found:
      raise errors.UserError(
          f'--tasks: the config has no evaluator for {task!r}; it has '
          + ', '.join(here))
    # The name of an evaluator does not select its `_unseen` split.
    wanted |= {task} & set(here) or found
  for name in here:
    if name not in wanted:
      del config.evals[name]
    elif limit:
      own = config.evals[name].max_examples
      config.evals[name].max_examples = min(own or limit, limit)
  if limit:
    config.samples.count = min(config.samples.count, limit)
  return added


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config=True, workdir=True)
    parser.add_argument('--checkpoint', required=True, metavar='DIR',
                        help='a WORKDIR, or one step of its checkpoints/; may '
                        'be in a bucket, gs://BUCKET/NAME')
    parser.add_argument('--tasks', metavar='A,B', help='evaluators or tasks: '
                        + ', '.join(sorted({*evaluators_lib.names(),
                                            *base.names()})))
    parser.add_argument('--limit', type=int, metavar='N',
                        help='maximum number of examples of each evaluator')
    parser.add_argument('--split', metavar='NAME',
                        help="split to evaluate, instead of the config's")
    parser.add_argument('--data_dir', metavar='DIR', help='prepared data, if '
                        "not in the config's data.dir")
    args, config = cli.parse(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    # Orbax warns about a file that we do not need to read a single item.
    logging.getLogger('absl').setLevel(logging.ERROR)
    tasks = None if args.tasks is None else args.tasks.split(',')
    evaluate(config, args.checkpoint, args.workdir, tasks, args.limit,
             args.data_dir, args.split)


if __name__ == '__main__':
  allocator.keep_freed_memory()
  main()
