// Position-sensitive RoI pooling of FCIS (Li et al., arXiv 1611.07709). The rules, in words, are in
// convmask/ops/ps_roi_pool.py.
//
//   maps (N, D k k, H, W)  float16, bfloat16, float32, float64
//   rois (R, 5)            any floating type; the edges of bins are computed in float32
// -> pooled (R, D, P, P)   of the dtype of maps
//
//   gradient (R, D, P, P) -> (N, D k k, H, W), each cell of a bin receives its gradient divided by its number of cells
//
// CPU: deterministic. CUDA: the backward adds with atomic operations. Neither synchronises host and device; the CPU
// raises an error for a RoI of an image that there is not, CUDA takes it as empty.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CONVMASK_HOST_DEVICE __host__ __device__
#else
#define CONVMASK_HOST_DEVICE
#endif

namespace convmask {

using at::Tensor;

// The shortest side of a RoI, in cells of the map.
constexpr float kShortestSide = 0.1f;

// Cells [begin, end).
struct Cells {
  int32_t begin;
  int32_t end;

  CONVMASK_HOST_DEVICE int32_t count() const { return end > begin ? end - begin : 0; }
};

// One side of a RoI on the map: where it starts, and the length of a bin.
struct Side {
  float start;
  float step;
};

// a * b, which the compiler must not fuse with an addition: a bin may end exactly at the border of a cell.
CONVMASK_HOST_DEVICE inline float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

CONVMASK_HOST_DEVICE inline Side side_of(float first, float last, float scale, bool rounded, int64_t bins) {
  if (rounded) {
    first = roundf(first);
    last = roundf(last) + 1.0f;
  }
  const float start = rounded_product(first, scale);
  const float length = rounded_product(last, scale) - start;
  return {start, (length > kShortestSide ? length : kShortestSide) / static_cast<float>(bins)};
}

// `value` as a whole number from 0 to `limit`; 0 for NaN.
CONVMASK_HOST_DEVICE inline int32_t clamp_cell(float value, int32_t limit) {
  return !(value > 0) ? 0 : value >= static_cast<float>(limit) ? limit : static_cast<int32_t>(value);
}

CONVMASK_HOST_DEVICE inline Cells cells_of(const Side& side, int32_t bin, int32_t limit) {
  const float begin = rounded_product(static_cast<float>(bin), side.step) + side.start;
  const float end = rounded_product(static_cast<float>(bin + 1), side.step) + side.start;
  return {clamp_cell(floorf(begin), limit), clamp_cell(ceilf(end), limit)};
}

inline void check_rois(const Tensor& rois, const Tensor& other, const char* name) {
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "rois must have shape (R, 5), not ", rois.sizes());
  TORCH_CHECK(at::isFloatingType(rois.scalar_type()), "rois must be floating, not ", rois.scalar_type());
  TORCH_CHECK(rois.device() == other.device(), "rois is on ", rois.device(), ", but ", name, " is on ", other.device());
}

inline void check_ps_roi_pool(const Tensor& maps, const Tensor& rois, int64_t group_size, int64_t output_size) {
  TORCH_CHECK(maps.dim() == 4, "maps must have shape (N, D k k, H, W), not ", maps.sizes());
  TORCH_CHECK(at::isFloatingType(maps.scalar_type()), "maps must be floating, not ", maps.scalar_type());
  check_rois(rois, maps, "maps");
  TORCH_CHECK(group_size >= 1 && maps.size(1) % (group_size * group_size) == 0, "group_size is ", group_size,
              ": its square must divide the ", maps.size(1), " channels of maps");
  TORCH_CHECK(output_size >= group_size, "output_size is ", output_size, ", less than the group_size ", group_size);
}

inline void check_ps_roi_pool_backward(const Tensor& gradient, const Tensor& rois, int64_t group_size) {
  TORCH_CHECK(gradient.dim() == 4 && gradient.size(0) == rois.size(0) && gradient.size(2) == gradient.size(3),
              "gradient must have shape (", rois.size(0), ", D, P, P), not ", gradient.sizes());
  TORCH_CHECK(at::isFloatingType(gradient.scalar_type()), "gradient must be floating, not ", gradient.scalar_type());
  check_rois(rois, gradient, "gradient");
  TORCH_CHECK(group_size >= 1 && gradient.size(2) >= group_size, "group_size is ", group_size, ", not from 1 to the ",
              gradient.size(2), " bins of gradient");
}

// The dtype of sums.
inline at::ScalarType sum_dtype(const Tensor& maps) {
  return maps.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace convmask
