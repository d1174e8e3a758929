"""SOHO (Huang et al., CVPR 2021, arXiv 2104.03135), pre-training.

  python -m e2e_vlp_jax.train --config configs/soho.py:tiny --workdir W

Argument: SIZE[,key=value...]
  SIZE  tiny   from scratch on 2 CPU cores, embedded data
        r18    the released configuration: ResNet-18 and 3 layers
        r101   the paper's main model: ResNet-101 and 12 layers
  data  scenes | coco | visual_genome | published, which is
        coco+visual_genome; any other prepared dataset may follow after '+'.
        Evaluated on the first one.
  side  short side of the images in pixels (tiny: side of the square)

Values of r18 are those of the released config (github.com/researchmm/soho,
configs/Pretrain/soho_res18_pre.py) unless marked; what r101 changes is from
the paper, from memory. What differs from the released code, and the options
that give its behaviour back, are in the project's docs/soho.md.
"""
import ml_collections
from ml_collections.config_dict import placeholder

SIZES = ('tiny', 'r18', 'r101')
KEYS = {'data': str, 'side': int}
DATA = ('scenes', 'coco', 'visual_genome')
PUBLISHED = 'coco+visual_genome'
_IMAGES = {'coco': 118_287, 'visual_genome': 108_077}  # for training


def parse_argument(arg):
  """'r18,side=480' -> ('r18', {'side': 480})."""
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


