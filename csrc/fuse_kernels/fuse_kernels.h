// Kernel fusion: similar kernels become their mean (Li et al., "Fully Convolutional Networks for Panoptic
// Segmentation", section 3.2, inference). The rule, in words, is in convmask/ops/fuse_kernels.py.
//
//   kernels (N, D)  float16, bfloat16, float32, float64
//   scores  (N,)    any floating type; ranked in float64, stably, NaN last
//   classes (N,)    int64; read only if class_specific
// ->
//   fused   (N, D)  of the dtype of kernels; row r < M is the mean of group r, in rank order; rows from M on are zero
//   kept    (N,)    int64; for r < M the index of the kernel that leads group r; -1 from M on
//   groups  (N,)    int64; for each kernel its row of `fused`, or -1
//   count   ()      int64, M
//
// Cosines and means are computed in float32, or in float64 for float64. A mean adds its kernels in rank order, so that
// every thread count and run gives the same bits. Neither kernel synchronises host and device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace convmask {

using at::Tensor;

// Shorter kernels are divided by this to normalise them.
constexpr double kSmallestNorm = 1e-8;

// Raises an error that names the argument if a shape, dtype or device is wrong.
inline void check_fuse_kernels(const Tensor& kernels, const Tensor& scores, const Tensor& classes) {
  TORCH_CHECK(kernels.dim() == 2, "kernels must have shape (N, D), not ", kernels.sizes());
  TORCH_CHECK(at::isFloatingType(kernels.scalar_type()), "kernels must be floating, not ", kernels.scalar_type());
  TORCH_CHECK(at::isFloatingType(scores.scalar_type()), "scores must be floating, not ", scores.scalar_type());
  TORCH_CHECK(classes.scalar_type() == at::kLong, "classes must be int64, not ", classes.scalar_type());
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"scores", scores}, {"classes", classes}}) {
    TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == kernels.size(0), name, " must have shape (", kernels.size(0),
                ",), not ", tensor.sizes());
    TORCH_CHECK(tensor.device() == kernels.device(), name, " is on ", tensor.device(), " but kernels are on ",
                kernels.device());
  }
}

// The dtype of cosines and means.
inline at::ScalarType fusion_dtype(const Tensor& kernels) {
  return kernels.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

using FuseKernelsResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // fused, kept, groups, count

}  // namespace convmask
