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
constexpr int64_t kParts = 4;    // of a product, each followed by a look at what may still come
constexpr double kSlack = 1e-3;  // more than all rounding of a product of unit vectors
// What a thread should have to do at least: kernels, tiles, and pairs of kernels times dimensions.
constexpr int64_t kRowGrain = 64, kTileGrain = 4, kThreadProducts = 1 << 21;

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
  CONVMASK_INLINE void add_product(const Vector& a, const Vector& b) { lanes += a.lanes * b.lanes; }
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
  void add_product(const Vector& a, const Vector& b) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] += a.lanes[i] * b.lanes[i];
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

// Kernels in groups that may be fused: sorted by class (if that matters) and by rank within it.
template <typename scalar_t>
struct Ranked {
  const scalar_t* kernels;  // (count, dims), in the order of the arguments
  int64_t dims;
  std::vector<int64_t> sorted;  // (count,), rows of `kernels`
  std::vector<scalar_t> scale;  // (count,), 1 / norm
  std::vector<scalar_t> rest;   // (count, kParts), norms of what follows each part of the unit vector

  CONVMASK_INLINE const scalar_t* row(int64_t i) const { return kernels + sorted[i] * dims; }
};

// A group's unit vectors, kLanes of them interleaved.
template <typename scalar_t>
struct Tiles {
  int64_t begin;                       // the group's first kernel
  std::unique_ptr<scalar_t[]> values;  // (tiles, dims, kLanes), zeros behind the group's last kernel
  std::vector<scalar_t> rest;          // (tiles, kParts, kLanes)
};

inline int64_t part_start(int64_t part, int64_t dims) { return part * dims / kParts; }

// Cosines of kColumns kernels with those of a tile; false, and no cosines, if none can reach the threshold.
template <typename scalar_t>
CONVMASK_INLINE bool multiply(const Ranked<scalar_t>& ranked, const int64_t* columns, const scalar_t* tile,
                              const scalar_t* tile_rest, scalar_t threshold, scalar_t* cosines) {
  const scalar_t* rows[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) {
    rows[c] = ranked.row(columns[c]);
  }
  Vector<scalar_t> sums[kColumns] = {};
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t end = part_start(part + 1, ranked.dims);
    for (int64_t k = part_start(part, ranked.dims); k < end; ++k) {
      const auto entries = Vector<scalar_t>::load(tile + k * kLanes);
      CONVMASK_UNROLL
      for (int64_t c = 0; c < kColumns; ++c) {
        sums[c].add(rows[c][k], entries);
      }
    }
    // Cauchy-Schwarz: what follows adds at most the product of its norms.
    const auto others = Vector<scalar_t>::load(tile_rest + part * kLanes);
    AnyReaches<scalar_t> reaches;
    CONVMASK_UNROLL
    for (int64_t c = 0; c < kColumns; ++c) {
      Vector<scalar_t> bound{};
      bound.add(ranked.scale[columns[c]], sums[c]);
      bound.add(ranked.rest[columns[c] * kParts + part], others);
      reaches.look(bound, threshold - static_cast<scalar_t>(kSlack));
    }
    if (!reaches.any()) {
      return false;
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    Vector<scalar_t> cosine{};
    cosine.add(ranked.scale[columns[c]], sums[c]);
    std::memcpy(cosines + c * kLanes, &cosine, sizeof(cosine));
  }
  return true;
}

CONVMASK_CLONES bool multiply_tile(const Ranked<float>& ranked, const int64_t* columns, const float* tile,
                                   const float* tile_rest, float threshold, float* cosines) {
  return multiply(ranked, columns, tile, tile_rest, threshold, cosines);
}
CONVMASK_CLONES bool multiply_tile(const Ranked<double>& ranked, const int64_t* columns, const double* tile,
                                   const double* tile_rest, double threshold, double* cosines) {
  return multiply(ranked, columns, tile, tile_rest, threshold, cosines);
}

