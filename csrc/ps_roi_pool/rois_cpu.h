// RoIs on the CPU: their images, and the cells of their bins.
#pragma once

#include <vector>

#include "ps_roi_pool.h"

namespace convmask {

// The bins of one RoI: `size` ranges of rows and as many of columns.
struct RoiBins {
  int64_t image;
  const Cells* rows;
  const Cells* columns;
};

class RoiTable {
 public:
  // Raises an error if a RoI is of an image that there is not.
  RoiTable(const Tensor& rois, int64_t images, int64_t height, int64_t width, int64_t bins, double scale, bool rounded)
      : bins_(bins) {
    const Tensor dense = rois.to(at::kFloat).contiguous();
    const float* values = dense.const_data_ptr<float>();
    const int64_t count = rois.size(0);
    images_.resize(count);
    cells_.resize(count * 2 * bins);
    const auto factor = static_cast<float>(scale);
    for (int64_t r = 0; r < count; ++r, values += 5) {
      TORCH_CHECK(values[0] >= 0 && values[0] < static_cast<float>(images), "rois: RoI ", r, " is of image ", values[0],
                  ", but there are ", images);
      images_[r] = static_cast<int64_t>(values[0]);
      const Side vertical = side_of(values[2], values[4], factor, rounded, bins);
      const Side horizontal = side_of(values[1], values[3], factor, rounded, bins);
      Cells* cells = cells_.data() + r * 2 * bins;
      for (int64_t bin = 0; bin < bins; ++bin) {
        cells[bin] = cells_of(vertical, static_cast<int32_t>(bin), static_cast<int32_t>(height));
        cells[bins + bin] = cells_of(horizontal, static_cast<int32_t>(bin), static_cast<int32_t>(width));
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(images_.size()); }
  RoiBins operator[](int64_t roi) const {
    const Cells* cells = cells_.data() + roi * 2 * bins_;
    return {images_[roi], cells, cells + bins_};
  }

 private:
  int64_t bins_;
  std::vector<int64_t> images_;
  std::vector<Cells> cells_;
};

// The first bin of a cell of the k x k grid; that of cell k is the number of bins.
inline int64_t first_bin(int64_t cell, int64_t group_size, int64_t bins) {
  return (cell * bins + group_size - 1) / group_size;
}

}  // namespace convmask
