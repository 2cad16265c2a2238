// CUDA kernels of embedding-distance masks, without any synchronisation with the host:
//   find_windows     boxes cut to the map, and where their values lie           one block
//   measure          values                                                     grid over proposals x cells
//   differentiate_pixels   gradients of the pixels                              grid over dimensions x pixels
//   differentiate_others   gradients of proposals and margins                   a block for each proposal and dimension
// Sums are added in a fixed order: every run gives the same bits.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "embedding_masks.h"

namespace convmask {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;

// The cells of one proposal, and where their values lie.
struct Window {
  int64_t x, y, width, height;
  int64_t offset;  // of the first value
  int64_t stride;  // from one row of values to the next
};
static_assert(sizeof(Window) == 6 * sizeof(int64_t), "a row of six numbers");

// A map with proposals, all contiguous.
template <typename scalar_t>
struct Embeddings {
  const scalar_t* pixels;     // (dims, height * width)
  const scalar_t* proposals;  // (count, dims)
  const scalar_t* margins;    // (count, dims) if per_dimension, else (count,)
  bool per_dimension;
  int64_t count, dims, height, width;

  __device__ int64_t size() const { return height * width; }
  __device__ scalar_t margin(int64_t k, int64_t d) const { return margins[per_dimension ? k * dims + d : k]; }
};

__device__ int64_t clamped(int64_t value, int64_t limit) { return min(max(value, int64_t{0}), limit); }

// One thread adds up the areas: there are hundreds of boxes at most.
__global__ void find_windows(const int64_t* boxes, int64_t count, int64_t height, int64_t width, bool in_boxes,
                             Window* windows) {
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
    Window window{0, 0, width, height, k * height * width, width};
    if (boxes != nullptr) {
      const int64_t* box = boxes + 4 * k;
      window.x = clamped(box[0], width);
      window.y = clamped(box[1], height);
      window.width = max(clamped(box[2], width) - window.x, int64_t{0});
      window.height = max(clamped(box[3], height) - window.y, int64_t{0});
      window.offset += window.y * width + window.x;
    }
    windows[k] = window;
  }
  __syncthreads();
  if (in_boxes && threadIdx.x == 0) {
    int64_t offset = 0;
    for (int64_t k = 0; k < count; ++k) {
      windows[k].offset = offset;
      windows[k].stride = windows[k].width;
      offset += windows[k].width * windows[k].height;
    }
  }
}

// blockIdx.y strides over proposals, x over the cells of their windows. `size` is the number of values there is room
// for.
template <typename scalar_t>
__global__ void measure(Embeddings<scalar_t> map, const Window* windows, int64_t size, scalar_t* values) {
  for (int64_t k = blockIdx.y; k < map.count; k += gridDim.y) {
    const Window window = windows[k];
    const int64_t cells = window.width * window.height;
    for (int64_t cell = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; cell < cells;
         cell += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int64_t row = cell / window.width, column = cell % window.width;
      const scalar_t* pixel = map.pixels + (window.y + row) * map.width + window.x + column;
      scalar_t sum = 0;
      for (int64_t d = 0; d < map.dims; ++d) {
        const scalar_t difference = pixel[d * map.size()] - map.proposals[k * map.dims + d];
        sum += map.margin(k, d) * difference * difference;
      }
      const int64_t target = window.offset + row * window.stride + column;
      if (target < size) {
        values[target] = -sum;
      }
    }
  }
}

template <typename scalar_t>
__global__ void differentiate_pixels(Embeddings<scalar_t> map, const Window* windows, const scalar_t* gradient,
                                     int64_t size, scalar_t* of_pixels) {
  for (int64_t d = blockIdx.y; d < map.dims; d += gridDim.y) {
    for (int64_t pixel = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; pixel < map.size();
         pixel += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int64_t y = pixel / map.width, x = pixel % map.width;
      const scalar_t value = map.pixels[d * map.size() + pixel];
      scalar_t sum = 0;
      for (int64_t k = 0; k < map.count; ++k) {
        const Window& window = windows[k];
        const int64_t row = y - window.y, column = x - window.x;
        if (row < 0 || row >= window.height || column < 0 || column >= window.width) {
          continue;
        }
        const int64_t source = window.offset + row * window.stride + column;
        if (source < size) {
          sum -= 2 * map.margin(k, d) * gradient[source] * (value - map.proposals[k * map.dims + d]);
        }
      }
      of_pixels[d * map.size() + pixel] = sum;
    }
  }
}