// The product of a[begin, end) and b[begin, end).
template <typename scalar_t>
CONVMASK_INLINE scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t begin, int64_t end) {
  Vector<scalar_t> sums[2] = {};  // a sum waits for the last addition to it: two of them wait half as long
  int64_t k = begin;
  for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = k + half * kLanes;
      sums[half].add_product(Vector<scalar_t>::load(a + at), Vector<scalar_t>::load(b + at));
    }
  }
  for (; k + kLanes <= end; k += kLanes) {
    sums[0].add_product(Vector<scalar_t>::load(a + k), Vector<scalar_t>::load(b + k));
  }
  sums[0].add(1, sums[1]);
  scalar_t lanes[kLanes];
  std::memcpy(lanes, &sums[0], sizeof(lanes));
  for (; k < end; ++k) {
    lanes[0] += a[k] * b[k];
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// 1 / norm of a kernel; norms of what follows each part of its unit vector go to rest[0, kParts).
template <typename scalar_t>
CONVMASK_INLINE scalar_t measure(const scalar_t* kernel, int64_t dims, scalar_t* rest) {
  scalar_t sum = 0;  // of the squares of this part and all that follow
  for (int64_t part = kParts - 1; part >= 0; --part) {
    rest[part] = sum;
    sum += dot(kernel, kernel, part_start(part, dims), part_start(part + 1, dims));
  }
  const scalar_t scale = 1 / std::max(std::sqrt(sum), static_cast<scalar_t>(kSmallestNorm));
  for (int64_t part = 0; part < kParts; ++part) {
    rest[part] = std::sqrt(rest[part]) * scale;
  }
  return scale;
}

CONVMASK_CLONES float measure_kernel(const float* kernel, int64_t dims, float* rest) {
  return measure(kernel, dims, rest);
}
CONVMASK_CLONES double measure_kernel(const double* kernel, int64_t dims, double* rest) {
  return measure(kernel, dims, rest);
}

// For each kernel of a small group the first that covers it: one product after the other.
template <typename scalar_t>
CONVMASK_INLINE void compare(const Ranked<scalar_t>& ranked, int64_t begin, int64_t end, scalar_t threshold,
                             int64_t* first) {
  for (int64_t j = begin; j < end; ++j) {
    first[j] = j;
    for (int64_t i = begin; i < j && first[j] == j; ++i) {
      const scalar_t cosine = dot(ranked.row(i), ranked.row(j), 0, ranked.dims) * ranked.scale[i] * ranked.scale[j];
      first[j] = cosine >= threshold ? i : j;
    }
  }
}

CONVMASK_CLONES void compare_group(const Ranked<float>& ranked, int64_t begin, int64_t end, float threshold,
                                   int64_t* first) {
  compare(ranked, begin, end, threshold, first);
}
CONVMASK_CLONES void compare_group(const Ranked<double>& ranked, int64_t begin, int64_t end, double threshold,
                                   int64_t* first) {
  compare(ranked, begin, end, threshold, first);
}

// Writes unit vectors [begin, end), at most kLanes, to the lanes of a tile.
template <typename scalar_t>
void fill_tile(const Ranked<scalar_t>& ranked, int64_t begin, int64_t end, scalar_t* tile) {
  const int64_t dims = ranked.dims;
  if (end - begin < kLanes) {
    std::fill_n(tile, kLanes * dims, scalar_t{0});
  }
  int64_t i = begin;
#if defined(CONVMASK_SSE2)
  if constexpr (std::is_same_v<scalar_t, float>) {
    for (; i + 4 <= end && dims % 4 == 0; i += 4) {
      for (int64_t k = 0; k < dims; k += 4) {
        __m128 four[4];
        for (int64_t r = 0; r < 4; ++r) {
          four[r] = _mm_mul_ps(_mm_loadu_ps(ranked.row(i + r) + k), _mm_set1_ps(ranked.scale[i + r]));
        }
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int64_t r = 0; r < 4; ++r) {
          _mm_storeu_ps(tile + (k + r) * kLanes + i - begin, four[r]);
        }
      }
    }
  }
#endif
  for (; i < end; ++i) {
    for (int64_t k = 0; k < dims; ++k) {
      tile[k * kLanes + i - begin] = ranked.row(i)[k] * ranked.scale[i];
    }
  }
}

template <typename scalar_t>
Tiles<scalar_t> tiles_of(const Ranked<scalar_t>& ranked, int64_t begin, int64_t end) {
  const int64_t count = (end - begin + kLanes - 1) / kLanes;
  Tiles<scalar_t> tiles{begin, nullptr, std::vector<scalar_t>(count * kParts * kLanes)};
  tiles.values.reset(new scalar_t[count * ranked.dims * kLanes]);
  at::parallel_for(0, count, kTileGrain, [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile) {
      const int64_t start = begin + tile * kLanes, stop = std::min(start + kLanes, end);
      fill_tile(ranked, start, stop, tiles.values.get() + tile * ranked.dims * kLanes);
      for (int64_t i = start; i < stop; ++i) {
        for (int64_t part = 0; part < kParts; ++part) {
          tiles.rest[(tile * kParts + part) * kLanes + i - start] = ranked.rest[i * kParts + part];
        }
      }
    }
  });
  return tiles;
}

