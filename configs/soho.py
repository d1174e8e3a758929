"""SOHO (Huang et al., CVPR 2021, arXiv 2104.03135), pre-training.

  python -m e2e_vlp_jax.train --config configs/soho.py:tiny --workdir W

Argument: SIZE[,key=value...]
  SIZE  tiny   from scratch on 2 CPU cores, drawn scenes: 9:29 minutes; masked
               words 0.69, image-text matching 0.93 (README)
        r18    the released configuration: ResNet-18 and 3 layers; not yet run
               to the end
        r101   the paper's main model: ResNet-101 and 12 layers; not yet run to
               the end
  data  any prepared dataset, or several joined by '+'; published is
        coco+visual_genome; exclude, probe: see `common.finish`
  side  short side of the images in pixels (scenes: side of the square)

Values of r18 are those of the released config (github.com/researchmm/soho,
configs/Pretrain/soho_res18_pre.py) unless marked. The changes in r101 are from
memory of the paper. docs/soho.md lists the differences from the released code
and the options that restore its behaviour.
"""
from configs import common

_IMAGES = {'coco': 118_287, 'visual_genome': 108_077}  # for training


def get_config(arg=None):
  size, data, options = common.parse_argument(
      arg, ('tiny', 'r18', 'r101'), 'coco+visual_genome')
  tiny = size == 'tiny'
  config = common.run_defaults()
  config.eval_every_steps = 2000
  config.objectives = dict(mlm=1., itm=1., mvm=1., grid_classes=0.)
  config.objective_options = dict(grid_classes=dict(background_weight=.3))
  config.model = dict(
      name='soho', heads={},
      backbone=dict(name='resnet', depth=18, dilated=False, mask_padding=True,
                    stem=64, width=64, remat='full'),
      image_mean=(.485, .456, .406), image_std=(.229, .224, .225),
      # pool 2 and stride 32 make one token of 64x64 pixels.
      neck=dict(pool=2, mix='gate', begin_align=False, pos_align=True,
                norm=True, act='none', square_mask=False),
      dictionary=dict(size=2048, update='released', decay=.4, revive=0.,
                      count_padding=True),
      # In `rate` of the pairs, all cells of one code are hidden.
      mvm=dict(rate=.015, cell='batch'),
      width=768, attention_heads=12, ffn=3072, encoder_layers=3, dropout=.1,
      pre_norm=False, act='gelu', epsilon=1e-12, text_pool='cls',
      max_text=512, text_types=2, remat='full')
  if tiny:
    _tiny(config)
  else:
    _paper(config, size, data)
  _data(config, data, options.get(
      'side', (96 if tiny else 256) if data == 'scenes'
      else 192 if tiny else 600), tiny)
  common.finish(config, options)
  return config


def get_sweep(arg=None):
  """Sizes of the dictionary; for r18 and r101 those of the paper's ablation."""
  sizes = (32, 64, 128) if (arg or 'tiny').startswith('tiny') else (
      1024, 2048, 4096, 8192)
  return [{'model.dictionary.size': n} for n in sizes]


