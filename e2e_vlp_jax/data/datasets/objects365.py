"""`objects365`: 1.7 million photographs with boxes of 365 classes.

  python -m e2e_vlp_jax.prepare objects365 --source DIR --data_dir data

Objects365 v2 (Shao et al., ICCV 2019), https://www.objects365.org. DIR holds
  zhiyuan_objv2_{train,val}.json
(or in annotations/) and the images as in `file_name`, images/v1/patch0/... and
so on, below DIR, DIR/train and DIR/val; folders or .zip. FIBER trains on 0.66
million images of version 1, whose files have the same form.

The class names are stored as they stand in the files ('Cabinet/shelf'); the op
`grounding` writes them as captions.
"""
from e2e_vlp_jax.data.datasets import coco_classes

_CLASSES = 365


class Builder(coco_classes.CocoClasses):
  """COCO's layout under other names."""
  name = 'objects365'
  FILES = {'train': ('zhiyuan_objv2_train.json', 'objects365_train.json'),
           'validation': ('zhiyuan_objv2_val.json', 'objects365_val.json')}
  IMAGES = {'train': ('train', 'images/train', 'images', ''),
            'validation': ('val', 'images/val', 'images', '')}
  NUM_CLASSES = _CLASSES
