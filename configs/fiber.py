"""FIBER's coarse stage (Dou et al., NeurIPS 2022, arXiv 2206.07643).

  python -m e2e_vlp_jax.train --config configs/fiber.py:tiny --workdir W

Argument: SIZE[,key=value...]
  SIZE  tiny   from scratch on 2 CPU cores, drawn scenes: 13:48 minutes; R@1
               from image to text among 256: 0.35, matching 0.85 (README)
        base   Swin-Base and RoBERTa-base, the published pre-training; not yet
               run to the end
  data  any prepared dataset, or several joined by '+'; published is
        coco+visual_genome+sbu+cc3m; exclude, probe: see `common.finish`
  side  image side in pixels; the window of `base` is side / 32
  queue number of past features as additional candidates of ITC and ITM: 0 =
        only the global batch (our default), 4096 = the released code

Sources of `base`: [C] microsoft/FIBER, coarse_grained, commit ca0f36b;
[R] its README; ours = our choice (docs/fiber.md).
"""
from configs import common


def get_config(arg=None):
  size, data, options = common.parse_argument(
      arg, ('tiny', 'base'),
      published='coco+visual_genome+sbu+cc3m', queue=int)  # [C]
  tiny = size == 'tiny'
  config = common.run_defaults()
  config.eval_batch_size = 64
  # The plain sum of the first three [C].
  config.objectives = dict(mlm=1., itc=1., itm=1., captioning=0.,
                           grid_classes=0.)
  config.objective_options = dict(
      itm=dict(view='hard_negative'), itc=dict(unfilled=False),
      grid_classes=dict(background_weight=.3))
  config.model = dict(
      name='fiber', heads={},
      # Swin-Base [C]; the window follows the image [C].
      swin=dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
                patch=4, window=12, mlp_ratio=4., drop_path=.1,
                epsilon=1e-5, from_scratch=False, fusion='v3'),  # or 'v2' [C]
      # RoBERTa-base [C].
      roberta=dict(depth=12, width=768, heads=12, ffn=3072, positions=514,
                   types=1, dropout=.1, epsilon=1e-5, from_scratch=False),
      fused_layers=6, width=768,  # [C]
      text_pool='cls',           # for ITM: cls [C] | mean
      # Negatives of ITM: 1 = by softmax of the ITC logits [C], 0 = uniform.
      negative_hardness=1.,
      beam_search='released',    # how captions are ranked: released | standard
      queue=options.get('queue', 0), remat='full',
      image_mean=(.485, .456, .406), image_std=(.229, .224, .225))  # [C]
  _data(config, data, options.get('side', 96 if tiny else 384))
  if tiny:
    _tiny(config)
  else:
    _base(config)
  common.finish(config, options)
  return config


def resize(config, side):
  """One square bucket; the window of a trunk of four stages follows it [C]."""
  config.data.buckets = ((side, side),)
  if len(config.model.swin.depths) == 4:
    config.model.swin.window = side // 32


def _data(config, data, side):
  """Input and evaluators of one or several datasets."""
  names, scenes = data.split('+'), data == 'scenes'
  fit = 'fit' if scenes else 'squash'  # [C]: the square is filled
  see, mask = f'decode|{fit}|boxes|text', f'mlm({.2 if scenes else .15})'
  config.data = common.data(
      # Every (image, text) pair is an example [C]; see docs/fiber.md.
      names, weight='by_texts', tokenizer=dict(
          kind='wordpiece' if scenes else 'bpe',
          path='scenes' if scenes else 'roberta-base'),
      labels=common.labels(names, 'scenes' if scenes else 'joint'), buckets=(),
      max_text=20 if scenes else 40, max_boxes=8 if scenes else 100,
      sentences=1, pp_train=f'{see}|{mask}', pp_eval=see)  # .15 [C]
  resize(config, side)
  common.evaluate(config, names, itm=f'{see}|itm(.5)', mlm=f'{see}|{mask}',
                  retrieval=see)
  if scenes:
    config.evals.retrieval.max_examples = 256


# Heads and all modules outside the two trunks have five times the learning
# rate. Biases, tables of relative positions and the trunks' norms have no
# decay. The gates, the temperature and the gain of the image side's
# cross-attention norm do decay [C], because of their names in that code.
_NEW = (r'(itc_)?(image|text)_(projection|pooler)|caption_projections_.*'
        r'|mlm_head|mlm_decoder|itm_head|(swin|text)/.*/cross')
_GROUPS = (
    (rf'({_NEW})(/.*)?/bias|mlm_head/norm/.*',
     dict(lr_multiplier=5., weight_decay=0.)),
    (rf'({_NEW})(/.*)?', dict(lr_multiplier=5.)),
    (r'.*(bias|/scale)', dict(weight_decay=0.)),
    (r'.*', dict()))


def _base(config):
  """AdamW [C], 100k steps at batch 4096 [R].

  The rate is the code's; from memory, the paper has 1e-4 and 1k steps of
  warm-up.
  """
  config.dtype = 'bfloat16'      # ours; [C] float32
  config.batch_size = 4096
  config.total_steps = 100_000
  schedule = dict(schedule='linear', learning_rate=1e-5, warmup_steps=10_000,
                  warmup_init=0., final_fraction=0.)
  config.optim = dict(
      schedule, optimizer='adamw_hf', b1=.9, b2=.98, eps=1e-8,
      weight_decay=.01, clip_norm=0., groups=_GROUPS)
  config.warm_start = common.warm_start(schedule)


def _tiny(config):
  """1.45M parameters, from scratch; all values are our choice."""
  config.model.update(dict(
      swin=dict(width=32, depths=(1, 1, 4), heads=(1, 2, 4), patch=4,
                window=6, mlp_ratio=2., drop_path=0., epsilon=1e-5,
                from_scratch=True, fusion='v3'),
      roberta=dict(depth=3, width=128, heads=4, ffn=256,
                   positions=config.data.max_text + 2, types=1, dropout=0.,
                   epsilon=1e-5, from_scratch=True),
      fused_layers=2, width=128, negative_hardness=.5))
  config.data.sentences = 2      # Both share an image's lower blocks.
  # Matching is slowest to learn.
  config.objectives.update(dict(mlm=1., itc=1., itm=4.))
  common.tiny(config, no_decay=r'.*(bias|/scale|/gate)|logit_scale',
              total_steps=3400, warm_steps=2000, learning_rate=1e-3,
              warmup_steps=100, b2=.98, warmup_init=0., optimizer='adamw')
  config.eval_every_steps = 2700
  config.checkpoint.every_steps = 450
  config.evals.retrieval.options = dict(
      texts=1, itc_weight=config.model.negative_hardness)