def buckets(side, multiple):
  """4:3, 3:2 and square, with `side` pixels on the short side.

  The released code resizes to a short side of at most 600 and a long one of
  at most 1000, and pads to multiples of 32; most photographs of COCO are 4:3
  or 3:2, which is 608x800 or 608x928 there, and here.
  """
  up = lambda x: -int(-x // multiple) * multiple
  short, wide, wider = up(side), up(side * 4 / 3), up(side * 3 / 2)
  return ((short, wide), (short, wider), (wide, short), (wider, short),
          (short, short))


def get_config(arg=None):
  size, options = parse_argument(arg)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = 'float32' if size == 'tiny' else 'bfloat16'  # apex O1
  config.accumulate = 1          # released: 2, for the memory of its GPUs
  config.ema_decay = 0.          # 0 = no averaged parameters
  config.max_bad_steps = 10      # non-finite updates in a row that end a run
  config.init_from = placeholder(str)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sharding_rules = ()     # ((regex, spec), ...); default: FSDP
  # Saved every so many steps or minutes, whichever comes (0 = never); kept:
  # the newest, each step that keep_every divides, and the one with the best
  # metric of the evaluations during training ('eval/itm/accuracy', say).
  config.checkpoint = dict(every_steps=1000, every_minutes=0., keep=2,
                           keep_every=0, best='')
  # A trace of `steps` steps from step `start` on; 0 = only when somebody
  # makes the file WORKDIR/profile_now.
  config.profile = dict(start=0, steps=5)
  config.tensorboard = True

  config.objectives = dict(mlm=1., itm=1., mvm=1., cells=0.)
  config.objective_options = dict(cells=dict(nothing=.3))

  config.model = dict(
      name='soho', text=True,
      backbone=dict(name='resnet', depth=18, frozen_bn=False, frozen_stages=2,
                    dilated=False, mask_padding=True, stem=64, width=64,
                    remat='full'),
      image_mean=(.485, .456, .406), image_std=(.229, .224, .225),
      # pool 2 and stride 32 make one token of 64x64 pixels.
      neck=dict(pool=2, mix='gate', begin_align=False, pos_align=True,
                norm=True, act='none', square_mask=False),
      dictionary=dict(size=2048, update='released', decay=.4, revive=0.,
                      count_padding=True),
      # Hidden in `rate` of the pairs: the cells of one word.
      mvm=dict(rate=.015, cell='batch'),
      width=768, heads=12, ffn=3072, encoder_layers=3, dropout=.1,
      pre_norm=False, act='gelu', epsilon=1e-12, itm_pool='cls', max_text=512,
      text_types=2, remat='full')

  # Released: AdamW for all but the trunk, which has SGD at 100 times the
  # rate; stem and layer1 frozen; x0.1 at 25 and 35 of 40 epochs; 500 updates
  # of warm-up from a third. 256 images with 4 texts are its 1,024 pairs.
  frozen = r'backbone/(conv1|bn1|layer1_\d+)(/.*)?'
  config.batch_size = 256
  config.optim = dict(
      schedule='step', learning_rate=1e-4, warmup_steps=500,
      warmup_init=1 / 3, decay_steps=(), decay_factor=.1, final_fraction=0.,
      b1=.9, b2=.999, eps=1e-6, weight_decay=.01, clip_norm=10., momentum=.9,
      groups=((frozen, dict(freeze=True)),
              (r'backbone/.*', dict(optimizer='sgd', lr=100., wd=1e-4)),
              (r'.*', dict(optimizer='adamw_hf'))))
  if size == 'r101':
    _r101(config)
  data = options.get('data', 'scenes' if size == 'tiny' else 'coco')
  # Our choice: in an epoch as many images are seen as there are, 118K of COCO
  # train2017 by default. The paper's corpus, `published`, has 219K.
  images = sum(_IMAGES.get(n, 0) for n in data.split('+')) or _IMAGES['coco']
  steps = lambda epochs: round(epochs * images / config.batch_size)
  config.total_steps = steps(40)
  config.optim.decay_steps = (steps(25), steps(35))
  config.warm_start = dict(steps=0, objectives=dict(cells=1.),
                           optim=config.optim.to_dict())
  config.log_every_steps = 50
  config.eval_every_steps = 2000
  config.eval_batch_size = 32

  if size == 'tiny':
    _tiny(config)
  side = options.get('side', {'tiny': 96}.get(size, 256) if data == 'scenes'
                     else {'tiny': 192}.get(size, 600))
  _data(config, data, side)
  return config


def get_sweep(arg=None):
  """Sizes of the dictionary: of r18 and r101 those of the paper's ablation."""
  sizes = (32, 64, 128) if (arg or 'tiny').startswith('tiny') else (
      1024, 2048, 4096, 8192)
  return [{'model.dictionary.size': n} for n in sizes]


def _data(config, data, side):
  """Input of one or several datasets; evaluators and samples of the first."""
  scenes, tiny = data == 'scenes', config.model.width == 128
  names = data.split('+')
  if scenes:
    see = 'decode|fit|text'
  else:  # the released pipeline, without augmentation
    see = f'decode|fit(({round(side * 5 / 3)}, {side}), "opencv")|text'
  rate = .2 if tiny else .15  # .2: our choice
  # The warm start of a trunk learns from boxes.
  train = see.replace('|text', '|boxes|text') if tiny else see
  length = 20 if scenes else 16
  config.data = dict(
      # Released: every group of 4 texts is an example (docs/soho.md).
      dir='data', train=tuple(
          dict(name=n, split='train', weight='texts' if names[1:] else 1.)
          for n in names),
      tokenizer=dict(kind='wordpiece',
                     path='scenes' if scenes else 'bert-base-uncased'),
      labels=data if data in ('scenes', 'coco') else 'joint',
      buckets=((side, side),) if scenes else buckets(side, 12 if tiny else 32),
      max_text=length, sentences=2 if tiny else 4,
      max_boxes=8 if scenes else 100, max_attributes=4, threads=0,
      max_bad_records=100, pp_train=f'{train}|mlm({rate})|itm(.5)')
  if tiny:
    config.model.max_text = length
  source = dict(name=names[0],
                split='test' if names[0] == 'scenes' else 'validation')

  def evaluator(kind, pp, of=source, count=1000, training=128):
    return dict(type=kind, source=of, pp=pp, max_examples=count,
                examples_during_training=training)
  config.evals = dict(itm=evaluator('itm', f'{see}|itm(.5)'),
                      mlm=evaluator('mlm', f'{see}|mlm({rate})'))
  if scenes:
    # Colour-shape pairs that the training never shows.
    unseen = dict(name=data, split='unseen')
    for name in list(config.evals):
      config.evals[name + '_unseen'] = evaluator(
          name, config.evals[name].pp, unseen, 500, 0)
  config.samples = dict(count=12, source=source)
  config.data.pp_eval = see


def _r101(config):
  """The paper's main model; all from memory, not verified.

  Its other values are the released code's. The paper also freezes the trunk
  for the first 10 epochs (secondary source), which no config here does.
  """
  config.model.update(dict(encoder_layers=12))
  config.model.backbone.depth = 101
  config.model.dictionary.update(dict(update='momentum', decay=.99))
  config.batch_size = 1024       # 4,096 pairs
  frozen, trunk, rest = config.optim.groups
  config.optim.groups = (frozen, (trunk[0], {**trunk[1], 'wd': 5e-4}), rest)


def _tiny(config):
  """About 0.5M parameters; our choice throughout, near e2e_vlp's tiny."""
  config.model.update(dict(
      width=128, heads=4, ffn=256, encoder_layers=2, dropout=0.,
      pre_norm=True, epsilon=1e-5, itm_pool='mean', text_types=0, remat='none',
      image_mean=(.4, .4, .4), image_std=(.333, .333, .333)))
  config.model.backbone = dict(name='patch_cnn', stem=64, width=128, blocks=2)
  config.model.neck.pool = 1     # 8x8 tokens of 12x12 pixels
  # Released counts, the paper's momentum, and nothing may die: a word has
  # some 16 cells of a batch.
  config.model.dictionary.update(dict(size=64, decay=.99, revive=.1,
                                      count_padding=False))
  # At the released rate nothing would be learnt of it in so few steps.
  config.model.mvm.update(dict(rate=.3, cell='pair'))
  config.objectives.update(dict(mlm=2., itm=3., mvm=.5))
  config.batch_size = 16
  config.total_steps = 4000
  config.optim.update(dict(
      schedule='cosine', learning_rate=8e-4, warmup_steps=160,
      warmup_init=0., final_fraction=.02, weight_decay=.01, clip_norm=1.,
      eps=1e-8, groups=((r'.*(bias|scale|mask_token)', dict(wd=0.)),
              (r'.*', dict()))))
  # The papers start from ImageNet weights; this run first teaches its trunk
  # the class and attributes of what covers each grid cell.
  config.warm_start.steps = 800
  config.warm_start.optim.update(dict(
      config.optim.to_dict(), schedule='cosine', learning_rate=2e-3,
      warmup_steps=20, final_fraction=.02))
  config.log_every_steps = 50
  config.eval_every_steps = 1000
  config.eval_batch_size = 64
  config.checkpoint.every_steps = 250
