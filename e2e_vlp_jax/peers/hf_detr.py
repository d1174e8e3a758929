"""transformers' DetrForObjectDetection (torch), trained like DETR.

It has the same trunk, width, layers, queries, images, boxes, auxiliary losses
and gradient clipping as our model, and AdamW with a tenth of the learning rate
in the trunk. It uses autocast to bfloat16 if config.dtype is bfloat16, and
torch.compile on a GPU, for all but the loss: its matching runs in scipy on the
host, as in transformers, and torch.compile finds no end in it.
"""
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.peers import on_torch


class Peer:
  """A peer, as described in the package's docstring."""
  task = None
  extra = 'torch'

  def __init__(self, config, batch, sizes, compiled=None):
    """Builds model, optimizer and inputs.

    Args:
      config, batch, sizes: see `peers.build`.
      compiled: whether to use torch.compile; None = on a GPU.

    Raises:
      UserError: our model is not DETR.
    """
    import torch  # pylint: disable=g-import-not-at-top
    import transformers  # pylint: disable=g-import-not-at-top
    c = config.model
    if c.get('backbone', {}).get('name') != 'resnet' or (
        'decoder_layers' not in c or c.use_text):
      raise errors.UserError(
          '--peer hf_detr: needs a DETR with a ResNet and without text; use '
          '--config configs/e2e_vlp.py:detr')
    self._torch, self._on = torch, on_torch.Torch(config)
    self._compiled = self._on.gpu if compiled is None else compiled
    self.version = (f'transformers {transformers.__version__}, torch '
                    f'{torch.__version__}'
                    + (', torch.compile' if self._compiled else ''))
    self._model = transformers.DetrForObjectDetection(
        _config(transformers, c, sizes['num_classes']))
    self.parameters = sum(x.numel() for x in self._model.parameters())
    self._optimizer = self._train(config.optim)
    self._outputs = torch.compile(self._predict) if self._compiled else (
        self._predict)
    self._inputs, self._labels = self._place(c, batch)

  def _train(self, optim):
    """The optimizer; also says which parameters it trains."""
    # Train the trunk from its second stage on, as DETR does. We set this by
    # hand, since transformers freezes all of its own ResNet: it looks for
    # parameter names that do not occur there.
    rest, slow = [], []
    for name, x in self._model.named_parameters():
      if 'backbone' in name:
        x.requires_grad_('.encoder.stages.' in name
                         and '.stages.0.' not in name)
      if x.requires_grad:
        (slow if 'backbone' in name else rest).append(x)
    self._parameters, self._clip = rest + slow, optim.clip_norm
    self._model.to(self._on.device).train()
    return self._torch.optim.AdamW(
        [{'params': rest, 'lr': optim.learning_rate},
         {'params': slow, 'lr': optim.learning_rate * .1}],
        weight_decay=optim.weight_decay, fused=True)

  def _place(self, c, batch):
    """(images and their masks, labels), on the device."""
    put = self._on.put
    mean, std = (np.asarray(c[k], np.float32)
                 for k in ('image_mean', 'image_std'))
    pixels = (batch['image'].astype(np.float32) / 255 - mean) / std
    pixels = pixels * batch['image_mask'][..., None]
    return ((put(pixels.transpose(0, 3, 1, 2)),
             put(batch['image_mask'].astype(np.int64))),
            [{'class_labels': put(batch['box_labels'][i][m]).long(),
              'boxes': put(batch['boxes'][i][m])}
             for i, m in enumerate(batch['box_mask'])])

  def _predict(self, pixels, mask):
    """(logits, boxes, those of every layer): DetrForObjectDetection's."""
    model = self._model
    found = model.model(pixels, pixel_mask=mask)
    heads = lambda x: (model.class_labels_classifier(x),
                       model.bbox_predictor(x).sigmoid())
    return (*heads(found.last_hidden_state),
            *heads(found.intermediate_hidden_states))

  def loss(self):
    """The loss of the batch, with auxiliary losses."""
    logits, boxes, *layers = self._outputs(*self._inputs)
    return self._model.loss_function(
        logits, self._labels, self._on.device, boxes, self._model.config,
        *layers)[0]

  def step(self):
    """Runs one optimisation step; waits for it and returns its loss."""
    self._optimizer.zero_grad(set_to_none=True)
    with self._on.autocast():
      loss = self.loss()
    loss.backward()
    if self._clip:
      self._torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
    self._optimizer.step()
    self._on.wait()
    return float(loss.detach())

  def details(self):
    """{'graphs', 'graph_breaks'} of torch.compile; {} if it is not used."""
    if not self._compiled:
      return {}
    from torch._dynamo import utils  # pylint: disable=g-import-not-at-top
    breaks = utils.counters['graph_break']
    return {'graphs': utils.counters['stats']['unique_graphs'],
            'graph_breaks': sum(breaks.values()),
            # The first line of a reason says what, the others what to do.
            'graph_break_reasons': sorted({r.strip().splitlines()[0]
                                           for r in breaks})}


def _config(transformers, c, num_classes):
  """DetrConfig with the sizes of our `config.model`."""
  bottleneck = resnet.BOTTLENECK[c.backbone.depth]
  trunk = transformers.ResNetConfig(
      embedding_size=64, depths=list(resnet.BLOCKS[c.backbone.depth]),
      hidden_sizes=[64 * 2**i * (4 if bottleneck else 1) for i in range(4)],
      layer_type='bottleneck' if bottleneck else 'basic',
      out_features=['stage4'])
  return transformers.DetrConfig(
      backbone_config=trunk, use_timm_backbone=False,
      use_pretrained_backbone=False, backbone=None, d_model=c.width,
      encoder_layers=c.encoder_layers, decoder_layers=c.decoder_layers,
      encoder_attention_heads=c.attention_heads,
      decoder_attention_heads=c.attention_heads,
      encoder_ffn_dim=c.ffn, decoder_ffn_dim=c.ffn,
      num_queries=c.num_queries, num_labels=num_classes, dropout=c.dropout,
      auxiliary_loss=True)
