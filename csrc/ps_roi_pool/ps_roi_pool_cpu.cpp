// CPU kernels of position-sensitive RoI pooling. Forward: threads share the RoIs. Backward: they share the channels, so
// that each cell of the gradient is added to by one thread, in the order of the RoIs.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ps_roi_pool.h"
#include "rois_cpu.h"

namespace convmask {
namespace {

template <typename scalar_t>
void pool(const scalar_t* maps, const RoiTable& rois, int64_t channels, int64_t group, int64_t size, int64_t height,
          int64_t width, scalar_t* pooled) {
  const int64_t plane = height * width;
  at::parallel_for(0, rois.size(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const RoiBins roi = rois[r];
      for (int64_t d = 0; d < channels; ++d) {
        scalar_t* out = pooled + (r * channels + d) * size * size;
        for (int64_t p = 0; p < size; ++p) {
          const Cells rows = roi.rows[p];
          const int64_t grid_row = ((roi.image * channels + d) * group + p * group / size) * group;
          for (int64_t q = 0; q < size; ++q) {
            const Cells columns = roi.columns[q];
            const scalar_t* map = maps + (grid_row + q * group / size) * plane;
            scalar_t sum = 0;
            for (int64_t y = rows.begin; y < rows.end; ++y) {
              for (int64_t x = columns.begin; x < columns.end; ++x) {
                sum += map[y * width + x];
              }
            }
            const int64_t area = static_cast<int64_t>(rows.count()) * columns.count();
            *out++ = area > 0 ? sum / static_cast<scalar_t>(area) : scalar_t{0};
          }
        }
      }
    }
  });
}

template <typename scalar_t>
void spread(const scalar_t* gradient, const RoiTable& rois, int64_t channels, int64_t group, int64_t size,
            int64_t height, int64_t width, scalar_t* maps) {
  const int64_t plane = height * width;
  at::parallel_for(0, channels * group * group, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const int64_t d = channel / (group * group);
      const int64_t g = channel / group % group;
      const int64_t h = channel % group;
      for (int64_t r = 0; r < rois.size(); ++r) {
        const RoiBins roi = rois[r];
        scalar_t* map = maps + (roi.image * channels * group * group + channel) * plane;
        const scalar_t* of_roi = gradient + (r * channels + d) * size * size;
        for (int64_t p = first_bin(g, group, size); p < first_bin(g + 1, group, size); ++p) {
          const Cells rows = roi.rows[p];
          for (int64_t q = first_bin(h, group, size); q < first_bin(h + 1, group, size); ++q) {
            const Cells columns = roi.columns[q];
            const int64_t area = static_cast<int64_t>(rows.count()) * columns.count();
            if (area == 0) {
              continue;
            }
            const scalar_t share = of_roi[p * size + q] / static_cast<scalar_t>(area);
            for (int64_t y = rows.begin; y < rows.end; ++y) {
              for (int64_t x = columns.begin; x < columns.end; ++x) {
                map[y * width + x] += share;
              }
            }
          }
        }
      }
    }
  });
}

Tensor ps_roi_pool_cpu(const Tensor& maps, const Tensor& rois, int64_t group_size, int64_t output_size,
                       double spatial_scale, bool rounded) {
  check_ps_roi_pool(maps, rois, group_size, output_size);
  const int64_t height = maps.size(2), width = maps.size(3);
  const int64_t channels = maps.size(1) / (group_size * group_size);
  const RoiTable table(rois, maps.size(0), height, width, output_size, spatial_scale, rounded);
  const Tensor wide = maps.to(sum_dtype(maps)).contiguous();
  const Tensor pooled = at::empty({rois.size(0), channels, output_size, output_size}, wide.options());
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ps_roi_pool", [&] {
    pool(wide.const_data_ptr<scalar_t>(), table, channels, group_size, output_size, height, width,
         pooled.data_ptr<scalar_t>());
  });
  return pooled.to(maps.scalar_type());
}

Tensor ps_roi_pool_backward_cpu(const Tensor& gradient, const Tensor& rois, int64_t images, int64_t height,
                                int64_t width, int64_t group_size, double spatial_scale, bool rounded) {
  check_ps_roi_pool_backward(gradient, rois, group_size);
  const int64_t channels = gradient.size(1), size = gradient.size(2);
  const RoiTable table(rois, images, height, width, size, spatial_scale, rounded);
  const Tensor wide = gradient.to(sum_dtype(gradient)).contiguous();
  const Tensor maps = at::zeros({images, channels * group_size * group_size, height, width}, wide.options());
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ps_roi_pool_backward", [&] {
    spread(wide.const_data_ptr<scalar_t>(), table, channels, group_size, size, height, width,
           maps.data_ptr<scalar_t>());
  });
  return maps.to(gradient.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) {
  library.impl("ps_roi_pool", ps_roi_pool_cpu);
  library.impl("ps_roi_pool_backward", ps_roi_pool_backward_cpu);
}

}  // namespace convmask
