// CUDA kernels of inside/outside assembly. A block has one RoI: the lanes of a warp are classes, whose maps are
// neighbours in memory if all goes well, and its warps share the bins. The backward adds with atomic operations.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <ATen/cuda/Atomic.cuh>
#include <algorithm>

#include "../ps_roi_pool/rois_cuda.cuh"
#include "inside_outside_assemble.h"

namespace convmask {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Layout {
  int64_t images, group, classes, size;
  int32_t height, width;
  int64_t strides[7];

  // Offset of the first cell of a map.
  __device__ int64_t map(int64_t image, int64_t p, int64_t q, int64_t side, int64_t category) const {
    return image * strides[0] + p * group / size * strides[1] + q * group / size * strides[2] + side * strides[3] +
           category * strides[4];
  }
};

Layout layout_of(const Tensor& maps, int64_t output_size) {
  Layout layout{maps.size(0),
                maps.size(1),
                maps.size(4),
                output_size,
                static_cast<int32_t>(maps.size(5)),
                static_cast<int32_t>(maps.size(6)),
                {}};
  std::copy(maps.strides().begin(), maps.strides().end(), layout.strides);
  return layout;
}

template <typename scalar_t>
__device__ scalar_t sum_cells(const scalar_t* map, const Cells& rows, const Cells& columns, const Layout& layout) {
  scalar_t sum = 0;
  for (int32_t y = rows.begin; y < rows.end; ++y) {
    for (int32_t x = columns.begin; x < columns.end; ++x) {
      sum += map[y * layout.strides[5] + x * layout.strides[6]];
    }
  }
  return sum;
}

template <typename scalar_t>
__global__ void assemble_scores(const scalar_t* maps, const float* rois, Layout layout, float scale, bool rounded,
                                int64_t count, scalar_t* scores) {
  __shared__ scalar_t parts[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    const float* roi = rois + r * 5;
    const int64_t image = image_of(roi, layout.images);
    const Side vertical = side_of(roi[2], roi[4], scale, rounded, layout.size);
    const Side horizontal = side_of(roi[1], roi[3], scale, rounded, layout.size);
    for (int64_t first = 0; first < layout.classes; first += kWarp) {
      const int64_t category = first + lane;
      scalar_t total = 0;
      for (int64_t bin = warp; bin < layout.size * layout.size && image >= 0; bin += kWarps) {
        const int64_t p = bin / layout.size, q = bin % layout.size;
        const Cells rows = cells_of(vertical, static_cast<int32_t>(p), layout.height);
        const Cells columns = cells_of(horizontal, static_cast<int32_t>(q), layout.width);
        const int64_t area = static_cast<int64_t>(rows.count()) * columns.count();
        if (area > 0 && category < layout.classes) {
          const scalar_t outside = sum_cells(maps + layout.map(image, p, q, 0, category), rows, columns, layout);
          const scalar_t inside = sum_cells(maps + layout.map(image, p, q, 1, category), rows, columns, layout);
          total += (outside >= inside ? outside : inside) / static_cast<scalar_t>(area);
        }
      }
      parts[warp][lane] = total;
      __syncthreads();
      if (warp == 0 && category < layout.classes) {
        for (int other = 1; other < kWarps; ++other) {
          total += parts[other][lane];
        }
        scores[r * layout.classes + category] = total / static_cast<scalar_t>(layout.size * layout.size);
      }
      __syncthreads();
    }
  }
}

template <typename scalar_t>
__global__ void best_classes(const scalar_t* scores, int64_t count, int64_t classes, int64_t first_class,
                             int64_t* best) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; r < count; r += step) {
    int64_t found = first_class;
    for (int64_t c = first_class + 1; c < classes; ++c) {
      if (scores[r * classes + c] > scores[r * classes + found]) {
        found = c;
      }
    }
    best[r] = found;
  }
}

// One side of one bin of a RoI's mask.
struct MaskBin {
  int64_t map;
  Cells rows, columns;
  int64_t area;
};

