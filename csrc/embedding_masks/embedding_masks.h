// Embedding-distance masks: minus the weighted squared distance of each pixel's embedding to each proposal's (Ying et
// al., "EmbedMask: Embedding Coupling for One-stage Instance Segmentation", equation 4). The rule, in words, is in
// convmask/ops/embedding_masks.py.
//
//   pixels    (D, H, W)       float16, bfloat16, float32, float64
//   proposals (K, D)          of the same dtype
//   margins   (K,) or (K, D)  of the same dtype
//   boxes     (K, 4)          int64 cells (x1, y1, x2, y2), the last two excluded; cut to the map
// embedding_masks(pixels, proposals, margins, boxes or none, fill)
//   -> values (K, H, W), `fill` outside the boxes
// embedding_masks_in_boxes(pixels, proposals, margins, boxes, size)
//   -> values (size,), those in the boxes, row by row, one box after the other; `size` is the number of their cells
// embedding_masks[_in_boxes]_backward(gradient of the values, pixels, proposals, margins, boxes)
//   -> gradients of pixels, proposals and margins
//
// Differences are squared as they are, in float32, or in float64 for float64. Every sum is added in an order that the
// number of threads does not change. Neither of the CUDA kernels synchronises host and device; a wrong `size` is an
// error on the CPU, and on CUDA leaves out, or leaves at zero, what does not fit.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace convmask {

using at::Tensor;

// Raises an error that names the argument if a shape, dtype or device is wrong.
inline void check_embedding_masks(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                                  const std::optional<Tensor>& boxes) {
  TORCH_CHECK(pixels.dim() == 3, "pixels must have shape (D, H, W), not ", pixels.sizes());
  TORCH_CHECK(at::isFloatingType(pixels.scalar_type()), "pixels must be floating, not ", pixels.scalar_type());
  const int64_t dims = pixels.size(0);
  TORCH_CHECK(proposals.dim() == 2 && proposals.size(1) == dims, "proposals must have shape (K, ", dims,
              ") to fit the pixels, not ", proposals.sizes());
  const int64_t count = proposals.size(0);
  TORCH_CHECK((margins.dim() == 1 || (margins.dim() == 2 && margins.size(1) == dims)) && margins.size(0) == count,
              "margins must have shape (", count, ",) or (", count, ", ", dims, ") to fit the proposals, not ",
              margins.sizes());
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"proposals", proposals}, {"margins", margins}}) {
    TORCH_CHECK(tensor.scalar_type() == pixels.scalar_type(), name, " must be ", pixels.scalar_type(),
                ", as the pixels are, not ", tensor.scalar_type());
    TORCH_CHECK(tensor.device() == pixels.device(), name, " is on ", tensor.device(), " but pixels are on ",
                pixels.device());
  }
  if (boxes.has_value()) {
    TORCH_CHECK(boxes->dim() == 2 && boxes->size(0) == count && boxes->size(1) == 4, "boxes must have shape (", count,
                ", 4) to fit the proposals, not ", boxes->sizes());
    TORCH_CHECK(boxes->scalar_type() == at::kLong, "boxes must be int64, not ", boxes->scalar_type());
    TORCH_CHECK(boxes->device() == pixels.device(), "boxes is on ", boxes->device(), " but pixels are on ",
                pixels.device());
  }
}

// Raises an error if the gradient of the values does not fit: (K, H, W), or one number for each cell of the boxes.
inline void check_embedding_masks_gradient(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                                           bool in_boxes) {
  if (in_boxes) {
    TORCH_CHECK(gradient.dim() == 1, "gradient must have shape (P,), not ", gradient.sizes());
  } else {
    TORCH_CHECK(gradient.dim() == 3 && gradient.size(0) == proposals.size(0) && gradient.size(1) == pixels.size(1) &&
                    gradient.size(2) == pixels.size(2),
                "gradient must have shape (", proposals.size(0), ", ", pixels.size(1), ", ", pixels.size(2), "), not ",
                gradient.sizes());
  }
  TORCH_CHECK(gradient.scalar_type() == pixels.scalar_type(), "gradient must be ", pixels.scalar_type(),
              ", as the pixels are, not ", gradient.scalar_type());
  TORCH_CHECK(gradient.device() == pixels.device(), "gradient is on ", gradient.device(), " but pixels are on ",
              pixels.device());
}

// The dtype of differences and sums.
inline at::ScalarType embedding_dtype(const Tensor& pixels) {
  return pixels.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

using EmbeddingGradients = std::tuple<Tensor, Tensor, Tensor>;  // of pixels, proposals and margins

}  // namespace convmask
