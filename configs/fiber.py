"""FIBER's coarse stage (Dou et al., NeurIPS 2022, arXiv 2206.07643).

  python -m e2e_vlp_jax.train --config configs/fiber.py:tiny --workdir W

Argument: SIZE[,key=value...]
  SIZE  tiny   from scratch on 2 CPU cores, embedded data
        base   Swin-Base and RoBERTa-base, the published pre-training
  data  scenes | coco | visual_genome | published, which is
        coco+visual_genome+sbu+cc3m; any other prepared dataset may follow
        after '+'. Evaluated on the first one.
  side  image side in pixels; the window of `base` is side / 32
  queue past features that ITC and ITM compare with as well: 0 = none, all
        pairs of the global batch (our default), 4096 = the released code

Sources of `base`: [C] microsoft/FIBER, coarse_grained, commit ca0f36b;
[R] its README; ours = our choice (docs/fiber.md). Never trained to the end by
us: accuracy not yet run.
"""
import ml_collections
from ml_collections.config_dict import placeholder

SIZES = ('tiny', 'base')
KEYS = {'data': str, 'side': int, 'queue': int}
DATA = ('scenes', 'coco', 'visual_genome')
PUBLISHED = 'coco+visual_genome+sbu+cc3m'  # [C]


def parse_argument(arg):
  """'base,side=576' -> ('base', {'side': 576})."""
  size, *pairs = (arg or 'tiny').split(',')
  if size not in SIZES:
    raise ValueError(f'no size {size!r}; choose one of {", ".join(SIZES)}')
  options = {}
  for pair in pairs:
    key, _, value = pair.partition('=')
    if key not in KEYS:
      raise ValueError(f'no argument {key!r}; choose from {", ".join(KEYS)}')
    try:
      options[key] = KEYS[key](value)
    except ValueError:
      raise ValueError(f'{key}: found {value!r}, expected a whole number'
                       ) from None
  data = options.get('data', DATA[0])
  if data != 'published' and data.split('+')[0] not in DATA:
    raise ValueError(f'no data {data!r}; choose one of published, '
                     f'{", ".join(DATA)}')
  if data == 'published':
    options['data'] = PUBLISHED
  return size, options


def get_config(arg=None):
  size, options = parse_argument(arg)
  config = ml_collections.ConfigDict()
  config.seed = 0                # [C]
  config.dtype = 'bfloat16'      # ours; [C] float32
  config.accumulate = 1          # micro-batches a step
  config.ema_decay = 0.          # 0 = no averaged parameters
  config.max_bad_steps = 10      # non-finite updates in a row that end a run
  config.init_from = placeholder(str)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sharding_rules = ()     # ((regex, spec), ...); default: FSDP
  config.checkpoint = dict(every_steps=1000, every_minutes=0., keep=2,
                           keep_every=0, best='')
  config.profile = dict(start=0, steps=5)
  config.tensorboard = True

  # Plain sum of the three [C].
  config.objectives = dict(mlm=1., itc=1., itm=1., captioning=0.,
                           grid_classes=0.)
  config.objective_options = dict(
      itm=dict(view='hard_negative'), itc=dict(unfilled=False),
      grid_classes=dict(background_weight=.3))

  side = options.get('side', 384 if size == 'base' else 96)
  config.model = dict(
      name='fiber', heads={},
      # Swin-Base [C]; the window follows the image [C].
      swin=dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
                patch=4, window=side // 32, mlp_ratio=4., drop_path=.1,
                epsilon=1e-5, from_scratch=False),
      # RoBERTa-base [C].
      roberta=dict(depth=12, width=768, heads=12, ffn=3072, positions=514,
                types=1, dropout=.1, epsilon=1e-5, from_scratch=False),
      fused_layers=6, width=768, # [C]
      text_pool='cls',            # of the text: cls [C] | mean
      # Negatives for ITM: 1 = by softmax of the ITC logits [C], 0 = any.
      negative_hardness=1.,
      beam_search='released',    # of captions [C]
      queue=options.get('queue', 0), remat='full',
      image_mean=(.485, .456, .406), image_std=(.229, .224, .225))  # [C]

  # AdamW [C], 100k steps at batch 4096 [R]. The rate is the code's; as
  # recalled, the paper has 1e-4 and 1k steps of warm-up.
  config.batch_size = 4096
  config.total_steps = 100_000
  config.optim = dict(
      schedule='linear', learning_rate=1e-5, warmup_steps=10_000,
      optimizer='adamw_hf', warmup_init=0., decay_steps=(), decay_factor=.1,
      final_fraction=0., b1=.9, b2=.98, eps=1e-8, weight_decay=.01,
      clip_norm=0., momentum=.9, groups=GROUPS)
  config.warm_start = dict(steps=0, objectives=dict(grid_classes=1.),
                           optim=config.optim.to_dict())
  config.log_every_steps = 50
  config.eval_every_steps = 10_000
  config.eval_batch_size = 64
  _data(config, options.get('data', 'coco' if size == 'base' else 'scenes'),
        side)
  if size == 'tiny':
    _tiny(config)
  return config


