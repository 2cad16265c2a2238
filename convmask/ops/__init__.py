"""ConvMask's operators: ``torch.ops.convmask.*`` and a typed, documented function for each.

Compiled kernels are optional. Without them the plain PyTorch references run; ``extension_status`` says why.
"""

from __future__ import annotations

from convmask.ops._extension import extension_status, load_extension
from convmask.ops.embedding_masks import (
    ValuesInBoxes,
    embedding_masks,
    embedding_masks_in_boxes,
    embedding_masks_in_boxes_reference,
    embedding_masks_reference,
)
from convmask.ops.fuse_kernels import fuse_kernels, fuse_kernels_reference
from convmask.ops.inside_outside_assemble import inside_outside_assemble, inside_outside_assemble_reference
from convmask.ops.mask_voting import mask_voting, mask_voting_reference
from convmask.ops.panoptic_merge import panoptic_merge, panoptic_merge_reference
from convmask.ops.ps_roi_pool import ps_roi_pool, ps_roi_pool_reference
from convmask.ops.region_kernels import region_kernels, region_kernels_reference

load_extension()  # after the schemas above: a kernel that does not fit its schema is found here

__all__ = [
    "ValuesInBoxes",
    "embedding_masks",
    "embedding_masks_in_boxes",
    "embedding_masks_in_boxes_reference",
    "embedding_masks_reference",
    "extension_status",
    "fuse_kernels",
    "fuse_kernels_reference",
    "inside_outside_assemble",
    "inside_outside_assemble_reference",
    "mask_voting",
    "mask_voting_reference",
    "panoptic_merge",
    "panoptic_merge_reference",
    "ps_roi_pool",
    "ps_roi_pool_reference",
    "region_kernels",
    "region_kernels_reference",
]
