// Panoptic merging: instance masks and a map of semantic labels become one map of segment ids (Kirillov et al.,
// "Panoptic Feature Pyramid Networks", section 3.1, inference). The rules, in words, are in
// convmask/ops/panoptic_merge.py.
//
//   masks     (N, H, W) bool; or float16, bfloat16, float32, float64 probabilities, set where >= mask_threshold
//   scores    (N,)      any floating type; compared with score_threshold in float64
//   classes   (N,)      int64
//   sem_seg   (H, W)    int64, labels in [kFirstLabel, kFirstLabel + kLabels)
// ->
//   panoptic  (H, W)    int32, 0 = void, things 1..T in rank order, then stuff T+1..T+S in ascending order of label
//   segments  (segment_capacity(...), 3) int64; row id-1 = (class or label, index of the instance or -1, painted
//   pixels);
//                       rows from T+S on are zero
//   counts    (3,)      int64: T, S, and 1 if a label that the stuff rule looked at is outside the range of labels,
//   else 0
//
// The results are integers computed exactly: every kernel, thread count and run gives the same ones. Neither kernel
// synchronises host and device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>

namespace convmask {

using at::Tensor;

// A table with one entry for each 16-bit integer stands for "any label": 255 (ignore), -1 and 1000 are labels like
// others.
constexpr int64_t kFirstLabel = -32768;
constexpr int64_t kLabels = 65536;

C10_HOST_DEVICE inline bool is_label(int64_t label) { return label >= kFirstLabel && label < kFirstLabel + kLabels; }

// Columns of `segments`.
constexpr int64_t kCategory = 0;
constexpr int64_t kInstance = 1;
constexpr int64_t kArea = 2;
constexpr int64_t kColumns = 3;

// The most segments there can be: stuff segments are disjoint and have at least stuff_area_limit pixels each.
inline int64_t segment_capacity(int64_t instances, int64_t pixels, int64_t stuff_area_limit) {
  return instances + std::min(pixels / std::max<int64_t>(stuff_area_limit, 1), kLabels);
}

// "Intersection over area of the mask is above the threshold", divided as Python divides two ints.
C10_HOST_DEVICE inline bool covered_too_much(int64_t covered, int64_t area, double overlap_threshold) {
  return static_cast<double>(covered) / static_cast<double>(area) > overlap_threshold;
}

// Raises an error that names the argument if a shape, dtype or device is wrong.
inline void check_panoptic_merge(const Tensor& masks, const Tensor& scores, const Tensor& classes,
                                 const Tensor& sem_seg) {
  TORCH_CHECK(masks.dim() == 3, "masks must have shape (N, H, W), not ", masks.sizes());
  TORCH_CHECK(masks.scalar_type() == at::kBool || at::isFloatingType(masks.scalar_type()),
              "masks must be bool or floating, not ", masks.scalar_type());
  TORCH_CHECK(scores.dim() == 1 && scores.size(0) == masks.size(0), "scores must have shape (N,) = (", masks.size(0),
              ",), not ", scores.sizes());
  TORCH_CHECK(at::isFloatingType(scores.scalar_type()), "scores must be floating, not ", scores.scalar_type());
  TORCH_CHECK(classes.dim() == 1 && classes.size(0) == masks.size(0), "classes must have shape (N,) = (", masks.size(0),
              ",), not ", classes.sizes());
  TORCH_CHECK(classes.scalar_type() == at::kLong, "classes must be int64, not ", classes.scalar_type());
  TORCH_CHECK(sem_seg.dim() == 2 && sem_seg.size(0) == masks.size(1) && sem_seg.size(1) == masks.size(2),
              "sem_seg must have shape (H, W) = (", masks.size(1), ", ", masks.size(2), "), not ", sem_seg.sizes());
  TORCH_CHECK(sem_seg.scalar_type() == at::kLong, "sem_seg must be int64, not ", sem_seg.scalar_type());
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"scores", scores}, {"classes", classes}, {"sem_seg", sem_seg}}) {
    TORCH_CHECK(tensor.device() == masks.device(), name, " is on ", tensor.device(), " but masks are on ",
                masks.device());
  }
}

using PanopticMergeResult = std::tuple<Tensor, Tensor, Tensor>;  // panoptic, segments, counts

}  // namespace convmask
