"""FIBER's fine stage (Dou et al., NeurIPS 2022): grounding and detection.

  python -m e2e_vlp_jax.prepare scenes --grounded --data_dir data
  python -m e2e_vlp_jax.train --config configs/fiber.py:tiny --workdir A
  python -m e2e_vlp_jax.train --config configs/fiber_fine.py:tiny --workdir B \
      --config.init_from=A

Argument: SIZE[,key=value...]
  SIZE    tiny   on 2 CPU cores, drawn scenes, after FIBER's coarse `tiny`: 14
                 minutes; phrases R@1 0.87, AP from class names 0.81
          base   Swin-Base and RoBERTa-base at 800x1344; not yet run
  data    scenes, or any prepared dataset with phrases or boxes, or several
          joined by '+'; published is grounding+flickr30k_entities+objects365.
          Evaluated on the first one.
  recipe  published settings of `base`: pretrain, refexp (pre-training for
          referring expressions), coco, lvis, refcoco, odinw
  fusion  v2 | v3, the variant of the cross-attention; by default the recipe's,
          and v3 for tiny, which is that of the coarse stage
  side    image side in pixels of tiny

Sources: [F] microsoft/FIBER, fine_grained, commit ca0f36b; ours = our choice
(docs/fiber_fine.md). Numbers of images are from memory.
"""
from configs import common
from e2e_vlp_jax import errors

_STEPS_PER_EPOCH = {'coco': 117_266 // 32, 'lvis': 100_170 // 32,
                    'refcoco': 120_624 // 16}
# [F]: steps, global batch, learning rate, its share for the text side, weight
# decay, warm-up, clipping, variant, whether Swin's first stage is frozen.
RECIPES = {
    'pretrain': dict(steps=800_000, batch=64, rate=1e-4, text=.1, decay=.01,
                     warmup=2000, clip=1., fusion='v2', frozen=True),
    'refexp': dict(steps=800_000, batch=64, rate=1e-4, text=.1, decay=.01,
                   warmup=5000, clip=1., fusion='v3', frozen=True),
    'coco': dict(steps=24 * _STEPS_PER_EPOCH['coco'], batch=32, rate=1e-5,
                 text=1., decay=1e-4, warmup=2000, clip=0., fusion='v2',
                 frozen=False),
    'lvis': dict(steps=24 * _STEPS_PER_EPOCH['lvis'], batch=32, rate=1e-5,
                 text=1., decay=1e-4, warmup=2000, clip=0., fusion='v2',
                 frozen=False),
    'refcoco': dict(steps=20 * _STEPS_PER_EPOCH['refcoco'], batch=16,
                    rate=1e-5, text=1., decay=1e-4, warmup=2000, clip=0.,
                    fusion='v3', frozen=False),
    # [F] runs at most 200 epochs of sets of very different sizes and lowers
    # the rate when the validation AP stalls; a fixed length is ours.
    'odinw': dict(steps=2000, batch=4, rate=1e-4, text=.1, decay=.05,
                  warmup=0, clip=1., fusion='v2', frozen=True)}
# Their rows are images; those of other sets, captions.
_DETECTION = ('objects365', 'coco', 'lvis')
# Of all steps: where the rate drops to a tenth. The weight decay of
# pre-training drops at .667 of these steps [F].
_DROPS, _DECAY_DROPS = (.67, .89), .667


def get_config(arg=None):
  size, data, options = common.parse_argument(
      arg, ('tiny', 'base'),
      published='grounding+flickr30k_entities+objects365',  # [F]
      recipe=str, fusion=str)
  tiny = size == 'tiny'
  name = options.get('recipe', 'pretrain')
  if name not in RECIPES:
    raise ValueError(f'recipe: {name!r}' + errors.nearest(name, RECIPES))
  recipe = RECIPES[name]
  config = common.run_defaults()
  config.objectives = dict(grounding=1.)
  config.objective_options = dict(grounding=dict(
      token_weight=1., box_weight=2., centerness_weight=1.,  # [F]
      alpha=.25, gamma=2., nearest=9, last_token_is_none=True))  # [F]
  config.model = dict(
      name='fiber_fine', heads={},
      # Swin-Base [F]; grids are padded to whole windows [F].
      swin=dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32),
                patch=4, window=12, mlp_ratio=4., drop_path=.4, epsilon=1e-5,
                from_scratch=False, pad=True,
                fusion=options.get('fusion', 'v3' if tiny
                                   else recipe['fusion'])),
      # RoBERTa-base [F].
      roberta=dict(depth=12, width=768, heads=12, ffn=3072, positions=514,
                   types=1, dropout=.1, epsilon=1e-5, from_scratch=False),
      fused_layers=6,  # [F]
      # False: image and text only meet in the head, to compare with.
      cross_attention=True,  # [F]
      # Pyramid and head [F]. An anchor's side is anchor_scale strides.
      head=dict(width=256, blocks=6, drop_block=.3, anchor_scale=8.,
                # The coarser level reads offsets as the released code does.
                released_offsets=True),
      channels='bgr',  # [F]; the coarse stage has rgb
      text_pool='mean',  # of the pooled state, for heads of one's own
      remat='full',
      image_mean=(.485, .456, .406), image_std=(.229, .224, .225))  # [F]
  _data(config, data, options.get('side', 96), tiny, name)
  if tiny:
    _tiny(config)
  else:
    _base(config, recipe, name)
  return config


