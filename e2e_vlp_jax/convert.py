"""Published weights -> a checkpoint, and back.

  python -m e2e_vlp_jax.convert --format hf_detr --input model.safetensors \
      --config configs/e2e_vlp.py:detr --config.data.labels=coco91 --output D
  python -m e2e_vlp_jax.convert --export --input D --output model.safetensors

Each format is a file of e2e_vlp_jax/weights; docs/weights.md describes them.
D can be used as `init_from`, and as the checkpoint of evaluate and predict.
Variables that the file lacks are taken from the checkpoint --onto, or else
randomly initialised with config.seed. D/conversion.json lists them, and every
tensor of the file, whether used or not. If the file has only a part of a
module, that is an error without --allow_random.

Exports have the names, types and bits of the imported file. The export of a
checkpoint that was trained afterwards needs --format and has the names of the
published files.
"""
import collections
import json
import logging
import os
import re

import flax
import jax
import ml_collections
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import workdir as workdir_lib
from e2e_vlp_jax.weights import files
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import sets


def import_weights(format_name, path, config, output, *, resize=False,
                   onto=None, allow_random=False, weights_set=None):
  """Writes the checkpoint `output`; returns the record of the conversion.

  Args:
    format_name: of the weights.
    path: of the weights file, of an index of shards, or of their folder.
    config: config of the model.
    output: folder.
    resize: resize tensors that depend on the input's size to fit `config`.
    onto: checkpoint of the same model that provides what the file lacks.
    allow_random: initialise variables randomly even in modules of which the
      file has a part.
    weights_set: name of the set to take from a file with several.
  """
  source = mapping.find(format_name)
  _check_new(output)
  path = files.find(path)
  base = _variables(onto)[0] if onto else {}
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  chosen, tensors, others = sets.choose(source, files.read(path), weights_set,
                                        path)
  tensors = mapping.spelled(source, tensors, path)
  if resize and not hasattr(source, 'resize'):
    raise errors.UserError(f'--resize: {format_name} files have nothing that '
                           'can be resized')
  facts = _check_model(source, tensors, path, config, vocabularies.sizes,
                       resize)

  # Build the config's model as training does.
  model = models.build(config, **vocabularies.sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=1,
                                    **vocabularies.sizes)
  requests = objectives.requests(objectives.build(config))
  init = lambda b: flax.traverse_util.flatten_dict(
      model.init(jax.random.key(config.seed), b, requests), sep='/')
  shapes = jax.eval_shape(init, batch)
  variables, record = mapping.to_ours(
      source, tensors, config, {k: x.shape for k, x in shapes.items()}, path,
      resize)
  if not variables:
    raise errors.UserError(f'--input {path!r}: the model of --config uses '
                           'none of its tensors')
  kept = _kept(record['missing'], base, shapes, onto)
  missing = [k for k in record['missing'] if k not in base]
  gaps = mapping.uncovered(source, missing, variables)
  if gaps and not allow_random:
    raise errors.UserError(
        f'--input {path!r} has no tensor for {gaps[0]}'
        + (f' and {len(gaps) - 1} more variables' if gaps[1:] else '')
        + ', but for others of the same module; --allow_random initialises '
        'them randomly, --onto takes them from a checkpoint')
  variables |= {k: np.asarray(base[k]) for k in kept}
  if missing:
    @jax.jit
    def initial(b):
      drawn = init(b)  # Once, as tracing the model takes seconds.
      return {k: drawn[k] for k in missing}
    variables |= jax.tree.map(np.asarray, initial(batch))
  record = {'format': format_name, 'file': os.path.basename(path),
            'set': chosen, 'other_sets': others, **record,
            'missing': missing, 'kept': kept}
  _write(output, variables, config, vocabularies, record)
  used = sum(x.size for k, x in variables.items() if k not in missing + kept)
  print(f'{format_name}: {path}, {len(tensors)} tensors')
  print(f'  used     {len(record["tensors"])}, {used:,} values')
  if chosen or others:
    print(f'  set      {chosen or "the file itself"}' + (
        f'; the file also has {", ".join(n or "its own" for n in others)} '
        '(--set NAME takes another)' if others else ''))
  _report(record, source, facts, config, onto)
  print(f'written: {output}')
  return record


def _check_model(source, tensors, path, config, sizes, resize):
  """Facts about the file's model; UserError unless they fit the config."""
  facts = {**source.describe({k: x for k, (_, x) in tensors.items()}),
           **source.read_config(files.read_config(path))}
  spaces = {len(label_space.LabelSpace.load(n).classes): n
            for n in label_space.names()}
  mapping.check_config(facts, config, {
      'classes': ('data.labels', sizes['num_classes'], spaces),
      'vocabulary': ('data.tokenizer.path', sizes['vocab_size'], {})}, path,
                       source, resize)
  return facts


def _kept(missing, base, shapes, onto):
  """Names of the missing variables that the checkpoint `onto` provides."""
  kept = [k for k in missing if k in base]
  other = [k for k in kept if base[k].shape != shapes[k].shape]
  if other or (onto and not kept):
    raise errors.UserError(
        f'--onto {onto!r} is of another model than --config: ' + (
            f'{other[0]} is {list(base[other[0]].shape)}, expected '
            f'{list(shapes[other[0]].shape)}' if other else
            'it has nothing that the file lacks'))
  return kept