def resize(config, side):
  """Buckets of 4:3, 3:2 and square, with `side` pixels on the short side.

  The released code resizes to a short side of at most 600 and a long one of
  at most 1000, and pads to multiples of 32. Most photographs of COCO are 4:3 or
  3:2, which become 608x800 or 608x928 there and here.
  """
  if [source['name'] for source in config.data.train] == ['scenes']:
    config.data.buckets = ((side, side),)
    config.data.pp_eval = 'decode|fit|text'
    return
  stride = 12 if config.model.backbone.name == 'patch_cnn' else 32
  up = lambda x: -int(-x // stride) * stride
  short, wide, wider = up(side), up(side * 4 / 3), up(side * 3 / 2)
  config.data.buckets = ((short, wide), (short, wider), (wide, short),
                         (wider, short), (short, short))
  # The released pipeline, without augmentation.
  config.data.pp_eval = (f'decode|fit(({round(side * 5 / 3)}, {side}), '
                         '"opencv")|text')


def _data(config, data, side, tiny):
  """Input and evaluators of one or several datasets."""
  names, scenes = data.split('+'), data == 'scenes'
  length = 20 if scenes else 16
  if tiny:
    config.model.max_text = length
  config.data = common.data(
      # Released: every group of 4 texts is an example (docs/soho.md).
      names, weight='by_texts', tokenizer=dict(
          kind='wordpiece', path='scenes' if scenes else 'bert-base-uncased'),
      labels=common.labels(names, data if data in ('scenes', 'coco')
                           else 'joint'),
      buckets=(), max_text=length, max_boxes=8 if scenes else 100,
      sentences=2 if tiny else 4, pp_train='', pp_eval='')
  resize(config, side)
  see, mask = config.data.pp_eval, f'mlm({.2 if tiny else .15})'  # ours, theirs
  # The warm start of a trunk learns from boxes.
  train = see.replace('|text', '|boxes|text') if tiny else see
  config.data.pp_train = f'{train}|{mask}|itm(.5)'
  common.evaluate(config, names, unseen=scenes, itm=f'{see}|itm(.5)',
                  mlm=f'{see}|{mask}')


def _paper(config, size, data):
  """Released: AdamW for all but the trunk, which has SGD at 100 times the rate.

  Stem and layer1 frozen; x0.1 at 25 and 35 of 40 epochs; 500 updates of
  warm-up from a third. 256 images with 4 texts are its 1,024 pairs.

  r101 is the paper's main model; its changes are from memory, not verified. Its
  other values are the released code's. The paper also freezes the trunk for the
  first 10 epochs (secondary source), which no config here does.
  """
  config.dtype = 'bfloat16'      # apex O1
  # accumulate: released 2, for the memory of its GPUs
  config.batch_size = 256
  trunk_decay = 1e-4
  if size == 'r101':
    config.model.encoder_layers = 12
    config.model.backbone.depth = 101
    config.model.dictionary.update(dict(update='momentum', decay=.99))
    config.batch_size = 1024     # 4,096 pairs
    trunk_decay = 5e-4
  # Our choice: an epoch has as many images as the data, 118K of COCO train2017
  # by default. The paper's corpus, `published`, has 219K.
  images = sum(_IMAGES.get(n, 0) for n in data.split('+')) or _IMAGES['coco']
  steps = lambda epochs: round(epochs * images / config.batch_size)
  config.total_steps = steps(40)
  schedule = dict(schedule='step', learning_rate=1e-4, warmup_steps=500,
                  warmup_init=1 / 3, decay_steps=(steps(25), steps(35)),
                  decay_factor=.1)
  config.optim = dict(
      schedule, b1=.9, b2=.999, eps=1e-6, weight_decay=.01, clip_norm=10.,
      momentum=.9,
      groups=((r'backbone/(conv1|bn1|layer1_\d+)(/.*)?', dict(freeze=True)),
              (r'backbone/.*', dict(optimizer='sgd', lr_multiplier=100.,
                                    weight_decay=trunk_decay)),
              (r'.*', dict(optimizer='adamw_hf'))))
  config.warm_start = common.warm_start(schedule)


def _tiny(config):
  """About 0.5M parameters; our choice throughout, near e2e_vlp's tiny."""
  config.model.update(dict(
      width=128, attention_heads=4, ffn=256, encoder_layers=2, dropout=0.,
      pre_norm=True, epsilon=1e-5, text_types=0))
  config.model.backbone = dict(name='patch_cnn', stem=64, width=128, blocks=2)
  config.model.neck.pool = 1     # 8x8 tokens of 12x12 pixels
  # Released counts, the paper's momentum, and no dead codes: each of the 64
  # sees some 16 cells of a batch.
  config.model.dictionary.update(dict(size=64, decay=.99, revive=.1,
                                      count_padding=False))
  # At the released rate, it would learn nothing in so few steps.
  config.model.mvm.update(dict(rate=.3, cell='pair'))
  config.objectives.update(dict(mlm=2., itm=3., mvm=.5))
  common.tiny(config, no_decay=r'.*(bias|scale|mask_token)', warmup_init=0.)
