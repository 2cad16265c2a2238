// CUDA kernels of kernel fusion, in five launches after the sort, without any synchronisation with the host:
//   normalise       unit vectors, in rank order             a block for each kernel
//   find_first      which earlier kernel covers each first  a block for each kernel
//   number_groups   rows of the kernels that are kept       one block
//   assign_groups   the row of each kernel                  grid over kernels
//   average         means of the groups, in rank order      a block for each row
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

#include "fuse_kernels.h"

namespace convmask {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kOneBlockThreads = 1024;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The sum over the lanes of a warp, in every lane.
template <typename scalar_t>
__device__ scalar_t warp_sum(scalar_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// The product of two vectors, in every lane of the warp.
template <typename scalar_t>
__device__ scalar_t warp_product(const scalar_t* a, const scalar_t* b, int64_t dims) {
  scalar_t sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < dims; k += kWarp) {
    sum += a[k] * b[k];
  }
  return warp_sum(sum);
}

template <typename scalar_t>
__global__ void normalise(const scalar_t* kernels, const int64_t* order, int64_t count, int64_t dims, scalar_t* unit) {
  for (int64_t rank = blockIdx.x; rank < count; rank += gridDim.x) {
    const scalar_t* kernel = kernels + order[rank] * dims;
    const scalar_t norm = sqrt(warp_product(kernel, kernel, dims));  // every warp computes it: no waiting
    const scalar_t divisor = max(norm, static_cast<scalar_t>(kSmallestNorm));
    for (int64_t k = threadIdx.x; k < dims; k += blockDim.x) {
      unit[rank * dims + k] = kernel[k] / divisor;
    }
  }
}

// first[j] is the rank of the kernel that covers j first. The warps of a block share the earlier kernels of one j, and
// stop behind the first that any of them has found.
template <typename scalar_t>
__global__ void find_first(const scalar_t* unit, const int64_t* order, const int64_t* classes, bool class_specific,
                           scalar_t threshold, int64_t count, int64_t dims, int64_t* first) {
  __shared__ unsigned long long found;
  const int lane = threadIdx.x % kWarp;
  for (int64_t j = blockIdx.x; j < count; j += gridDim.x) {
    if (threadIdx.x == 0) {
      found = j;
    }
    __syncthreads();
    const int64_t category = classes[order[j]];
    for (int64_t i = threadIdx.x / kWarp; i < j; i += kWarps) {
      // The lanes of a warp agree: one reads for all.
      const unsigned long long bound =
          __shfl_sync(kAllLanes, lane == 0 ? *static_cast<volatile unsigned long long*>(&found) : 0ull, 0);
      if (static_cast<unsigned long long>(i) >= bound) {
        break;
      }
      if (class_specific && classes[order[i]] != category) {
        continue;
      }
      if (warp_product(unit + i * dims, unit + j * dims, dims) >= threshold) {
        if (lane == 0) {
          atomicMin(&found, static_cast<unsigned long long>(i));
        }
        break;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      first[j] = static_cast<int64_t>(found);
    }
    __syncthreads();
  }
}

// One block. Thread t has a run of ranks; gives the kept kernels their rows, in rank order.
__global__ void number_groups(const int64_t* first, const int64_t* order, int64_t count, int64_t* row_of_rank,
                              int64_t* leaders, int64_t* kept, int64_t* kept_count) {
  __shared__ int64_t kept_of_thread[kOneBlockThreads];
  const int64_t share = (count + blockDim.x - 1) / blockDim.x;
  const int64_t begin = min(threadIdx.x * share, count);
  const int64_t end = min(begin + share, count);
  int64_t mine = 0;
  for (int64_t rank = begin; rank < end; ++rank) {
    mine += first[rank] == rank;
  }
  kept_of_thread[threadIdx.x] = mine;
  __syncthreads();
  int64_t row = 0;
  for (int thread = 0; thread < threadIdx.x; ++thread) {
    row += kept_of_thread[thread];
  }
  for (int64_t rank = begin; rank < end; ++rank) {
    row_of_rank[rank] = -1;
    if (first[rank] == rank) {
      leaders[row] = rank;
      kept[row] = order[rank];
      row_of_rank[rank] = row++;
    }
  }
  if (threadIdx.x == blockDim.x - 1) {
    *kept_count = row;
  }
}

__global__ void assign_groups(const int64_t* first, const int64_t* row_of_rank, const int64_t* order, int64_t count,
                              int64_t* groups) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t rank = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; rank < count; rank += step) {
    groups[order[rank]] = row_of_rank[first[rank]];  // -1 if the first that covers it is not kept
  }
}