template <typename scalar_t>
__global__ void differentiate_others(Embeddings<scalar_t> map, const Window* windows, const scalar_t* gradient,
                                     int64_t size, scalar_t* of_proposals, scalar_t* of_margins) {
  __shared__ scalar_t sums[2][kThreads];
  for (int64_t index = blockIdx.x; index < map.count * map.dims; index += gridDim.x) {
    const int64_t k = index / map.dims, d = index % map.dims;
    const Window window = windows[k];
    const scalar_t* pixels = map.pixels + d * map.size() + window.y * map.width + window.x;
    const scalar_t center = map.proposals[index];
    const int64_t cells = window.width * window.height;
    scalar_t of_proposal = 0, of_margin = 0;
    for (int64_t cell = threadIdx.x; cell < cells; cell += blockDim.x) {
      const int64_t row = cell / window.width, column = cell % window.width;
      const int64_t source = window.offset + row * window.stride + column;
      if (source < size) {
        const scalar_t difference = pixels[row * map.width + column] - center;
        const scalar_t weighted = gradient[source] * difference;
        of_proposal += weighted;
        of_margin += weighted * difference;
      }
    }
    sums[0][threadIdx.x] = of_proposal;
    sums[1][threadIdx.x] = of_margin;
    for (int width = kThreads / 2; width > 0; width /= 2) {
      __syncthreads();
      if (threadIdx.x < width) {
        sums[0][threadIdx.x] += sums[0][threadIdx.x + width];
        sums[1][threadIdx.x] += sums[1][threadIdx.x + width];
      }
    }
    if (threadIdx.x == 0) {
      of_proposals[index] = 2 * map.margin(k, d) * sums[0][0];
      of_margins[index] = -sums[1][0];
    }
    __syncthreads();
  }
}

dim3 grid_of(int64_t cells, int64_t rows) {
  const int64_t blocks = std::clamp<int64_t>((cells + kThreads - 1) / kThreads, 1, kMostBlocks);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::clamp<int64_t>(rows, 1, kMostBlocks)));
}

Tensor widen(const Tensor& tensor) { return tensor.to(embedding_dtype(tensor)).contiguous(); }

template <typename scalar_t>
Embeddings<scalar_t> embeddings_of(const Tensor& pixels, const Tensor& proposals, const Tensor& margins) {
  return {pixels.const_data_ptr<scalar_t>(),
          proposals.const_data_ptr<scalar_t>(),
          margins.const_data_ptr<scalar_t>(),
          margins.dim() == 2,
          proposals.size(0),
          pixels.size(0),
          pixels.size(1),
          pixels.size(2)};
}