# Heads and all that is new beside the two trunks learn five times faster; no
# decay for biases, tables of relative positions and the trunks' norms. The
# gates, the temperature and the gain of the image side's cross-attention norm
# do decay [C], all by the names that these have there.
_NEW = (r'(itc_)?(image|text)_(projection|pooler)|caption_projections_.*'
        r'|mlm_head|mlm_decoder|itm_head|(swin|text)/.*/cross')
GROUPS = (
    (rf'({_NEW})(/.*)?/bias|mlm_head/norm/.*', dict(lr=5., wd=0.)),
    (rf'({_NEW})(/.*)?', dict(lr=5.)),
    (r'.*(bias|/scale)', dict(wd=0.)),
    (r'.*', dict()))


def _data(config, data, side):
  """Input of one or several datasets; evaluators and samples of the first."""
  scenes, names = data == 'scenes', data.split('+')
  fit = 'fit' if scenes else 'squash'  # [C]: the square is filled
  rate = .2 if scenes else .15   # [C] .15
  config.data = dict(
      # Every (image, text) pair is an example [C]; see docs/fiber.md.
      dir='data', train=tuple(
          dict(name=n, split='train', weight='texts' if names[1:] else 1.)
          for n in names),
      tokenizer=dict(kind='wordpiece', path='scenes') if scenes else
      dict(kind='bpe', path='roberta-base'),
      labels='scenes' if scenes else 'joint', buckets=((side, side),),
      max_text=20 if scenes else 40, sentences=1,
      max_boxes=8 if scenes else 100, max_attributes=4, threads=0,
      max_bad_records=100,
      pp_train=f'decode|{fit}|boxes|text|mlm({rate})')
  see = f'decode|{fit}|boxes|text'
  source = dict(name=names[0],
                split='test' if names[0] == 'scenes' else 'validation')

  def evaluator(kind, pp=see, of=source, count=1000, training=128):
    return dict(type=kind, source=of, pp=pp, max_examples=count,
                training_examples=training)
  config.evals = dict(
      itm=evaluator('itm', f'{see}|itm(.5)'),
      mlm=evaluator('mlm', f'{see}|mlm({rate})'),
      retrieval=evaluator('retrieval', count=256 if scenes else 1000))
  config.samples = dict(count=12, source=source, pp=see)


def _tiny(config):
  """1.45M parameters, from scratch; all values are our choice."""
  config.dtype = 'float32'
  config.model.update(dict(
      swin=dict(width=32, depths=(1, 1, 4), heads=(1, 2, 4), patch=4,
                window=6, mlp_ratio=2., drop_path=0., epsilon=1e-5,
                from_scratch=True),
      roberta=dict(depth=3, width=128, heads=4, ffn=256,
                positions=config.data.max_text + 2, types=1, dropout=0.,
                epsilon=1e-5, from_scratch=True),
      fused_layers=2, width=128, text_pool='mean',
      negative_hardness=.5, remat='none',
      image_mean=(.4, .4, .4), image_std=(.333, .333, .333)))
  config.batch_size = 16
  config.data.sentences = 2  # An image's lower blocks serve both.
  config.total_steps = 3400
  # Matching is slowest to learn.
  config.objectives.update(dict(mlm=1., itc=1., itm=4.))
  groups = ((r'.*(bias|/scale|/gate)|logit_scale', dict(wd=0.)),
            (r'.*', dict()))
  config.optim.update(dict(
      schedule='cosine', optimizer='adamw', learning_rate=1e-3,
      warmup_steps=100, final_fraction=.02, clip_norm=1., groups=groups))
  # The paper starts from ImageNet and RoBERTa weights; this run first teaches
  # its trunk the class and attributes of what covers each token.
  config.warm_start.steps = 2000
  config.warm_start.optim.update(dict(
      schedule='cosine', learning_rate=2e-3, warmup_steps=20,
      final_fraction=.02))
  config.log_every_steps = 50
  config.eval_every_steps = 2700
  config.checkpoint.every_steps = 450
  config.evals.retrieval.options = dict(texts=1,
                                        itc_weight=config.model.negative_hardness)
