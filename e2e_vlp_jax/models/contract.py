"""The contract of a model: methods and tables on which the library relies.

A model is one file of this package with a class `Model(contract.BaseModel)`;
`models.build` finds it by `config.model.name`. Training, evaluation, tasks
and conversion only use the following.

**Features.** All image and text features are pytrees of arrays whose leading
axes are [B] and [B, S] (P where the texts are paired with the image). They can
be cached and combined with other texts or images.
- `encode_image(batch, train)`: `batch['image']` [B, H, W, 3] and
  `batch['image_mask']` -> image features, before any text is known.
- `encode_text(ids, mask, train)`: [B, S, L] -> text features.
- `pooled_image(image)`: image features -> [B, D], one state of each image
  without a text, for the evaluator `linear_probe`.
- `fuse(image, text, train, want)`: image features [B] and text features
  [B, P] -> `Fused`, with at least the parts named in `want`.
- `pairs(image, text, heads, train)`: `fuse` and the outputs of `heads`.

**Views and heads.** A view is a named combination of these calls; a head
computes outputs from a named state of a view.
- `views`: {name: `View`}, the views of this model under its config.
- `__call__(batch, requests, train)`: runs the requested views, {view: heads},
  and returns {view: {output name: array}}. Computations that views share run
  only once. `model.views` itself requests everything.
- `heads`: the names of all heads; `offers(view, head)`.
- `config.model.heads` adds heads: {name: dict(kind='classifier', views=
  ('joint',), state='pooled', outputs='answers', ...)}. Their output is
  `<name>_logits`, their parameters are `heads_<name>`. A head in the view
  `pair` reads the pooled states of two images (`batch['image']`,
  `batch['second_image']`) fused with one text, side by side.

**Generation**, for models that offer the head `captioning` in `image_only`:
- `decode_start(image, length)`: image features -> cache for texts of up to
  `length` tokens (by default the model's maximum).
- `decode_step(cache, ids)`: the next token of each text, [B] -> the logits
  [B, V] of the token after it, and the new cache. Equal to the causal pass
  over the whole text; keys and values of earlier tokens are in the cache.
  Every array of a cache leads with [B]; those under 'image' never change.
- `beam_search`: 'standard' or 'released', see models/beam_search.py.

**Detection**, for models that offer `detection` in `image_only`:
- `detect(image, text=None, train)`: image features -> `pred_logits`,
  `pred_boxes`, `aux_outputs`, ..., as DETR names them.

**Boxes for a text**, for models that offer the view `grounded`, which depends
on the image and P texts:
- `detect(image, text, train)`: image features and text features [B, P] ->
  at least `pred_boxes` [B, P, Q, 4] (cx, cy, w, h relative to the image).
- the head `boxes` gives the same, of each decoder layer before the last
  (`aux_boxes` [B, P, layers - 1, Q, 4]) as well; heads of the config read the
  state `queries` [B, P, Q, D].

**Training and checkpoints**
- `keeps_past_examples`: whether losses also see examples of earlier batches.
- `batchless_outputs`: names of outputs without a row per example; all others
  are split over the devices like the batch.
- `towers`: the order of the layers, for `config.optim.layer_decay`.
- `frozen`: the groups of `config.optim.groups` by which parameters are
  frozen; see `layers.is_frozen`. `build` fills it in.
- `describe(config)`, a function of the model's file and optional: the `model`
  part of a config in one line, for reports.
- `adapt(loaded, params)`: a checkpoint's parameters, changed where parameters
  depend on the size of the input.
- the random streams 'dropout' (in training) and 'sample' (for random choices
  of a view). Without 'sample', `hard_negative` takes the most likely choice
  and `mvm` cannot run.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers

FUSED = ('text', 'image', 'pooled')


class Fused(NamedTuple):
  """What `fuse` returns; parts that were not asked for may be None.

  Attributes:
    text: [B, P, L, E] states of the text's tokens.
    image: [B, P, N, E] states of the image's tokens.
    pooled: [B, P, E'] one state per pair, which classifiers read.
  """
  text: Any = None
  image: Any = None
  pooled: Any = None


@dataclasses.dataclass(frozen=True)
class View:
  """A row of `views`.

  Iterating yields the heads, so a View also works as a request for all heads.

  Attributes:
    call: method of the model, (pieces, view, want) -> {state: array}.
    inputs: pieces that it reads: 'image', 'text', ...
    heads: names of the heads that can be asked for.
    states: the states that heads of `config.model.heads` may read.
  """
  call: str
  inputs: tuple[str, ...]
  heads: tuple[str, ...]
  states: tuple[str, ...] = ()

  def __iter__(self):
    return iter(self.heads)


class Head(NamedTuple):
  """A row of `HEADS`: the states that a head reads, and the model's method that
  computes its outputs from them, {state: array} -> {name: array}."""
  states: tuple[str, ...]
  call: str


FUSED_VIEW = dict(call='fused_states', states=FUSED)


class Pieces:
  """Computations that the views of one call share; each runs only once.

  Attributes:
    batch, requests, train: the arguments of the call.
  """

  def __init__(self, model, batch, requests, train):
    self.batch, self.requests, self.train = batch, requests, train
    self._functions, self._made = model.pieces, {}

  def __getitem__(self, name):
    if name not in self._made:
      self._made[name] = self._functions[name](self)
    return self._made[name]


class BaseModel(nn.Module):
  """See the module's docstring.

  A model defines `setup` (which calls `setup_heads`), `table`, `encode_image`,
  `encode_text` and `fuse`, and what else it offers.

  Attributes:
    config: the `model` part of a config.
    vocab_size, num_classes, num_attributes, num_answers: sizes of its
      vocabularies.
    dtype: dtype of the computation; parameters stay float32.
    frozen: ((regex, bool), ...) of `config.optim.groups`.
  """
  config: Any
  vocab_size: int
  num_classes: int
  num_attributes: int
  dtype: Any = jnp.float32
  num_answers: int = 0
  frozen: tuple[tuple[str, bool], ...] = ()

  # {name: Head} of the heads that the model's own `table` names.
  HEADS = {}
  batchless_outputs = ()

  # --- Tables -----------------------------------------------------------------

  @property
  def table(self) -> dict[str, View]:
    """The views with the model's own heads, in the order in which they run."""
    raise NotImplementedError

  @property
  def pieces(self):
    """{name: function of Pieces}: computations that views can share."""
    encode = lambda key: lambda p: self.encode_text(
        p.batch[key], p.batch[f'{key}_mask'], p.train)

    def second_image(p):
      if self.is_initializing() and 'second_image' not in p.batch:
        return p['image']  # Parameters are the same, whatever it shows.
      return self.encode_image(
          {k: p.batch[f'second_{k}'] for k in ('image', 'image_mask')},
          p.train)
    return {
        'image': lambda p: self.encode_image(p.batch, p.train),
        'second_image': second_image,
        'text': encode('text'), 'masked_text': encode('masked_text')}

  @property
  def views(self) -> dict[str, View]:
    """`table` with the heads of `config.model.heads`."""
    views = self.table
    if 'joint' in views:
      views['pair'] = View('paired_states', ('image', 'second_image', 'text'),
                           (), ('pooled',))
    for name, options in self.head_options.items():
      for view in options['views']:
        if view not in views:
          raise errors.UserError(
              f'model.heads.{name}.views: no view {view!r}'
              + errors.nearest(view, views))
        if options['state'] not in views[view].states:
          raise errors.UserError(
              f'model.heads.{name}.state: the view {view!r} has no state '
              f'{options["state"]!r}'
              + errors.nearest(options['state'], views[view].states))
        views[view] = dataclasses.replace(
            views[view], heads=(*views[view].heads, name))
    return {name: view for name, view in views.items() if view.heads}

  @property
  def heads(self) -> tuple[str, ...]:
    """Names of all heads."""
    return tuple(sorted({h for view in self.views.values() for h in view}))

  def offers(self, view: str, head: str) -> bool:
    """Whether `view` has `head`."""
    views = self.views
    return view in views and head in views[view].heads

  @property
  def head_options(self):
    """{name: dict} of `config.model.heads`, with every default filled in."""
    return {name: {'kind': 'classifier', 'state': 'pooled',
                   'views': ('joint',), **options}
            for name, options in dict(self.config.get('heads', {})).items()}

  @property
  def keeps_past_examples(self) -> bool:
    """Whether losses also see examples of earlier batches."""
    return False

  @property
  def towers(self) -> Sequence[Sequence[str]]:
    """Lists of layers from the input to the output, in regexes of parameters.

    There is one list for each trunk of its own. What is in none, such as the
    heads, lies above all layers.
    """
    return ()

  def backbone_layers(self):
    """The layers of `make_backbone`, for `towers`."""
    options = dict(self.config.backbone)
    module = discovery.load(__package__, options.pop('name'), 'BACKBONE',
                            'model.backbone.name')
    layers = getattr(module, 'layer_patterns', lambda **_: ('.*',))
    return [f'backbone/{pattern}' for pattern in layers(**options)]

  @property
  def beam_search(self):
    """Variant of the caption search; see models/beam_search.py."""
    return self.config.get('beam_search', 'standard')

  # --- Set-up -----------------------------------------------------------------

  def setup_heads(self):
    """Makes the modules of `config.model.heads`."""
    for name, options in self.head_options.items():
      if name in self.HEADS:
        raise errors.UserError(f'model.heads.{name}: the model has a head of '
                               'this name; choose another one')
      kind, outputs = options.pop('kind'), options.pop('outputs', None)
      del options['views'], options['state']
      if kind not in heads_lib.KINDS:
        raise errors.UserError(f'model.heads.{name}.kind: {kind!r}'
                               + errors.nearest(kind, heads_lib.KINDS))
      module = heads_lib.KINDS[kind]
      for key in options:
        if key not in module.__dataclass_fields__:
          raise errors.UserError(
              f'model.heads.{name}.{key}: no such option'
              + errors.nearest(key, module.__dataclass_fields__))
      setattr(self, f'heads_{name}', module(
          outputs=self._count(name, outputs), dtype=self.dtype, **options))

  def _count(self, name, outputs):
    """Number of outputs of a head of the config."""
    sizes = {'answers': self.num_answers, 'classes': self.num_classes,
             'attributes': self.num_attributes}
    count = sizes.get(outputs, outputs)
    if not isinstance(count, int) or count < 1:
      raise errors.UserError(
          f'model.heads.{name}.outputs: {outputs!r}'
          + (f', of which there are {count}' if outputs in sizes else '')
          + f'; expected a number, or one of {", ".join(sizes)} with at least '
          'one entry')
    return count

  def make_backbone(self):
    """The CNN of `config.model.backbone`, for a model's `setup`."""
    options = dict(self.config.backbone)
    module = discovery.load(__package__, options.pop('name'), 'BACKBONE',
                            'model.backbone.name')
    return module(dtype=self.dtype, frozen=self.frozen, **options)

  # --- Calls ------------------------------------------------------------------

  def __call__(self, batch: Mapping[str, Any],
               requests: Mapping[str, Sequence[str]],
               train: bool = False) -> dict[str, dict[str, Any]]:
    """Runs the requested views.

    Args:
      batch: see docs/data.md; only what the views read is needed.
      requests: {view: heads}.
      train: dropout, stochastic depth, BatchNorm statistics and other state.

    Returns:
      {view: {name of an output: array}}.

    Raises:
      UserError: the model does not have a view or head.
    """
    self.check(requests)
    pieces = Pieces(self, batch, requests, train)
    out = {}
    for name in self.views:
      if name in requests:
        out[name] = self.outputs_of(name, pieces)
    if self.is_initializing():
      self.complete(pieces)
    return out

  def check(self, requests):
    """UserError if the model lacks a view or a head of {view: heads}."""
    views = self.views
    for view, heads in requests.items():
      if view not in views:
        raise errors.UserError(f'no view {view!r} in model '
                               f'{self.config.name!r}'
                               + errors.nearest(view, views))
      for head in heads:
        if head not in views[view].heads:
          raise errors.UserError(
              f'no head {head!r} of the view {view!r} in model '
              f'{self.config.name!r}'
              + errors.nearest(head, views[view].heads))

  @nn.nowrap
  def outputs_of(self, name, pieces):
    """{name of an output: array} of a requested view of `pieces`.

    For callers that want some of the pieces, too (features of an image and
    its embedding, say): none is computed twice.
    """
    view, heads = self.views[name], tuple(pieces.requests[name])
    states = getattr(self, view.call)(pieces, view, self._states(heads))
    return self._outputs(heads, states, pieces.train)

  def complete(self, pieces):
    """Creates parameters that the requested views did not need."""

  def adapt(self, loaded, params):
    """See `models.adapt`."""
    del params
    return loaded

  def pooled_image(self, image):
    """Mean of the image's tokens, [B, D]; image: from `encode_image`."""
    return layers.masked_mean(image['tokens'], image['mask'])

  def pairs(self, image, text, heads, train=False):
    """The outputs of `heads` for P pairs an image.

    Args:
      image: from `encode_image`.
      text: from `encode_text`, [B, P].
      heads: such as ('itm',).
      train: dropout.

    Returns:
      {name of an output: array [B, P, ...]}.
    """
    fused = self.fuse(image, text, train, self._states(heads))
    return self._outputs(heads, fused._asdict(), train)

  def _states(self, heads):
    """The states that `heads` read."""
    options = self.head_options
    return frozenset(s for h in heads for s in (
        (options[h]['state'],) if h in options else self.HEADS[h].states))

  def _outputs(self, heads, states, train):
    """The outputs of `heads`, from {state: array}."""
    out, options = {}, self.head_options
    for name in heads:
      if name in options:
        module = getattr(self, f'heads_{name}')
        out[f'{name}_logits'] = module(states[options[name]['state']], train)
      else:
        out.update(getattr(self, self.HEADS[name].call)(states))
    return out

  # --- Views that every model with texts has ----------------------------------

  def fused_states(self, pieces, view, want):
    """The image with each text of the view's second input."""
    image, text = (pieces[name] for name in view.inputs)
    return self.fuse(image, text, pieces.train, want)._asdict()

  def paired_states(self, pieces, view, want):
    """Two images with each text: pooled states side by side [B, P, 2E']."""
    del want
    first, second = (
        self.fuse(pieces[name], pieces['text'], pieces.train,
                  ('pooled',)).pooled for name in view.inputs[:2])
    return {'pooled': jnp.concatenate([first, second], -1)}
