"""transformers' DetrForObjectDetection (torch), trained like DETR.

It has the same trunk, width, layers, queries, images, boxes, auxiliary losses
and gradient clipping as our model, and AdamW with a tenth of the learning rate
in the trunk. It uses autocast to bfloat16 if config.dtype is bfloat16, and
torch.compile on a GPU. Matching runs in scipy on the host, as in transformers.
"""
import os

import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import resnet


class Peer:
  """A peer, as described in the package's docstring."""
  name = 'hf_detr'

  def __init__(self, config, batch, num_classes):
    import torch  # pylint: disable=g-import-not-at-top
    import transformers  # pylint: disable=g-import-not-at-top
    c = config.model
    if c.get('backbone', {}).get('name') != 'resnet' or (
        'decoder_layers' not in c or c.use_text):
      raise errors.UserError(
          '--peer hf_detr: needs a DETR with a ResNet and without text; use '
          '--config configs/e2e_vlp.py:detr')
    self._torch = torch
    self._gpu = torch.cuda.is_available()
    self._bfloat16 = config.dtype == 'bfloat16'
    self.version = (f'transformers {transformers.__version__}, torch '
                    f'{torch.__version__}'
                    + (', torch.compile' if self._gpu else ''))
    # As many threads as XLA uses.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(config.seed)
    device = torch.device('cuda' if self._gpu else 'cpu')

    bottleneck = resnet.BOTTLENECK[c.backbone.depth]
    trunk = transformers.ResNetConfig(
        embedding_size=64, depths=list(resnet.BLOCKS[c.backbone.depth]),
        hidden_sizes=[64 * 2**i * (4 if bottleneck else 1) for i in range(4)],
        layer_type='bottleneck' if bottleneck else 'basic',
        out_features=['stage4'])
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=trunk, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, d_model=c.width,
        encoder_layers=c.encoder_layers, decoder_layers=c.decoder_layers,
        encoder_attention_heads=c.attention_heads,
        decoder_attention_heads=c.attention_heads,
        encoder_ffn_dim=c.ffn, decoder_ffn_dim=c.ffn,
        num_queries=c.num_queries, num_labels=num_classes, dropout=c.dropout,
        auxiliary_loss=True))
    # Train the trunk from its second stage on, as DETR does. We set this by
    # hand, since transformers freezes all of its own ResNet: it looks for
    # parameter names that do not occur there.
    rest, slow = [], []
    for name, x in model.named_parameters():
      if 'backbone' in name:
        x.requires_grad_('.encoder.stages.' in name
                         and '.stages.0.' not in name)
      if x.requires_grad:
        (slow if 'backbone' in name else rest).append(x)
    rate = config.optim.learning_rate
    self._parameters = rest + slow
    self._clip = config.optim.clip_norm
    self.parameters = sum(x.numel() for x in model.parameters())
    model.to(device).train()
    self._optimizer = torch.optim.AdamW(
        [{'params': rest, 'lr': rate}, {'params': slow, 'lr': rate * .1}],
        weight_decay=config.optim.weight_decay, fused=True)
    self._model = torch.compile(model) if self._gpu else model

    mean, std = (np.asarray(c[k], np.float32)
                 for k in ('image_mean', 'image_std'))
    pixels = (batch['image'].astype(np.float32) / 255 - mean) / std
    pixels = pixels * batch['image_mask'][..., None]
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)
    self._inputs = dict(
        pixel_values=put(pixels.transpose(0, 3, 1, 2)),
        pixel_mask=put(batch['image_mask'].astype(np.int64)),
        labels=[{'class_labels': put(batch['box_labels'][i][m]).long(),
                 'boxes': put(batch['boxes'][i][m])}
                for i, m in enumerate(batch['box_mask'])])

  def step(self):
    """Runs one optimisation step; waits for it and returns its loss."""
    torch = self._torch
    self._optimizer.zero_grad(set_to_none=True)
    with torch.autocast('cuda' if self._gpu else 'cpu', torch.bfloat16,
                        enabled=self._bfloat16):
      loss = self._model(**self._inputs).loss
    loss.backward()
    if self._clip:
      torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
    self._optimizer.step()
    if self._gpu:
      torch.cuda.synchronize()
    return float(loss.detach())
