"""Regions first, then a Transformer over them: how VQA was done before.

Times one image and its question from pixels to answer scores, with random
weights:

1. torchvision's Faster R-CNN, built as in bottom-up attention (Anderson et al.
   2018, the released test.prototxt): ResNet-101, images of 600 to 1,000 px,
   12 anchors a cell, 300 proposals, each cut out as 14x14 cells that go
   through the last stage of the ResNet (stride 1, dilated), 1,600 classes;
2. of the proposals, the 36 with the highest class scores, after NMS;
3. transformers' LxmertForQuestionAnswering, published sizes.

Where the two differ, it has less to do than the release: NMS runs over the best
class of a region, not over 1,600; no attributes; images are resized beforehand.
It computes in bfloat16 if config.dtype says so. torch.compile is not used.
"""
from e2e_vlp_jax.peers import on_torch

_SHORT, _LONG = 600, 1000  # sides of an image in pixels
_REGIONS = 36
_CLASSES = 1 + 1600
PROPOSALS = 300


class Peer:
  """A peer, as described in the package's docstring."""
  task = 'answer'
  extra = 'two-stage'

  def __init__(self, config, batch, sizes):
    """Builds detector, Transformer and inputs; see `peers.build`."""
    import torch  # pylint: disable=g-import-not-at-top
    import torchvision  # pylint: disable=g-import-not-at-top
    import transformers  # pylint: disable=g-import-not-at-top
    self._torch, self._on = torch, on_torch.Torch(config)
    self._nms = torchvision.ops.batched_nms
    self.version = (f'torchvision {torchvision.__version__}, transformers '
                    f'{transformers.__version__}, torch {torch.__version__}')
    self._detector = self.detector(_CLASSES)
    _shrink(self._detector.backbone)
    _shrink(self._detector.roi_heads)
    width = self._detector.roi_heads.box_predictor.cls_score.in_features
    self._lxmert = transformers.LxmertForQuestionAnswering(
        transformers.LxmertConfig(
            vocab_size=sizes['vocab_size'], visual_feat_dim=width,
            num_qa_labels=sizes['num_answers']))
    models = self._detector, self._lxmert
    for model in models:
      model.to(self._on.device).eval()
    self.parameters = sum(x.numel() for m in models for x in m.parameters())
    self._images = self._resize(batch['image'])
    self._question = [self._on.put(batch[k][:, 0].astype('int64'))
                      for k in ('text', 'text_mask')]

  def detector(self, classes):
    """torchvision's FasterRCNN for so many classes, background included."""
    # pylint: disable=g-import-not-at-top
    from torch import nn
    from torchvision import models, ops
    from torchvision.models import detection
    from torchvision.models.detection import rpn
    # pylint: enable=g-import-not-at-top
    trunk = models.resnet101(norm_layer=ops.FrozenBatchNorm2d,
                             replace_stride_with_dilation=(False, False, True))
    body = nn.Sequential(*list(trunk.children())[:-3])  # To layer3.
    body.out_channels = 1024
    return detection.FasterRCNN(
        body, min_size=_SHORT, max_size=_LONG,
        rpn_anchor_generator=rpn.AnchorGenerator(
            ((64, 128, 256, 512),), ((.5, 1., 2.),)),
        rpn_pre_nms_top_n_test=6000, rpn_post_nms_top_n_test=PROPOSALS,
        box_roi_pool=ops.MultiScaleRoIAlign(['0'], 14, 2),
        box_head=nn.Sequential(trunk.layer4, nn.AdaptiveAvgPool2d(1),
                               nn.Flatten()),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(2048, classes))

  def _resize(self, images):
    """uint8 [B, H, W, 3] -> list of B float [3, h, w] of the detector's size.

    The whole canvas of our bucket counts as the image.
    """
    x = self._on.put(images.transpose(0, 3, 1, 2)).float() / 255
    sides = x.shape[2:]
    scale = min(_SHORT / min(sides), _LONG / max(sides))
    return list(self._torch.nn.functional.interpolate(
        x, [round(s * scale) for s in sides], mode='bilinear'))

  def _regions(self):
    """(features [B, 36, D], boxes [B, 36, 4] as shares of the image)."""
    torch, heads = self._torch, self._detector.roi_heads
    images, _ = self._detector.transform(self._images)
    maps = self._detector.backbone(images.tensors)
    maps = {'0': maps} if isinstance(maps, torch.Tensor) else maps
    proposals, _ = self._detector.rpn(images, maps)
    features = heads.box_head(
        heads.box_roi_pool(maps, proposals, images.image_sizes))
    logits, _ = heads.box_predictor(features)
    scores, classes = logits.float().softmax(-1)[:, 1:].max(-1)
    self._counts = [len(p) for p in proposals]
    found = []
    for boxes, (h, w), *own in zip(
        proposals, images.image_sizes,
        *(x.split(self._counts) for x in (features, scores, classes))):
      feature, score, label = own
      # Boxes that NMS drops come last, so that there are always 36.
      score[self._nms(boxes, score, label, .3)] += 1.
      best = score.topk(_REGIONS).indices
      found.append((feature[best], boxes[best] / boxes.new_tensor(
          [w, h, w, h])))
    return [torch.stack(x) for x in zip(*found)]

  def step(self):
    """Answers the batch's questions; returns the scores, on the host."""
    text, mask = self._question
    with self._torch.inference_mode(), self._on.autocast():
      features, boxes = self._regions()
      found = self._lxmert(input_ids=text, attention_mask=mask,
                           visual_feats=features, visual_pos=boxes)
      return found.question_answering_score.float().sigmoid().cpu()

  def details(self):
    """{'image' (height, width), 'proposals', 'regions'} of the first image."""
    return {'image': list(self._images[0].shape[1:]),
            'proposals': self._counts[0], 'regions': _REGIONS}


def _shrink(model):
  """Ends each residual branch of an untrained ResNet with a factor of 0.

  Without it, frozen BN lets activations double with every block, and the boxes
  would be as large as the image, hence few. Nothing is computed less.
  """
  for module in model.modules():
    if hasattr(module, 'bn3'):
      module.bn3.weight.zero_()