def _write(output, variables, config, vocabularies, record):
  """Writes the checkpoint and its conversion.json."""
  tree = flax.traverse_util.unflatten_dict(variables, sep='/')
  params = tree.pop('params')
  checkpoint.write(output, params, tree, {
      'config': workdir_lib.to_dict(config), **vocabularies.to_dict(),
      'converted': record})
  paths.write(os.path.join(output, 'conversion.json'),
              json.dumps(record, indent=1))


def _report(record, source, facts, config, onto):
  """Prints how every tensor was used and where every variable came from."""
  module = lambda name: '/'.join(name.split('/')[:2])
  _list('copies', record['copies'],
        lambda name: f'equal to {record["copies"][name]}, kept once')
  _list('surplus', record['surplus'], record['surplus'].get)
  _list('kept', record['kept'],
        lambda name: f'not in the file; from {onto}', module)
  _list('missing', record['missing'],
        lambda name: 'not in the file; randomly initialised with seed '
        f'{config.seed}', module)
  _list('resized', record['resized'],
        lambda name: '{} to {}'.format(*record['resized'][name]))
  for key in getattr(source, 'FEWER', ()):
    ours, theirs = mapping.value_of(config, key), facts[key]
    if ours < theirs:
      print(f'  {key}={ours}: the first {ours} of the file\'s {theirs}; '
            f'{theirs - ours} left out')
  for key in getattr(source, 'UNSAID', ()):
    if key not in facts:
      print(f'  {key}={mapping.value_of(config, key)} is taken from --config: '
            'weights files do not contain it, and there is no config.json in '
            'the folder')


def export_weights(path, output, format_name=None):
  """Writes a checkpoint's parameters as a safetensors file."""
  if paths.in_bucket(output):
    raise errors.UserError(f'--output: {output!r}; expected a file of the file '
                           'system, which gcloud storage cp can copy')
  _check_new(output)
  variables, meta = _variables(path)
  record = meta.get('converted')
  if record and format_name in (None, record['format']):
    format_name = record['format']
  elif format_name:
    record = None
  else:
    raise errors.UserError(
        f'--format: {path!r} was not made by convert, say which; valid '
        'choices: ' + ', '.join(mapping.formats()))
  tensors = mapping.to_theirs(
      mapping.find(format_name), variables,
      ml_collections.ConfigDict(meta['config']), record)
  os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
  files.write(output, tensors)
  print(f'{format_name}: {path}, {len(tensors)} tensors')
  if record:
    _list('left out', record['surplus'],
          lambda name: f'not in the checkpoint: {record["surplus"][name]}')
  else:
    used = {e.ours for e in mapping.find(format_name).entries(
        ml_collections.ConfigDict(meta['config']))}
    _list('left out', [k for k in variables if k not in used],
          lambda name: f'not part of {format_name}')
  print(f'written: {output}')


def _variables(path):
  """({path of a variable: array}, meta) of a checkpoint."""
  params, model_state, meta = checkpoint.load(path)
  return flax.traverse_util.flatten_dict({'params': params, **model_state},
                                         sep='/'), meta


def _check_new(output):
  if paths.names(output) or paths.is_file(output):
    raise errors.UserError(f'--output: {output!r} exists; name a new one')


def _list(title, names, reason, alike=lambda name: re.sub(r'\d+', '#', name)):
  """Prints names with reasons; names that are `alike` share a line."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[alike(name), reason(name)].append(name)
  for (pattern, why), members in groups.items():
    what = members[0] if len(members) == 1 else f'{len(members)} x {pattern}'
    print(f'  {title:8} {what} ({why})')


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config=True)
    parser.add_argument('--format', metavar='NAME',
                        help=', '.join(mapping.formats()))
    parser.add_argument('--input', required=True, metavar='FILE',
                        help='weights file, index of shards or their '
                        'folder; with --export, a checkpoint')
    parser.add_argument('--set', metavar='NAME', dest='weights_set',
                        help='which weights to take from a file with several '
                        'sets, such as model_ema')
    parser.add_argument('--output', required=True, metavar='DIR',
                        help='checkpoint, which may be in a bucket, '
                        'gs://BUCKET/NAME; with --export, a .safetensors file')
    parser.add_argument('--onto', metavar='DIR',
                        help='a checkpoint that provides what FILE lacks')
    parser.add_argument('--resize', action='store_true',
                        help='resize what depends on the size of the images '
                        '(tables of relative positions) to that of --config')
    parser.add_argument('--allow_random', action='store_true',
                        help='randomly initialise what FILE lacks even in '
                        'modules of which it has a part')
    parser.add_argument('--export', action='store_true',
                        help='convert a checkpoint to a weights file')
    args, config = cli.parse(parser, argv)
    # Orbax warns about a file that we do not need to read a single item.
    logging.getLogger('absl').setLevel(logging.ERROR)
    if args.export:
      if config:
        raise errors.UserError('--config: not with --export; the checkpoint '
                               'carries its own')
      if args.weights_set:
        raise errors.UserError('--set: not with --export')
      if not args.output.endswith('.safetensors'):
        raise errors.UserError(f'--output: {args.output!r}; expected a file '
                               'that ends in .safetensors')
      export_weights(args.input, args.output, args.format)
    else:
      for name in ('format', 'config'):
        if not getattr(args, name):
          raise errors.UserError(
              f'--{name} is needed'
              + (f'; valid choices: {", ".join(mapping.formats())}'
                 if name == 'format' else ''))
      import_weights(args.format, args.input, config, args.output,
                     resize=args.resize, onto=args.onto,
                     allow_random=args.allow_random,
                     weights_set=args.weights_set)


if __name__ == '__main__':
  main()
