"""`two_stage` with the detector that torchvision itself builds.

Its feature pyramid has a head of two matrix products a region, which takes far
fewer FLOPs than bottom-up attention's. LXMERT's published features are not of
this kind: it shows how much of the difference is the detector's head.
"""
from e2e_vlp_jax.peers import two_stage


class Peer(two_stage.Peer):
  """A peer, as described in the package's docstring."""

  def detector(self, classes):
    """Overrides the detector of `two_stage`."""
    # pylint: disable=g-import-not-at-top
    from torchvision.models import detection
    # pylint: enable=g-import-not-at-top
    return detection.FasterRCNN(
        detection.backbone_utils.resnet_fpn_backbone(
            backbone_name='resnet101', weights=None),
        classes, min_size=600, max_size=1000,
        rpn_post_nms_top_n_test=two_stage.PROPOSALS)
