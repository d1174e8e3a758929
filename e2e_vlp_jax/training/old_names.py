"""Keys of stored configs that have another name today."""


def modernise(config):
  """A stored config (nested dict) with today's names of its keys."""
  config = {k: dict(v) if isinstance(v, dict) else v
            for k, v in config.items()}
  samples, data = config.get('samples'), config.get('data')
  if samples and 'pp' in samples:
    data['pp_eval'] = samples.pop('pp')
  words = {'images': 'by_rows', 'texts': 'by_texts'}
  if data and 'train' in data:
    data['train'] = [{**s, 'weight': words.get(s['weight'], s['weight'])}
                     for s in data['train']]
  evals = config.get('evals', {})
  for name, options in evals.items():
    evals[name] = {'examples_during_training' if k == 'training_examples'
                   else k: v for k, v in options.items()}
  return config