// For the kernels `open` of a group, ascending, the first that covers each.
template <typename scalar_t>
void find_first(const Ranked<scalar_t>& ranked, const Tiles<scalar_t>& tiles, scalar_t threshold,
                std::vector<int64_t> open, int64_t* first) {
  for (const int64_t j : open) {
    first[j] = j;
  }
  for (int64_t index = 0, tile = tiles.begin; !open.empty(); ++index, tile += kLanes) {
    const scalar_t* values = tiles.values.get() + index * ranked.dims * kLanes;
    const scalar_t* rest = tiles.rest.data() + index * kParts * kLanes;
    for (size_t block = 0; block < open.size(); block += kColumns) {
      int64_t columns[kColumns];
      for (size_t c = 0; c < kColumns; ++c) {
        columns[c] = open[std::min(block + c, open.size() - 1)];  // the last one again and again fills the block
      }
      scalar_t cosines[kColumns * kLanes];
      if (!multiply_tile(ranked, columns, values, rest, threshold, cosines)) {
        continue;
      }
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t j = columns[c];
        for (int64_t i = tile; i < std::min(tile + kLanes, j) && first[j] == j; ++i) {
          first[j] = cosines[c * kLanes + i - tile] >= threshold ? i : j;
        }
      }
    }
    // what is covered, or has no earlier kernel in the next tile
    const auto closed = [&](int64_t j) { return first[j] != j || j <= tile + kLanes; };
    open.erase(std::remove_if(open.begin(), open.end(), closed), open.end());
  }
}

// For each kernel of a group the first that covers it; itself if there is none before it.
template <typename scalar_t>
void cover_group(const Ranked<scalar_t>& ranked, int64_t begin, int64_t end, scalar_t threshold, int64_t* first) {
  const int64_t count = end - begin;
  if (count <= kLanes) {
    compare_group(ranked, begin, end, threshold, first);
    return;
  }
  const auto tiles = tiles_of(ranked, begin, end);
  // Blocks of kernels go to the threads in turn: later ones have more to be compared with.
  const int64_t most = count * count * ranked.dims / kThreadProducts;
  const int64_t threads = std::clamp<int64_t>(most, 1, at::in_parallel_region() ? 1 : at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    std::vector<int64_t> open;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t thread = (j - begin) / kColumns % threads;
      if (from <= thread && thread < to) {
        open.push_back(j);
      }
    }
    find_first(ranked, tiles, threshold, std::move(open), first);
  });
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
  Ranked<scalar_t> ranked{kernels.const_data_ptr<scalar_t>(), kernels.size(1), order, {}, {}};
  auto& sorted = ranked.sorted;
  if (classes != nullptr) {
    std::stable_sort(sorted.begin(), sorted.end(), [classes](int64_t a, int64_t b) { return classes[a] < classes[b]; });
  }
  const auto count = static_cast<int64_t>(sorted.size());
  ranked.scale.resize(count);
  ranked.rest.resize(count * kParts);
  at::parallel_for(0, count, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ranked.scale[i] = measure_kernel(ranked.row(i), ranked.dims, ranked.rest.data() + i * kParts);
    }
  });
  std::vector<int64_t> first_row(count), first(count);
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count; ++end) {
      if (classes != nullptr && classes[sorted[end]] != classes[sorted[begin]]) {
        break;
      }
    }
    cover_group(ranked, begin, end, static_cast<scalar_t>(threshold), first_row.data());
  }
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
  const auto* source = kernels.const_data_ptr<scalar_t>();
  auto* target = means.data_ptr<scalar_t>();
  std::vector<int64_t> members(rows);
  at::parallel_for(0, kernels.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (const int64_t i : order) {
      if (groups[i] < begin || groups[i] >= end) {
        continue;
      }
      const scalar_t* kernel = source + i * dims;
      scalar_t* mean = target + groups[i] * dims;
      if (members[groups[i]]++ == 0) {
        std::copy_n(kernel, dims, mean);
        continue;
      }
      for (int64_t k = 0; k < dims; ++k) {
        mean[k] += kernel[k];
      }
    }
    for (int64_t row = begin; row < std::min(end, rows); ++row) {
      for (int64_t k = 0; k < dims && members[row] > 1; ++k) {
        target[row * dims + k] /= static_cast<scalar_t>(members[row]);
      }
    }
    const int64_t zeros = std::max(begin, std::min(end, rows));
    std::fill(target + zeros * dims, target + end * dims, scalar_t{0});
  });
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
