// CUDA kernels of position-sensitive RoI pooling: a thread for each bin. The backward adds with atomic operations.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <ATen/cuda/Atomic.cuh>
#include <algorithm>

#include "ps_roi_pool.h"
#include "rois_cuda.cuh"

namespace convmask {
namespace {

struct Shape {
  int64_t images, channels, group, size;  // channels: D
  int32_t height, width;
};

// The map and the cells of one bin; no cells for a RoI of an image that there is not.
struct Bin {
  int64_t map;
  Cells rows, columns;
  int64_t area;
};

__device__ Bin bin_of(int64_t index, const float* rois, const Shape& shape, float scale, bool rounded) {
  const int64_t q = index % shape.size, p = index / shape.size % shape.size;
  const int64_t d = index / (shape.size * shape.size) % shape.channels;
  const float* roi = rois + index / (shape.size * shape.size * shape.channels) * 5;
  const int64_t image = image_of(roi, shape.images);
  Bin bin{0, {0, 0}, {0, 0}, 0};
  if (image < 0) {
    return bin;
  }
  const int64_t channel = (d * shape.group + p * shape.group / shape.size) * shape.group + q * shape.group / shape.size;
  bin.map = (image * shape.channels * shape.group * shape.group + channel) * shape.height * shape.width;
  bin.rows = cells_of(side_of(roi[2], roi[4], scale, rounded, shape.size), static_cast<int32_t>(p), shape.height);
  bin.columns = cells_of(side_of(roi[1], roi[3], scale, rounded, shape.size), static_cast<int32_t>(q), shape.width);
  bin.area = static_cast<int64_t>(bin.rows.count()) * bin.columns.count();
  return bin;
}

template <typename scalar_t>
__global__ void pool(const scalar_t* maps, const float* rois, Shape shape, float scale, bool rounded, int64_t count,
                     scalar_t* pooled) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += step) {
    const Bin bin = bin_of(i, rois, shape, scale, rounded);
    scalar_t sum = 0;
    for (int32_t y = bin.rows.begin; y < bin.rows.end; ++y) {
      for (int32_t x = bin.columns.begin; x < bin.columns.end; ++x) {
        sum += maps[bin.map + static_cast<int64_t>(y) * shape.width + x];
      }
    }
    pooled[i] = bin.area > 0 ? sum / static_cast<scalar_t>(bin.area) : scalar_t{0};
  }
}

template <typename scalar_t>
__global__ void spread(const scalar_t* gradient, const float* rois, Shape shape, float scale, bool rounded,
                       int64_t count, scalar_t* maps) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count; i += step) {
    const Bin bin = bin_of(i, rois, shape, scale, rounded);
    if (bin.area == 0) {
      continue;
    }
    const scalar_t share = gradient[i] / static_cast<scalar_t>(bin.area);
    for (int32_t y = bin.rows.begin; y < bin.rows.end; ++y) {
      for (int32_t x = bin.columns.begin; x < bin.columns.end; ++x) {
        gpuAtomicAdd(maps + bin.map + static_cast<int64_t>(y) * shape.width + x, share);
      }
    }
  }
}

Tensor ps_roi_pool_cuda(const Tensor& maps, const Tensor& rois, int64_t group_size, int64_t output_size,
                        double spatial_scale, bool rounded) {
  check_ps_roi_pool(maps, rois, group_size, output_size);
  const c10::cuda::CUDAGuard guard(maps.device());
  const Tensor wide = maps.to(sum_dtype(maps)).contiguous(), edges = rois.to(at::kFloat).contiguous();
  const Shape shape{maps.size(0), maps.size(1) / (group_size * group_size), group_size,
                    output_size,  static_cast<int32_t>(maps.size(2)),       static_cast<int32_t>(maps.size(3))};
  const Tensor pooled = at::empty({rois.size(0), shape.channels, output_size, output_size}, wide.options());
  const int64_t count = pooled.numel();
  if (count > 0) {
    AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ps_roi_pool", [&] {
      pool<scalar_t><<<blocks_for(count), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
          wide.const_data_ptr<scalar_t>(), edges.const_data_ptr<float>(), shape, static_cast<float>(spatial_scale),
          rounded, count, pooled.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return pooled.to(maps.scalar_type());
}

Tensor ps_roi_pool_backward_cuda(const Tensor& gradient, const Tensor& rois, int64_t images, int64_t height,
                                 int64_t width, int64_t group_size, double spatial_scale, bool rounded) {
  check_ps_roi_pool_backward(gradient, rois, group_size);
  const c10::cuda::CUDAGuard guard(gradient.device());
  const Tensor wide = gradient.to(sum_dtype(gradient)).contiguous(), edges = rois.to(at::kFloat).contiguous();
  const Shape shape{images,
                    gradient.size(1),
                    group_size,
                    gradient.size(2),
                    static_cast<int32_t>(height),
                    static_cast<int32_t>(width)};
  const Tensor maps = at::zeros({images, shape.channels * group_size * group_size, height, width}, wide.options());
  const int64_t count = gradient.numel();
  if (count > 0) {
    AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ps_roi_pool_backward", [&] {
      spread<scalar_t><<<blocks_for(count), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
          wide.const_data_ptr<scalar_t>(), edges.const_data_ptr<float>(), shape, static_cast<float>(spatial_scale),
          rounded, count, maps.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return maps.to(gradient.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) {
  library.impl("ps_roi_pool", ps_roi_pool_cuda);
  library.impl("ps_roi_pool_backward", ps_roi_pool_backward_cuda);
}

}  // namespace convmask
