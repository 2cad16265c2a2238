// CPU kernel of kernel fusion. Only what decides is computed: pairs of one class, the first half of a product where it
// shows that the whole cannot reach the threshold, and nothing for a kernel after the first that covers it.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fuse_kernels.h"

// The inner loop is compiled for several processors, of which the loader takes the best.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CONVMASK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CONVMASK_INLINE inline __attribute__((always_inline))
#else
#define CONVMASK_CLONES
#define CONVMASK_INLINE inline
#endif

namespace convmask {
namespace {

constexpr int64_t kLanes = 16;     // sums that run side by side in a product
constexpr int64_t kRows = 4;       // products with one kernel that run side by side
constexpr int64_t kTileRows = 16;  // rows that stay in L1 while all later kernels pass by
constexpr int64_t kGrain = 256;    // kernels for a thread
constexpr double kSlack = 1e-3;    // more than all rounding of a product of unit vectors

template <typename scalar_t>
CONVMASK_INLINE void add_products(const scalar_t* one, const scalar_t* rows, int64_t stride, int64_t begin, int64_t end,
                                  scalar_t* products) {
  scalar_t sums[kRows][kLanes] = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[row][lane] += one[i + lane] * rows[row * stride + i + lane];
      }
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) {
        sums[row][lane] += sums[row][lane + width];
      }
    }
    products[row] += sums[row][0];
  }
}

// Adds to products[r] the product of `one` with the row r of kRows rows, over the entries [begin, end), a multiple of
// kLanes.
CONVMASK_CLONES void products_of(const float* one, const float* rows, int64_t stride, int64_t begin, int64_t end,
                                 float* products) {
  add_products(one, rows, stride, begin, end, products);
}
CONVMASK_CLONES void products_of(const double* one, const double* rows, int64_t stride, int64_t begin, int64_t end,
                                 double* products) {
  add_products(one, rows, stride, begin, end, products);
}

// Kernels as unit vectors, sorted by class (if that matters) and by rank within it: those that may be fused lie side by
// side. Rows are padded with zeros to whole lanes, and followed by kRows rows of zeros.
template <typename scalar_t>
struct UnitKernels {
  int64_t stride = 0;
  int64_t half = 0;               // entries of the first half
  std::vector<scalar_t> entries;  // (N + kRows, stride)
  std::vector<scalar_t> rest;     // (N,), norm of the second half
  std::vector<int64_t> start;     // (N,), where the class of a row begins

  const scalar_t* row(int64_t index) const { return entries.data() + index * stride; }
};

template <typename scalar_t>
UnitKernels<scalar_t> normalise(const scalar_t* kernels, int64_t dims, const std::vector<int64_t>& sorted,
                                const int64_t* classes) {
  const auto count = static_cast<int64_t>(sorted.size());
  UnitKernels<scalar_t> unit;
  unit.stride = (dims + kLanes - 1) / kLanes * kLanes;
  unit.half = unit.stride / kLanes / 2 * kLanes;
  unit.entries.resize((count + kRows) * unit.stride);
  unit.rest.resize(count);
  unit.start.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    unit.start[i] =
        i > 0 && (classes == nullptr || classes[sorted[i]] == classes[sorted[i - 1]]) ? unit.start[i - 1] : i;
    scalar_t* row = unit.entries.data() + i * unit.stride;
    std::copy_n(kernels + sorted[i] * dims, dims, row);
    // Products with itself need as many sums as others: the same code computes them.
    scalar_t squares[kRows] = {};
    products_of(row, row, 0, 0, unit.stride, squares);
    const scalar_t norm = std::max(std::sqrt(squares[0]), static_cast<scalar_t>(kSmallestNorm));
    for (int64_t k = 0; k < dims; ++k) {
      row[k] /= norm;
    }
    scalar_t rest[kRows] = {};
    products_of(row, row, 0, unit.half, unit.stride, rest);
    unit.rest[i] = std::sqrt(rest[0]);
  }
  return unit;
}

