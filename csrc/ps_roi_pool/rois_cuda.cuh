// What kernels of RoIs share on CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ps_roi_pool.h"

namespace convmask {

constexpr int kThreads = 256;

// Blocks of kThreads for loops that stride over the grid.
inline unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, 65535));
}

// The image of a RoI; -1 if there is none of its number.
__device__ inline int64_t image_of(const float* roi, int64_t images) {
  return roi[0] >= 0 && roi[0] < static_cast<float>(images) ? static_cast<int64_t>(roi[0]) : -1;
}

}  // namespace convmask
