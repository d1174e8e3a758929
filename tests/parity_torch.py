"""The other side of the parity tests: transformers with the seeded weights.

Everything returns {name: numpy array} with the names that the tests use.
"""
import numpy as np
import torch
import transformers

from tests import parity
from e2e_vlp_jax.models import resnet as our_resnet
from e2e_vlp_jax.weights import mapping

WITH = f'transformers {transformers.__version__}, torch {torch.__version__}'


def seed(source, model):
  """Overwrites every tensor of a transformers model with its seeded value."""
  source = mapping.find(source)
  with torch.no_grad():
    for name, x in model.state_dict().items():
      name = source.canonical(name)
      # A tied tensor has the value of the one that it repeats.
      if x.dtype.is_floating_point and name not in source.COPIES:
        x.copy_(torch.from_numpy(parity.seeded(name, x.shape)))
  return model.eval()


def _resnet_config(depth, **options):
  bottleneck = our_resnet.BOTTLENECK[depth]
  sizes = [64 * 2**i * (4 if bottleneck else 1) for i in range(4)]
  return transformers.ResNetConfig(
      embedding_size=64, hidden_sizes=sizes,
      depths=list(our_resnet.BLOCKS[depth]),
      layer_type='bottleneck' if bottleneck else 'basic', **options)


def detr(case):
  """DetrForObjectDetection of a parity.Detr, with seeded weights."""
  c = case
  model = transformers.DetrForObjectDetection(transformers.DetrConfig(
      backbone_config=_resnet_config(c.depth, out_features=['stage4']),
      use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
      d_model=c.width, encoder_layers=c.encoder, decoder_layers=c.decoder,
      encoder_attention_heads=c.heads,
      decoder_attention_heads=c.heads,
      encoder_ffn_dim=c.ffn, decoder_ffn_dim=c.ffn, num_queries=c.queries,
      num_labels=c.classes, dropout=0., auxiliary_loss=True))
  # DETR trains layer2 to layer4; with its own ResNet transformers freezes
  # all of the trunk, by a name that does not match.
  for name, x in model.named_parameters():
    if '.encoder.stages.' in name and '.stages.0.' not in name:
      x.requires_grad_(True)
  return seed('hf_detr', model)


def _pixels(case):
  """The case's images, normalised, zero where padded: [B, 3, H, W]."""
  batch = {k: np.array(v) for k, v in case.batch().items()}
  mean, std = (np.asarray(case.config.model[k], np.float32)
               for k in ('image_mean', 'image_std'))
  pixels = (batch['image'].astype(np.float32) / 255 - mean) / std
  pixels = pixels * batch['image_mask'][..., None]
  return torch.from_numpy(pixels.transpose(0, 3, 1, 2))


def detr_results(case, aux=True, model=None):
  """Outputs of every layer, loss, its parts, gradients, for the case's batch.

  With `auxiliary_loss=True` transformers hands the *normalised* state of a
  decoder layer on to the next one and normalises the last state twice; in the
  original DETR, with which the published weights were trained, the norm is
  for the heads alone. So the layers' states are taken from its forward pass
  without that option, and go through its own norm, heads and loss.
  """
  model = model or detr(case)
  model.config.auxiliary_loss = False
  batch = {k: np.array(v) for k, v in case.batch().items()}
  labels = [{'class_labels': torch.from_numpy(batch['box_labels'][i][m]).long(),
             'boxes': torch.from_numpy(batch['boxes'][i][m])}
            for i, m in enumerate(batch['box_mask'])]
  states = []
  hooks = [layer.register_forward_hook(lambda m, args, out: states.append(out))
           for layer in model.model.decoder.layers]
  model.zero_grad()
  out = model(pixel_values=_pixels(case),
              pixel_mask=torch.from_numpy(batch['image_mask']).long())
  for hook in hooks:
    hook.remove()
  states = model.model.decoder.layernorm(torch.stack(states))
  logits = model.class_labels_classifier(states)
  boxes = model.bbox_predictor(states).sigmoid()
  model.config.auxiliary_loss = aux
  loss, parts, _ = model.loss_function(
      out.logits, labels, model.device, out.pred_boxes, model.config, logits,
      boxes)
  loss.backward()
  results = {'logits': out.logits, 'boxes': out.pred_boxes, 'loss': loss,
             **{k: v for k, v in parts.items() if 'loss' in k}}
  for i in range(case.decoder - 1):
    results[f'logits_{i}'], results[f'boxes_{i}'] = logits[i], boxes[i]
  canonical = mapping.find('hf_detr').canonical
  for name, x in model.named_parameters():
    if x.requires_grad:
      results[f'grad/{canonical(name)}'] = x.grad
  return _numpy(results)


def detr_alone(case):
  """Logits and boxes of each image without the others and their padding."""
  model, pixels = detr(case), _pixels(case)
  model.config.auxiliary_loss = False
  with torch.no_grad():
    outs = [model(x[None, :, :h, :w])
            for x, (h, w) in zip(pixels, case.sizes)]
  return _numpy({'logits': torch.cat([o.logits for o in outs]),
                 'boxes': torch.cat([o.pred_boxes for o in outs])})


def resnet(depth):
  """ResNetModel, with seeded weights."""
  return seed('hf_resnet', transformers.ResNetModel(_resnet_config(depth)))


def resnet_results(depth):
  """Maps of the four stages in eval and train mode; statistics after."""
  model = resnet(depth)
  pixels = torch.from_numpy(parity.resnet_pixels().transpose(0, 3, 1, 2))
  results = {}
  for mode in ('eval', 'train'):
    model.train(mode == 'train')
    with torch.no_grad():
      out = model(pixels, output_hidden_states=True)
    for i, x in enumerate(out.hidden_states[1:], 1):
      results[f'{mode}/stage{i}'] = x.permute(0, 2, 3, 1)
  results.update({f'after/{k}': x for k, x in model.state_dict().items()
                  if k.endswith(('running_mean', 'running_var'))})
  return _numpy(results)


def bert(case):
  """BertForPreTraining of a parity.Bert, with seeded weights."""
  return seed('hf_bert', transformers.BertForPreTraining(
      transformers.BertConfig(
          vocab_size=case.vocabulary, hidden_size=case.width,
          num_hidden_layers=case.layers, num_attention_heads=case.heads,
          intermediate_size=case.ffn, type_vocab_size=case.types,
          max_position_embeddings=case.positions)))


def bert_results(case):
  """States of every layer and the heads for the case's batch."""
  model, batch = bert(case), case.batch()
  args = dict(
      input_ids=torch.from_numpy(np.array(batch['text'][:, 0])).long(),
      attention_mask=torch.from_numpy(np.array(batch['text_mask'][:, 0])
                                      ).long())
  with torch.no_grad():
    out = model(**args, output_hidden_states=True)
    pooled = model.bert(**args).pooler_output
  results = {'mlm': out.prediction_logits, 'nsp': out.seq_relationship_logits,
             'pooler': pooled, 'embedding': out.hidden_states[0]}
  for i, x in enumerate(out.hidden_states[1:]):
    results[f'layer{i}'] = x
  return _numpy(results)


def _numpy(results):
  return {k: np.array(v.detach().numpy(), np.float32)
          for k, v in results.items()}