__device__ MaskBin mask_bin(int64_t index, const float* rois, const int64_t* classes, const Layout& layout, float scale,
                            bool rounded) {
  const int64_t q = index % layout.size, p = index / layout.size % layout.size;
  const int64_t side = index / (layout.size * layout.size) % 2, r = index / (layout.size * layout.size * 2);
  const float* roi = rois + r * 5;
  const int64_t image = image_of(roi, layout.images);
  MaskBin bin{0, {0, 0}, {0, 0}, 0};
  if (image < 0 || classes[r] < 0 || classes[r] >= layout.classes) {
    return bin;
  }
  bin.map = layout.map(image, p, q, side, classes[r]);
  bin.rows = cells_of(side_of(roi[2], roi[4], scale, rounded, layout.size), static_cast<int32_t>(p), layout.height);
  bin.columns = cells_of(side_of(roi[1], roi[3], scale, rounded, layout.size), static_cast<int32_t>(q), layout.width);
  bin.area = static_cast<int64_t>(bin.rows.count()) * bin.columns.count();
  return bin;
}

template <typename scalar_t>
__global__ void assemble_masks(const scalar_t* maps, const float* rois, const int64_t* classes, Layout layout,
                               float scale, bool rounded, int64_t count, scalar_t* masks) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += step) {
    const MaskBin bin = mask_bin(i, rois, classes, layout, scale, rounded);
    masks[i] = bin.area > 0 ? sum_cells(maps + bin.map, bin.rows, bin.columns, layout) / static_cast<scalar_t>(bin.area)
                            : scalar_t{0};
  }
}

template <typename scalar_t>
__global__ void spread_scores(const scalar_t* maps, const float* rois, const scalar_t* of_scores, Layout layout,
                              Layout target, float scale, bool rounded, int64_t count, scalar_t* gradient) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    const float* roi = rois + r * 5;
    const int64_t image = image_of(roi, layout.images);
    if (image < 0) {
      continue;
    }
    const Side vertical = side_of(roi[2], roi[4], scale, rounded, layout.size);
    const Side horizontal = side_of(roi[1], roi[3], scale, rounded, layout.size);
    for (int64_t category = lane; category < layout.classes; category += kWarp) {
      const scalar_t share =
          of_scores[r * layout.classes + category] / static_cast<scalar_t>(layout.size * layout.size);
      if (share == 0) {
        continue;
      }
      for (int64_t bin = warp; bin < layout.size * layout.size; bin += kWarps) {
        const int64_t p = bin / layout.size, q = bin % layout.size;
        const Cells rows = cells_of(vertical, static_cast<int32_t>(p), layout.height);
        const Cells columns = cells_of(horizontal, static_cast<int32_t>(q), layout.width);
        const int64_t area = static_cast<int64_t>(rows.count()) * columns.count();
        if (area == 0) {
          continue;
        }
        const scalar_t outside = sum_cells(maps + layout.map(image, p, q, 0, category), rows, columns, layout);
        const scalar_t inside = sum_cells(maps + layout.map(image, p, q, 1, category), rows, columns, layout);
        scalar_t* to = gradient + target.map(image, p, q, outside >= inside ? 0 : 1, category);
        for (int32_t y = rows.begin; y < rows.end; ++y) {
          for (int32_t x = columns.begin; x < columns.end; ++x) {
            gpuAtomicAdd(to + y * target.strides[5] + x * target.strides[6], share / static_cast<scalar_t>(area));
          }
        }
      }
    }
  }
}

template <typename scalar_t>
__global__ void spread_masks(const scalar_t* of_masks, const float* rois, const int64_t* classes, Layout target,
                             float scale, bool rounded, int64_t count, scalar_t* gradient) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += step) {
    if (of_masks[i] == 0) {
      continue;
    }
    const MaskBin bin = mask_bin(i, rois, classes, target, scale, rounded);
    for (int32_t y = bin.rows.begin; y < bin.rows.end && bin.area > 0; ++y) {
      for (int32_t x = bin.columns.begin; x < bin.columns.end; ++x) {
        gpuAtomicAdd(gradient + bin.map + y * target.strides[5] + x * target.strides[6],
                     of_masks[i] / static_cast<scalar_t>(bin.area));
      }
    }
  }
}