template <typename scalar_t>
__global__ void average(const scalar_t* kernels, const int64_t* first, const int64_t* leaders, const int64_t* order,
                        const int64_t* kept_count, int64_t count, int64_t dims, scalar_t* fused) {
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const bool is_group = row < *kept_count;
    const int64_t leader = is_group ? leaders[row] : count;
    for (int64_t k = threadIdx.x; k < dims; k += blockDim.x) {
      scalar_t sum = 0;
      int64_t members = 0;
      for (int64_t rank = leader; rank < count; ++rank) {
        if (first[rank] == leader) {
          sum += kernels[order[rank] * dims + k];
          ++members;
        }
      }
      fused[row * dims + k] = is_group ? sum / static_cast<scalar_t>(members) : 0;
    }
  }
}

// Blocks for `items`, of which each has one. Every kernel strides over its grid, so that any number is right.
unsigned blocks_for(int64_t items) { return static_cast<unsigned>(std::clamp<int64_t>(items, 1, int64_t{1} << 20)); }

FuseKernelsResult fuse_kernels_cuda(const Tensor& kernels, const Tensor& scores, const Tensor& classes,
                                    double threshold, bool class_specific) {
  check_fuse_kernels(kernels, scores, classes);
  const c10::cuda::CUDAGuard guard(kernels.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int64_t count = kernels.size(0);
  const int64_t dims = kernels.size(1);
  const Tensor wide = kernels.to(fusion_dtype(kernels)).contiguous();
  const Tensor fused = at::empty(wide.sizes(), wide.options());
  const Tensor kept = at::full({count}, -1, classes.options());
  const Tensor groups = at::empty({count}, classes.options());
  const Tensor kept_count = at::zeros({}, classes.options());
  if (count == 0) {
    return {fused.to(kernels.scalar_type()), kept, groups, kept_count};
  }
  const Tensor order =
      std::get<1>((-scores.to(at::kDouble)).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false)).contiguous();
  const Tensor dense_classes = classes.contiguous();
  const Tensor unit = at::empty(wide.sizes(), wide.options());
  const Tensor ranks = at::empty({3, count}, classes.options());
  const int64_t* order_data = order.const_data_ptr<int64_t>();
  auto* first = ranks.data_ptr<int64_t>();
  int64_t* row_of_rank = first + count;
  int64_t* leaders = row_of_rank + count;
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "fuse_kernels", [&] {
    const scalar_t* wide_data = wide.const_data_ptr<scalar_t>();
    normalise<scalar_t>
        <<<blocks_for(count), kThreads, 0, stream>>>(wide_data, order_data, count, dims, unit.data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    find_first<scalar_t><<<blocks_for(count), kThreads, 0, stream>>>(
        unit.const_data_ptr<scalar_t>(), order_data, dense_classes.const_data_ptr<int64_t>(), class_specific,
        static_cast<scalar_t>(threshold), count, dims, first);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    number_groups<<<1, kOneBlockThreads, 0, stream>>>(first, order_data, count, row_of_rank, leaders,
                                                      kept.data_ptr<int64_t>(), kept_count.data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    assign_groups<<<blocks_for((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        first, row_of_rank, order_data, count, groups.data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    average<scalar_t><<<blocks_for(count), kThreads, 0, stream>>>(wide_data, first, leaders, order_data,
                                                                  kept_count.const_data_ptr<int64_t>(), count, dims,
                                                                  fused.data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {fused.to(kernels.scalar_type()), kept, groups, kept_count};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) { library.impl("fuse_kernels", fuse_kernels_cuda); }

}  // namespace convmask