def _data(config, data, side, tiny, recipe):
  """Input of one or several datasets."""
  names, scenes = data.split('+'), data == 'scenes'
  see = 'decode|fit|grounding'
  # How classes become a caption [F]; see data/ops_grounding.py.
  op = {'coco': 'grounding(negatives=-1)', 'odinw': 'grounding(negatives=-1)',
        'lvis': 'grounding(probabilities=(0.,0.,1.))'}.get(recipe, 'grounding')
  # Short side of {480, ..., 800}, mirrored half of the time, except for
  # expressions, which speak of left and right [F].
  scale = 'scale_crop(scales=(480,560,640,720,800),p=0.)'
  flip = '' if recipe in ('refexp', 'refcoco') else 'flip|'
  config.data = common.data(
      names, tokenizer=dict(kind='wordpiece' if scenes else 'bpe',
                            path='scenes' if scenes else 'roberta-base'),
      labels=common.labels(names, 'scenes' if scenes else 'coco'),
      # At most 800 x 1333, rounded up to 32 [F].
      buckets=((800, 1344), (1344, 800), (800, 1088), (1088, 800)),
      max_text=20 if scenes else 256,  # 256 [F]
      max_boxes=8 if scenes else 100, sentences=1, pp_eval=see,
      pp_train='decode|fit|grounding(class_share=.3)' if tiny else
               f'decode|{scale}|{flip}fit|{op}')
  for source in config.data.train if names[1:] else ():
    # A row for each caption, and for each image with boxes alone [F].
    source['weight'] = ('by_rows' if source['name'] in _DETECTION
                        else 'by_texts')
  if tiny:
    resize(config, side)
  if recipe == 'refcoco':
    config.data.unit = 'refexp'  # a row for each expression [F]
    common.evaluate(config, names, refexp=see)
  else:
    common.evaluate(config, names, unseen=scenes, grounding=see,
                    class_prompts=see)


def resize(config, side):
  """One square bucket; windows need not divide it."""
  config.data.buckets = ((side, side),)


def _groups(text, frozen):
  """Biases, and tables of relative positions with them, have twice the rate
  and no decay; norms, gates and scales do decay [F].

  Args:
    text: share of the learning rate for the text side, its cross-attention
      included.
    frozen: whether Swin's first stage is frozen, with its merging.
  """
  fixed = ((r'swin/(patch_.*|blocks_0_.*|merges_0/.*)', dict(freeze=True)),)
  return (*(fixed if frozen else ()),
          (r'text/.*bias', dict(lr_multiplier=2 * text, weight_decay=0.)),
          (r'text/.*', dict(lr_multiplier=text)),
          (r'.*bias', dict(lr_multiplier=2., weight_decay=0.)),
          (r'.*', dict()))


def _base(config, recipe, name):
  """AdamW; bfloat16 instead of float16 with loss scaling is ours [F]."""
  config.dtype = 'bfloat16'
  config.batch_size = recipe['batch']
  config.total_steps = steps = recipe['steps']
  drops = tuple(int(part * steps) for part in _DROPS)
  config.optim = dict(
      schedule='step', learning_rate=recipe['rate'],
      warmup_steps=recipe['warmup'], warmup_init=.001, decay_steps=drops,
      decay_factor=.1, optimizer='adamw', b1=.9, b2=.999, eps=1e-8,
      weight_decay=recipe['decay'], clip_norm=recipe['clip'],
      groups=_groups(recipe['text'], recipe['frozen']))
  if name in ('pretrain', 'refexp'):
    config.optim.weight_decay_steps = tuple(int(_DECAY_DROPS * step)
                                            for step in drops)
    config.optim.weight_decay_factor = .1


def _tiny(config):
  """Continues FIBER's coarse `tiny`; all values are our choice."""
  config.model.update(dict(
      swin=dict(width=32, depths=(1, 1, 4), heads=(1, 2, 4), patch=4,
                window=6, mlp_ratio=2., drop_path=0., epsilon=1e-5,
                from_scratch=True),
      roberta=dict(depth=3, width=128, heads=4, ffn=256,
                   positions=config.data.max_text + 2, types=1, dropout=0.,
                   epsilon=1e-5, from_scratch=True),
      # The smallest object is as large as an anchor of the finest level. On a
      # CPU a second block would take as long as the trunk.
      fused_layers=2, channels='rgb',
      head=dict(width=64, blocks=1, drop_block=0., anchor_scale=4.)))
  common.tiny(config, no_decay=r'.*(bias|/scale|/gate)|head/(scales|log_scale)',
              total_steps=1500, warm_steps=0, learning_rate=1e-3,
              warmup_steps=100, b2=.98, warmup_init=0., optimizer='adamw')
  del config.warm_start  # The coarse stage has trained the trunk.
  config.eval_every_steps = 750