unsigned blocks_of_rois(int64_t count) { return static_cast<unsigned>(std::min<int64_t>(count, 65535)); }

AssembleResult inside_outside_assemble_cuda(const Tensor& maps, const Tensor& rois, const std::optional<Tensor>& labels,
                                            int64_t output_size, double spatial_scale, bool rounded,
                                            int64_t first_class) {
  check_inside_outside_assemble(maps, rois, labels, output_size, first_class);
  const c10::cuda::CUDAGuard guard(maps.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Tensor wide = maps.to(sum_dtype(maps)), edges = rois.to(at::kFloat).contiguous();
  const Layout layout = layout_of(wide, output_size);
  const auto scale = static_cast<float>(spatial_scale);
  const int64_t count = rois.size(0);
  const Tensor scores = at::empty({count, layout.classes}, wide.options());
  const Tensor masks = at::empty({count, 2, output_size, output_size}, wide.options());
  const Tensor classes =
      labels ? labels->clone(at::MemoryFormat::Contiguous) : at::empty({count}, rois.options().dtype(at::kLong));
  if (count > 0) {
    AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "inside_outside_assemble", [&] {
      const auto* data = wide.const_data_ptr<scalar_t>();
      const auto* boxes = edges.const_data_ptr<float>();
      assemble_scores<scalar_t><<<blocks_of_rois(count), kThreads, 0, stream>>>(data, boxes, layout, scale, rounded,
                                                                                count, scores.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      if (!labels) {
        best_classes<scalar_t><<<blocks_for(count), kThreads, 0, stream>>>(
            scores.const_data_ptr<scalar_t>(), count, layout.classes, first_class, classes.data_ptr<int64_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      assemble_masks<scalar_t><<<blocks_for(masks.numel()), kThreads, 0, stream>>>(
          data, boxes, classes.const_data_ptr<int64_t>(), layout, scale, rounded, masks.numel(),
          masks.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {scores.to(maps.scalar_type()), masks.to(maps.scalar_type()), classes};
}

Tensor inside_outside_assemble_backward_cuda(const Tensor& score_gradient, const Tensor& mask_gradient,
                                             const Tensor& maps, const Tensor& rois, const Tensor& classes,
                                             int64_t output_size, double spatial_scale, bool rounded) {
  check_inside_outside_assemble_backward(score_gradient, mask_gradient, maps, rois, classes, output_size);
  const c10::cuda::CUDAGuard guard(maps.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto dtype = sum_dtype(maps);
  const Tensor wide = maps.to(dtype), edges = rois.to(at::kFloat).contiguous();
  const Tensor of_scores = score_gradient.to(dtype).contiguous(), of_masks = mask_gradient.to(dtype).contiguous();
  const Tensor dense_classes = classes.contiguous(), result = zero_gradient(maps, dtype);
  const Layout layout = layout_of(wide, output_size), target = layout_of(result, output_size);
  const auto scale = static_cast<float>(spatial_scale);
  const int64_t count = rois.size(0);
  if (count > 0) {
    AT_DISPATCH_FLOATING_TYPES(dtype, "inside_outside_assemble_backward", [&] {
      const auto* boxes = edges.const_data_ptr<float>();
      spread_scores<scalar_t><<<blocks_of_rois(count), kThreads, 0, stream>>>(
          wide.const_data_ptr<scalar_t>(), boxes, of_scores.const_data_ptr<scalar_t>(), layout, target, scale, rounded,
          count, result.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      spread_masks<scalar_t><<<blocks_for(of_masks.numel()), kThreads, 0, stream>>>(
          of_masks.const_data_ptr<scalar_t>(), boxes, dense_classes.const_data_ptr<int64_t>(), target, scale, rounded,
          of_masks.numel(), result.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return result.to(maps.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) {
  library.impl("inside_outside_assemble", inside_outside_assemble_cuda);
  library.impl("inside_outside_assemble_backward", inside_outside_assemble_backward_cuda);
}

}  // namespace convmask