// (count, 6), the windows, on the device.
Tensor windows_of(const std::optional<Tensor>& boxes, const Tensor& pixels, int64_t count, bool in_boxes) {
  const Tensor windows = at::empty({count, 6}, pixels.options().dtype(at::kLong));
  const Tensor dense = boxes.has_value() ? boxes->contiguous() : Tensor();
  find_windows<<<1, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
      boxes.has_value() ? dense.const_data_ptr<int64_t>() : nullptr, count, pixels.size(1), pixels.size(2), in_boxes,
      reinterpret_cast<Window*>(windows.data_ptr<int64_t>()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return windows;
}

// Writes the values in the boxes.
void measure_into(const Tensor& values, const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                  const std::optional<Tensor>& boxes, bool in_boxes) {
  if (values.numel() == 0) {
    return;
  }
  const Tensor wide_pixels = widen(pixels), wide_proposals = widen(proposals), wide_margins = widen(margins);
  const Tensor windows = windows_of(boxes, pixels, proposals.size(0), in_boxes);
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "embedding_masks", [&] {
    const auto map = embeddings_of<scalar_t>(wide_pixels, wide_proposals, wide_margins);
    measure<scalar_t><<<grid_of(map.height * map.width, map.count), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        map, reinterpret_cast<const Window*>(windows.const_data_ptr<int64_t>()), values.numel(),
        values.data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor embedding_masks_cuda(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                            const std::optional<Tensor>& boxes, double fill) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  const c10::cuda::CUDAGuard guard(pixels.device());
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  const std::vector<int64_t> shape{proposals.size(0), pixels.size(1), pixels.size(2)};
  const Tensor values = boxes.has_value() ? at::full(shape, fill, options) : at::empty(shape, options);
  measure_into(values, pixels, proposals, margins, boxes, false);
  return values.to(pixels.scalar_type());
}

Tensor embedding_masks_in_boxes_cuda(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                                     const Tensor& boxes, int64_t size) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  TORCH_CHECK(size >= 0, "size: ", size, " values");
  const c10::cuda::CUDAGuard guard(pixels.device());
  const Tensor values = at::zeros({size}, pixels.options().dtype(embedding_dtype(pixels)));
  measure_into(values, pixels, proposals, margins, boxes, true);
  return values.to(pixels.scalar_type());
}

EmbeddingGradients backward(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                            const Tensor& margins, const std::optional<Tensor>& boxes, bool in_boxes) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  check_embedding_masks_gradient(gradient, pixels, proposals, in_boxes);
  const c10::cuda::CUDAGuard guard(pixels.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  const Tensor of_pixels = at::zeros(pixels.sizes(), options);
  const Tensor of_proposals = at::zeros(proposals.sizes(), options);
  const Tensor of_margins = at::zeros(proposals.sizes(), options);
  if (pixels.numel() > 0 && proposals.size(0) > 0) {
    const Tensor wide_pixels = widen(pixels), wide_proposals = widen(proposals), wide_margins = widen(margins);
    const Tensor wide_gradient = widen(gradient);
    const Tensor windows = windows_of(boxes, pixels, proposals.size(0), in_boxes);
    AT_DISPATCH_FLOATING_TYPES(of_pixels.scalar_type(), "embedding_masks_backward", [&] {
      const auto map = embeddings_of<scalar_t>(wide_pixels, wide_proposals, wide_margins);
      const auto* window = reinterpret_cast<const Window*>(windows.const_data_ptr<int64_t>());
      const scalar_t* outer = wide_gradient.const_data_ptr<scalar_t>();
      differentiate_pixels<scalar_t><<<grid_of(map.height * map.width, map.dims), kThreads, 0, stream>>>(
          map, window, outer, wide_gradient.numel(), of_pixels.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      const int64_t blocks = std::min<int64_t>(map.count * map.dims, kMostBlocks);
      differentiate_others<scalar_t><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          map, window, outer, wide_gradient.numel(), of_proposals.data_ptr<scalar_t>(),
          of_margins.data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  const Tensor all_margins = margins.dim() == 2 ? of_margins : of_margins.sum(1);
  const auto dtype = pixels.scalar_type();
  return {of_pixels.to(dtype), of_proposals.to(dtype), all_margins.to(dtype)};
}

EmbeddingGradients embedding_masks_backward_cuda(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                                                 const Tensor& margins, const std::optional<Tensor>& boxes) {
  return backward(gradient, pixels, proposals, margins, boxes, false);
}

EmbeddingGradients embedding_masks_in_boxes_backward_cuda(const Tensor& gradient, const Tensor& pixels,
                                                          const Tensor& proposals, const Tensor& margins,
                                                          const Tensor& boxes) {
  return backward(gradient, pixels, proposals, margins, boxes, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) {
  library.impl("embedding_masks", embedding_masks_cuda);
  library.impl("embedding_masks_backward", embedding_masks_backward_cuda);
  library.impl("embedding_masks_in_boxes", embedding_masks_in_boxes_cuda);
  library.impl("embedding_masks_in_boxes_backward", embedding_masks_in_boxes_backward_cuda);
}

}  // namespace convmask
