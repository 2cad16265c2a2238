// Assembly of inside/outside score maps (Li et al., arXiv 1611.07709, section 3). The rules, in words, are in
// convmask/ops/inside_outside_assemble.py; bins are those of csrc/ps_roi_pool.
//
//   maps   (N, k, k, 2, C, H, W)  float16, bfloat16, float32, float64, any strides
//   rois   (R, 5)                 any floating type
//   labels (R,)                   int64, or none
// -> scores      (R, C)           mean over the bins of max(outside, inside)
//    mask_logits (R, 2, P, P)     the pair of one class
//    classes     (R,)             int64: the labels, or the class >= first_class of the highest score
//
// The backward finds the winners anew; its result has stride 1 over the classes. CPU: deterministic. CUDA: the backward
// adds with atomic operations. Neither synchronises host and device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../ps_roi_pool/ps_roi_pool.h"

namespace convmask {

inline void check_inside_outside_assemble(const Tensor& maps, const Tensor& rois, const std::optional<Tensor>& labels,
                                          int64_t output_size, int64_t first_class) {
  TORCH_CHECK(maps.dim() == 7 && maps.size(1) == maps.size(2) && maps.size(3) == 2,
              "maps must have shape (N, k, k, 2, C, H, W), not ", maps.sizes());
  TORCH_CHECK(at::isFloatingType(maps.scalar_type()), "maps must be floating, not ", maps.scalar_type());
  check_rois(rois, maps, "maps");
  TORCH_CHECK(output_size >= maps.size(1), "output_size is ", output_size, ", less than the k ", maps.size(1),
              " of maps");
  if (!labels) {
    TORCH_CHECK(0 <= first_class && first_class < maps.size(4), "first_class is ", first_class, ", but maps have ",
                maps.size(4), " classes");
    return;
  }
  TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rois.size(0), "labels must have shape (", rois.size(0),
              ",), not ", labels->sizes());
  TORCH_CHECK(labels->scalar_type() == at::kLong, "labels must be int64, not ", labels->scalar_type());
  TORCH_CHECK(labels->device() == maps.device(), "labels is on ", labels->device(), ", but maps is on ", maps.device());
}

inline void check_inside_outside_assemble_backward(const Tensor& score_gradient, const Tensor& mask_gradient,
                                                   const Tensor& maps, const Tensor& rois, const Tensor& classes,
                                                   int64_t output_size) {
  check_inside_outside_assemble(maps, rois, classes, output_size, 0);
  TORCH_CHECK(
      score_gradient.dim() == 2 && score_gradient.size(0) == rois.size(0) && score_gradient.size(1) == maps.size(4),
      "score_gradient must have shape (", rois.size(0), ", ", maps.size(4), "), not ", score_gradient.sizes());
  TORCH_CHECK(mask_gradient.sizes() == at::IntArrayRef({rois.size(0), 2, output_size, output_size}),
              "mask_gradient must have shape (", rois.size(0), ", 2, ", output_size, ", ", output_size, "), not ",
              mask_gradient.sizes());
}

// Zeros of the shape of maps, in memory (N, H, W, k, k, 2, C).
inline Tensor zero_gradient(const Tensor& maps, at::ScalarType dtype) {
  const Tensor dense =
      at::zeros({maps.size(0), maps.size(5), maps.size(6), maps.size(1), maps.size(2), maps.size(3), maps.size(4)},
                maps.options().dtype(dtype));
  return dense.permute({0, 3, 4, 5, 6, 1, 2});
}

using AssembleResult = std::tuple<Tensor, Tensor, Tensor>;  // scores, mask_logits, classes

}  // namespace convmask
