// CPU kernel of kernel fusion. Only what decides is computed: products of kernels of one class, the first parts of a
// product where they show that the whole cannot reach the threshold, and nothing for a kernel after the first that
// covers it.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "fuse_kernels.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define CONVMASK_SSE2
#endif

// The inner loops are compiled for several processors, of which the loader takes the best.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define CONVMASK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CONVMASK_CLONES
#endif
#if defined(__GNUC__)
#define CONVMASK_INLINE inline __attribute__((always_inline))
#define CONVMASK_UNROLL _Pragma("GCC unroll 8")
#else
#define CONVMASK_INLINE inline
#define CONVMASK_UNROLL
#endif

namespace convmask {
namespace {

constexpr int64_t kLanes = 16;   // earlier kernels in a tile
constexpr int64_t kColumns = 8;  // later kernels that a tile is multiplied with at a time
constexpr int64_t kGrain = 256;  // kernels for a thread
constexpr int64_t kParts = 2;    // of a product, each followed by a look at what may still come
constexpr double kSlack = 1e-3;  // more than all rounding of a product of unit vectors

// kLanes numbers that are computed with at once; the compiler splits them into the registers that there are.
#if defined(__GNUC__)
template <typename scalar_t>
struct Vector {
  typedef scalar_t Lanes __attribute__((vector_size(kLanes * sizeof(scalar_t))));
  Lanes lanes;

  static CONVMASK_INLINE Vector load(const scalar_t* values) {
    Vector vector;
    std::memcpy(&vector.lanes, values, sizeof(Lanes));
    return vector;
  }
  CONVMASK_INLINE void add(scalar_t factor, const Vector& other) { lanes += factor * other.lanes; }
  CONVMASK_INLINE void add_square(const Vector& other) { lanes += other.lanes * other.lanes; }
};

// Collects whether any lane of any vector reaches a threshold. Looks at signs, since compilers split wide comparisons
// into single ones. NaN may count as reaching.
template <typename scalar_t>
struct AnyReaches {
  using Word = std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>;
  typedef Word Words __attribute__((vector_size(kLanes * sizeof(Word))));
  Words negative = ~Words{};

  CONVMASK_INLINE void look(const Vector<scalar_t>& vector, scalar_t threshold) {
    const auto difference = vector.lanes - threshold;
    Words bits;
    std::memcpy(&bits, &difference, sizeof(bits));
    negative &= bits;
  }
  CONVMASK_INLINE bool any() const {
    Word words[kLanes];
    std::memcpy(words, &negative, sizeof(words));
    Word all = ~Word{0};
    for (const Word word : words) {
      all &= word;
    }
    return all >> (8 * sizeof(Word) - 1) == 0;
  }
};
#else
template <typename scalar_t>
struct Vector {
  scalar_t lanes[kLanes];

  static Vector load(const scalar_t* values) {
    Vector vector;
    std::copy_n(values, kLanes, vector.lanes);
    return vector;
  }
  void add(scalar_t factor, const Vector& other) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] += factor * other.lanes[i];
    }
  }
  void add_square(const Vector& other) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] += other.lanes[i] * other.lanes[i];
    }
  }
};

template <typename scalar_t>
struct AnyReaches {
  bool reached = false;

  void look(const Vector<scalar_t>& vector, scalar_t threshold) {
    for (const scalar_t lane : vector.lanes) {
      reached |= lane >= threshold;
    }
  }
  bool any() const { return reached; }
};
#endif

// Kernels as unit vectors, sorted by class (if that matters) and by rank within it: those that may be fused are
// neighbours.
template <typename scalar_t>
struct UnitKernels {
  int64_t dims;
  int64_t padded;                     // count, rounded up to whole tiles
  std::unique_ptr<scalar_t[]> rows;   // (count, dims)
  std::unique_ptr<scalar_t[]> tiles;  // (padded / kLanes, dims, kLanes): rows, transposed, and zeros
  std::vector<scalar_t> rest;         // (kParts, padded), norm of the parts that follow a part
  std::vector<int64_t> start;         // (count,), where the class of a row begins
};

inline int64_t part_start(int64_t part, int64_t dims) { return part * dims / kParts; }

