// Mask voting of FCIS (Li et al., arXiv 1611.07709, section 3). The rules, in words, are in
// convmask/ops/mask_voting.py.
//
//   masks  (R, S, S)  inside probabilities      float16, bfloat16, float32, float64
//   boxes  (R, 4)     x1, y1, x2, y2 in pixels  likewise
//   scores (R, C)     class 0 is background     likewise
// -> boxes (M, 4), scores (M,), classes (M,) int64, masks (M, S, S), M being max_detections; rows from count () int64
// on
//    are 0, their class -1
//
// All computation is in float64. Deterministic on both devices; neither kernel synchronises host and device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)
#define CONVMASK_HOST_DEVICE __host__ __device__
#else
#define CONVMASK_HOST_DEVICE
#endif

namespace convmask {

using at::Tensor;

// As PROCEDURES in Python.
enum Procedure : int64_t { kGpu, kCpu, kChainercv };

// How far below the threshold a sum of rounded weights may be whose exact value reaches it.
constexpr double kRounding = 1e-12;

struct VotingOptions {
  int32_t height, width;  // of the image
  int32_t size;           // S
  double nms_threshold, merge_threshold, binary_threshold, score_threshold;
  int64_t max_detections;
  int64_t procedure;
};

// A box in whole pixels, ends excluded.
struct PixelBox {
  int32_t left, top, right, bottom;
};

// Where a mask is sampled: between cells `before` and `after`, at `share` of the way.
struct Sample {
  int32_t before, after;
  double share;
};

// Sample `index` of `count` over [first, first + length), kept from `least` to `most`.
CONVMASK_HOST_DEVICE inline Sample sample_at(int64_t index, double step, double first, int32_t least, int32_t most) {
  double place = (static_cast<double>(index) + 0.5) * step - 0.5 + first;
  place = place > least ? place : least;
  place = place < most ? place : most;
  const auto before = static_cast<int32_t>(place);
  return {before, before < most ? before + 1 : most, place - before};
}

CONVMASK_HOST_DEVICE inline double mix(double a, double b, double share) { return a * (1 - share) + b * share; }

// Rounded to whole pixels, halves to even; 0 for what is not finite, and not farther than a billion.
CONVMASK_HOST_DEVICE inline int32_t to_pixel(double value) {
  if (!(value > -1e9 && value < 1e9)) {
    return 0;
  }
  return static_cast<int32_t>(rint(value));
}

CONVMASK_HOST_DEVICE inline PixelBox to_pixels(const double* box, bool ends_included) {
  const int32_t more = ends_included ? 1 : 0;
  return {to_pixel(box[0]), to_pixel(box[1]), to_pixel(box[2]) + more, to_pixel(box[3]) + more};
}

// Intersection over union of two boxes, ends excluded; NaN if a coordinate is.
CONVMASK_HOST_DEVICE inline double overlap(const double* a, const double* b) {
  const double w = (a[2] < b[2] ? a[2] : b[2]) - (a[0] > b[0] ? a[0] : b[0]);
  const double h = (a[3] < b[3] ? a[3] : b[3]) - (a[1] > b[1] ? a[1] : b[1]);
  const double both = (w > 0 ? w : 0) * (h > 0 ? h : 0);
  return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both);
}

inline VotingOptions check_mask_voting(const Tensor& masks, const Tensor& boxes, const Tensor& scores, int64_t height,
                                       int64_t width, double nms_threshold, double merge_threshold,
                                       double binary_threshold, double score_threshold, int64_t max_detections,
                                       int64_t procedure) {
  TORCH_CHECK(masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.size(1) >= 1,
              "masks must have shape (R, S, S), not ", masks.sizes());
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4, "boxes must have shape (",
              masks.size(0), ", 4), not ", boxes.sizes());
  TORCH_CHECK(scores.dim() == 2 && scores.size(0) == masks.size(0) && scores.size(1) >= 1, "scores must have shape (",
              masks.size(0), ", C), not ", scores.sizes());
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"masks", masks}, {"boxes", boxes}, {"scores", scores}}) {
    TORCH_CHECK(at::isFloatingType(tensor.scalar_type()), name, " must be floating, not ", tensor.scalar_type());
    TORCH_CHECK(tensor.device() == masks.device(), name, " is on ", tensor.device(), ", but masks are on ",
                masks.device());
  }
  TORCH_CHECK(height >= 1 && width >= 1 && height < (1 << 30) && width < (1 << 30), "image_size is ", height, " x ",
              width, ": height and width must be at least 1");
  TORCH_CHECK(score_threshold > 0, "score_threshold is ", score_threshold, ", but must be above 0");
  TORCH_CHECK(max_detections >= 1, "max_detections is ", max_detections, ", but must be at least 1");
  TORCH_CHECK(kGpu <= procedure && procedure <= kChainercv, "procedure is ", procedure, ", not from 0 to 2");
  return {static_cast<int32_t>(height),
          static_cast<int32_t>(width),
          static_cast<int32_t>(masks.size(1)),
          nms_threshold,
          merge_threshold,
          binary_threshold,
          score_threshold,
          max_detections,
          procedure};
}

using MaskVotingResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // boxes, scores, classes, masks, count

}  // namespace convmask