// For the rows [begin, end) the first row that covers each; itself if there is none before it.
template <typename scalar_t>
void find_first(const UnitKernels<scalar_t>& unit, scalar_t threshold, int64_t begin, int64_t end, int64_t* first) {
  std::iota(first + begin, first + end, begin);
  for (int64_t tile = unit.start[begin]; tile < end; tile += kTileRows) {
    for (int64_t j = std::max(begin, tile + 1); j < end; ++j) {
      if (first[j] != j) {
        continue;
      }
      const int64_t stop = std::min(tile + kTileRows, j);
      for (int64_t i = std::max(tile, unit.start[j]); i < stop && first[j] == j; i += kRows) {
        scalar_t products[kRows] = {};
        products_of(unit.row(j), unit.row(i), unit.stride, 0, unit.half, products);
        bool possible = false;
        const int64_t rows = std::min(kRows, stop - i);
        for (int64_t r = 0; r < rows; ++r) {
          // Cauchy-Schwarz: the second half adds at most the product of its norms.
          possible |= products[r] + unit.rest[j] * unit.rest[i + r] >= threshold - static_cast<scalar_t>(kSlack);
        }
        if (!possible) {
          continue;
        }
        products_of(unit.row(j), unit.row(i), unit.stride, unit.half, unit.stride, products);
        for (int64_t r = 0; r < rows; ++r) {
          if (products[r] >= threshold) {
            first[j] = i + r;
            break;
          }
        }
      }
    }
  }
}

// Indices of the kernels in rank order.
std::vector<int64_t> rank(const Tensor& scores) {
  const Tensor exact = scores.to(at::kDouble).contiguous();
  const double* values = exact.const_data_ptr<double>();
  std::vector<int64_t> order(exact.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [values](int64_t a, int64_t b) {
    return std::isnan(values[b]) ? !std::isnan(values[a]) : values[a] > values[b];
  });
  return order;
}

// first[i], for each kernel i, is the kernel that covers it first; `order` has the kernels in rank order.
template <typename scalar_t>
std::vector<int64_t> first_covering(const Tensor& kernels, const std::vector<int64_t>& order, const int64_t* classes,
                                    double threshold) {
  std::vector<int64_t> sorted = order;
  if (classes != nullptr) {
    std::stable_sort(sorted.begin(), sorted.end(), [classes](int64_t a, int64_t b) { return classes[a] < classes[b]; });
  }
  const auto count = static_cast<int64_t>(sorted.size());
  const auto unit = normalise(kernels.const_data_ptr<scalar_t>(), kernels.size(1), sorted, classes);
  std::vector<int64_t> first_row(count);
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    find_first(unit, static_cast<scalar_t>(threshold), begin, end, first_row.data());
  });
  std::vector<int64_t> first(count);
  for (int64_t i = 0; i < count; ++i) {
    first[sorted[i]] = sorted[first_row[i]];
  }
  return first;
}

// Adds each kernel of a group to its row of `sums`, in rank order, and divides by their number.
template <typename scalar_t>
void average(const Tensor& kernels, const std::vector<int64_t>& order, const int64_t* groups, int64_t rows,
             const Tensor& sums) {
  const int64_t dims = kernels.size(1);
  const scalar_t* source = kernels.const_data_ptr<scalar_t>();
  scalar_t* target = sums.data_ptr<scalar_t>();
  std::vector<int64_t> members(rows);
  for (const int64_t i : order) {
    if (groups[i] >= 0) {
      ++members[groups[i]];
      for (int64_t k = 0; k < dims; ++k) {
        target[groups[i] * dims + k] += source[i * dims + k];
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < dims; ++k) {
      target[row * dims + k] /= static_cast<scalar_t>(members[row]);
    }
  }
}

FuseKernelsResult fuse_kernels_cpu(const Tensor& kernels, const Tensor& scores, const Tensor& classes, double threshold,
                                   bool class_specific) {
  check_fuse_kernels(kernels, scores, classes);
  const int64_t count = kernels.size(0);
  const Tensor wide = kernels.to(fusion_dtype(kernels)).contiguous();
  const Tensor dense_classes = classes.contiguous();
  const int64_t* class_of = class_specific ? dense_classes.const_data_ptr<int64_t>() : nullptr;
  const Tensor fused = at::zeros(wide.sizes(), wide.options());
  const Tensor kept = at::full({count}, -1, classes.options());
  const Tensor groups = at::empty({count}, classes.options());
  const std::vector<int64_t> order = rank(scores);
  int64_t rows = 0;
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "fuse_kernels", [&] {
    const std::vector<int64_t> first = first_covering<scalar_t>(wide, order, class_of, threshold);
    auto* row_of = groups.data_ptr<int64_t>();
    for (const int64_t i : order) {  // a kernel that covers another comes before it
      if (first[i] == i) {
        kept.data_ptr<int64_t>()[rows] = i;
        row_of[i] = rows++;
      } else {
        row_of[i] = first[first[i]] == first[i] ? row_of[first[i]] : -1;
      }
    }
    average<scalar_t>(wide, order, row_of, rows, fused);
  });
  return {fused.to(kernels.scalar_type()), kept, groups, at::scalar_tensor(rows, classes.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) { library.impl("fuse_kernels", fuse_kernels_cpu); }

}  // namespace convmask