// Products of kColumns rows with a tile; false, and no products, if none can reach the threshold.
template <typename scalar_t>
CONVMASK_INLINE bool multiply(const UnitKernels<scalar_t>& unit, const int64_t* columns, int64_t tile_start,
                              scalar_t threshold, scalar_t* products) {
  const scalar_t* rows[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) {
    rows[c] = unit.rows.get() + columns[c] * unit.dims;
  }
  const scalar_t* tile = unit.tiles.get() + tile_start * unit.dims;
  Vector<scalar_t> sums[kColumns] = {};
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t end = part_start(part + 1, unit.dims);
    for (int64_t k = part_start(part, unit.dims); k < end; ++k) {
      const auto entries = Vector<scalar_t>::load(tile + k * kLanes);
      CONVMASK_UNROLL
      for (int64_t c = 0; c < kColumns; ++c) {
        sums[c].add(rows[c][k], entries);
      }
    }
    // Cauchy-Schwarz: what follows adds at most the product of its norms.
    const scalar_t* rest = unit.rest.data() + part * unit.padded;
    const auto tile_rest = Vector<scalar_t>::load(rest + tile_start);
    AnyReaches<scalar_t> reaches;
    CONVMASK_UNROLL
    for (int64_t c = 0; c < kColumns; ++c) {
      Vector<scalar_t> bound = sums[c];
      bound.add(rest[columns[c]], tile_rest);
      reaches.look(bound, threshold - static_cast<scalar_t>(kSlack));
    }
    if (!reaches.any()) {
      return false;
    }
  }
  std::memcpy(products, sums, sizeof(sums));
  return true;
}

CONVMASK_CLONES bool multiply_tile(const UnitKernels<float>& unit, const int64_t* columns, int64_t tile_start,
                                   float threshold, float* products) {
  return multiply(unit, columns, tile_start, threshold, products);
}
CONVMASK_CLONES bool multiply_tile(const UnitKernels<double>& unit, const int64_t* columns, int64_t tile_start,
                                   double threshold, double* products) {
  return multiply(unit, columns, tile_start, threshold, products);
}

// The sum of the squares of values[begin, end).
template <typename scalar_t>
CONVMASK_INLINE scalar_t square_sum(const scalar_t* values, int64_t begin, int64_t end) {
  Vector<scalar_t> sums{};
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) {
    sums.add_square(Vector<scalar_t>::load(values + k));
  }
  scalar_t lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof(lanes));
  for (; k < end; ++k) {
    lanes[0] += values[k] * values[k];
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// Writes the kernel's unit vector to `row` and the norms of what follows each part to rest[part * stride].
template <typename scalar_t>
CONVMASK_INLINE void normalise(const scalar_t* kernel, int64_t dims, scalar_t* row, scalar_t* rest, int64_t stride) {
  scalar_t squares[kParts];  // of each part and all that follow
  scalar_t sum = 0;
  for (int64_t part = kParts - 1; part >= 0; --part) {
    sum += square_sum(kernel, part_start(part, dims), part_start(part + 1, dims));
    squares[part] = sum;
  }
  const scalar_t scale = 1 / std::max(std::sqrt(sum), static_cast<scalar_t>(kSmallestNorm));
  for (int64_t part = 0; part < kParts; ++part) {
    rest[part * stride] = part + 1 < kParts ? std::sqrt(squares[part + 1]) * scale : 0;
  }
  for (int64_t k = 0; k < dims; ++k) {
    row[k] = kernel[k] * scale;
  }
}

CONVMASK_CLONES void normalise_kernel(const float* kernel, int64_t dims, float* row, float* rest, int64_t stride) {
  normalise(kernel, dims, row, rest, stride);
}
CONVMASK_CLONES void normalise_kernel(const double* kernel, int64_t dims, double* row, double* rest, int64_t stride) {
  normalise(kernel, dims, row, rest, stride);
}

// Writes `rows` rows, at most kLanes, to the lanes of a tile.
template <typename scalar_t>
void transpose(const scalar_t* source, int64_t rows, int64_t dims, scalar_t* tile) {
  int64_t row = 0;
#if defined(CONVMASK_SSE2)
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (; row + 4 <= rows && dims % 4 == 0; row += 4) {
      for (int64_t k = 0; k < dims; k += 4) {
        __m128 four[4];
        for (int64_t r = 0; r < 4; ++r) {
          four[r] = _mm_loadu_ps(source + (row + r) * dims + k);
        }
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int64_t r = 0; r < 4; ++r) {
          _mm_storeu_ps(tile + (k + r) * kLanes + row, four[r]);
        }
      }
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t k = 0; k < dims; ++k) {
      tile[k * kLanes + row] = source[row * dims + k];
    }
  }
}

