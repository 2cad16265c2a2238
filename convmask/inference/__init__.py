"""From predictions at network size to results at image size, and from several views of an image to one result."""

from .augmentation import TestTimeAugmentation, with_test_time_augmentation
from .instance_views import merge_instances
from .panoptic import panoptic_segmentation
from .panoptic_views import vote_panoptic
from .views import ViewOptions, views_of

__all__ = [
    "TestTimeAugmentation",
    "ViewOptions",
    "merge_instances",
    "panoptic_segmentation",
    "views_of",
    "vote_panoptic",
    "with_test_time_augmentation",
]