template <typename scalar_t>
UnitKernels<scalar_t> unit_kernels(const scalar_t* kernels, int64_t dims, const std::vector<int64_t>& sorted,
                                   const int64_t* classes) {
  const auto count = static_cast<int64_t>(sorted.size());
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  UnitKernels<scalar_t> unit{dims, padded, {}, {}, {}, {}};
  unit.rows.reset(new scalar_t[count * dims]);
  unit.tiles.reset(new scalar_t[padded * dims]);
  unit.rest.resize(kParts * padded);
  unit.start.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const bool follows = i > 0 && (classes == nullptr || classes[sorted[i]] == classes[sorted[i - 1]]);
    unit.start[i] = follows ? unit.start[i - 1] : i;
    normalise_kernel(kernels + sorted[i] * dims, dims, unit.rows.get() + i * dims, unit.rest.data() + i, padded);
  }
  for (int64_t i = 0; i < padded; i += kLanes) {
    const int64_t rows = std::min(kLanes, count - i);
    if (rows < kLanes) {
      std::fill_n(unit.tiles.get() + i * dims, kLanes * dims, scalar_t{0});
    }
    transpose(unit.rows.get() + i * dims, rows, dims, unit.tiles.get() + i * dims);
  }
  return unit;
}

// For the rows [begin, end) the first row that covers each; itself if there is none before it.
template <typename scalar_t>
void find_first(const UnitKernels<scalar_t>& unit, scalar_t threshold, int64_t begin, int64_t end, int64_t* first) {
  std::iota(first + begin, first + end, begin);
  std::vector<int64_t> open(first + begin, first + end);  // the rows that no row before the tile covers
  for (int64_t tile = unit.start[begin] / kLanes * kLanes; tile < end; tile += kLanes) {
    const auto covered = [&](int64_t j) { return first[j] != j || j <= tile; };
    open.erase(std::remove_if(open.begin(), open.end(), covered), open.end());
    for (size_t block = 0; block < open.size() && unit.start[open[block]] < tile + kLanes; block += kColumns) {
      int64_t columns[kColumns];
      for (size_t c = 0; c < kColumns; ++c) {
        columns[c] = open[std::min(block + c, open.size() - 1)];  // the last one again and again fills the block
      }
      scalar_t products[kColumns * kLanes];
      if (!multiply_tile(unit, columns, tile, threshold, products)) {
        continue;
      }
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t j = columns[c];
        for (int64_t i = std::max(tile, unit.start[j]); i < std::min(tile + kLanes, j) && first[j] == j; ++i) {
          first[j] = products[c * kLanes + i - tile] >= threshold ? i : j;
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
  const auto unit = unit_kernels(kernels.const_data_ptr<scalar_t>(), kernels.size(1), sorted, classes);
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

// Writes the mean of each group to its row, added up in rank order, and zeros to the rows that are left.
template <typename scalar_t>
void average(const Tensor& kernels, const std::vector<int64_t>& order, const int64_t* groups, int64_t rows,
             const Tensor& means) {
  const int64_t dims = kernels.size(1);
  std::vector<int64_t> members(rows);
  for (const int64_t i : order) {
    if (groups[i] < 0) {
      continue;
    }
    const scalar_t* kernel = kernels.const_data_ptr<scalar_t>() + i * dims;
    scalar_t* mean = means.data_ptr<scalar_t>() + groups[i] * dims;
    if (members[groups[i]]++ == 0) {
      std::copy_n(kernel, dims, mean);
      continue;
    }
    for (int64_t k = 0; k < dims; ++k) {
      mean[k] += kernel[k];
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    scalar_t* mean = means.data_ptr<scalar_t>() + row * dims;
    for (int64_t k = 0; k < dims && members[row] > 1; ++k) {
      mean[k] /= static_cast<scalar_t>(members[row]);
    }
  }
  std::fill(means.data_ptr<scalar_t>() + rows * dims, means.data_ptr<scalar_t>() + means.numel(), scalar_t{0});
}

FuseKernelsResult fuse_kernels_cpu(const Tensor& kernels, const Tensor& scores, const Tensor& classes, double threshold,
                                   bool class_specific) {
  check_fuse_kernels(kernels, scores, classes);
  const int64_t count = kernels.size(0);
  const Tensor wide = kernels.to(fusion_dtype(kernels)).contiguous();
  const Tensor dense_classes = classes.contiguous();
  const int64_t* class_of = class_specific ? dense_classes.const_data_ptr<int64_t>() : nullptr;
  const Tensor fused = at::empty(wide.sizes(), wide.options());
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
