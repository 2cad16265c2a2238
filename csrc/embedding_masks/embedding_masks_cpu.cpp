// CPU kernels of embedding-distance masks. All pixels of a row are computed side by side, kLanes at a time.
//
// Whole maps: blocks of pixels are copied together, so that all of their dimensions stay in the first cache while every
// proposal visits them. Boxes: the rows of a box are visited where they lie, and nothing else is read or written.
// Backward, threads share the dimensions: each dimension of all gradients belongs to one thread.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "embedding_masks.h"

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

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 8;                  // of kLanes pixels, computed together
constexpr int64_t kBlock = kVectors * kLanes;    // pixels that are copied together, forward
constexpr int64_t kTileVectors = 4;              // the same, backward
constexpr int64_t kTile = kTileVectors * kLanes;

// kLanes numbers that are computed with at once; the compiler splits them into the registers that there are.
#if defined(__GNUC__)
template <typename scalar_t>
struct Lanes {
  typedef scalar_t Values __attribute__((vector_size(kLanes * sizeof(scalar_t))));
  Values values;

  CONVMASK_INLINE scalar_t operator[](int64_t lane) const { return values[lane]; }
};
template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> operator-(Lanes<scalar_t> a, scalar_t b) {
  return {a.values - b};
}
template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> operator+(Lanes<scalar_t> a, Lanes<scalar_t> b) {
  return {a.values + b.values};
}
template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> operator*(Lanes<scalar_t> a, Lanes<scalar_t> b) {
  return {a.values * b.values};
}
template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> operator*(Lanes<scalar_t> a, scalar_t b) {
  return {a.values * b};
}
#else
template <typename scalar_t>
struct Lanes {
  scalar_t values[kLanes];

  scalar_t operator[](int64_t lane) const { return values[lane]; }
};
#define CONVMASK_LANES_OPERATOR(symbol, right, right_value)                               \
  template <typename scalar_t>                                                            \
  inline Lanes<scalar_t> operator symbol(Lanes<scalar_t> a, right b) {                    \
    for (int64_t i = 0; i < kLanes; ++i) a.values[i] = a.values[i] symbol right_value;    \
    return a;                                                                             \
  }
CONVMASK_LANES_OPERATOR(-, scalar_t, b)
CONVMASK_LANES_OPERATOR(+, Lanes<scalar_t>, b.values[i])
CONVMASK_LANES_OPERATOR(*, Lanes<scalar_t>, b.values[i])
CONVMASK_LANES_OPERATOR(*, scalar_t, b)
#endif

template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> load(const scalar_t* source) {
  Lanes<scalar_t> lanes;
  std::memcpy(&lanes, source, sizeof(lanes));
  return lanes;
}
template <typename scalar_t>
CONVMASK_INLINE void store(scalar_t* target, const Lanes<scalar_t>& lanes) {
  std::memcpy(target, &lanes, sizeof(lanes));
}
template <typename scalar_t>
CONVMASK_INLINE scalar_t sum_of(const Lanes<scalar_t>& lanes) {
  scalar_t parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      parts[lane] += parts[lane + width];
    }
  }
  return parts[0];
}

// The cells of one proposal, and where their values lie.
struct Window {
  int64_t x, y, width, height;
  int64_t offset;  // of the first value
  int64_t stride;  // from one row of values to the next
};

// A map with proposals, all contiguous.
template <typename scalar_t>
struct Embeddings {
  const scalar_t* pixels;     // (dims, height * width)
  const scalar_t* proposals;  // (count, dims)
  const scalar_t* margins;    // (count, dims) if per_dimension, else (count,)
  bool per_dimension;
  int64_t count, dims, height, width;

  int64_t size() const { return height * width; }
};

// kVectors vectors of pixels, `stride` from one dimension to the next, against one proposal: minus their distances.
template <typename scalar_t, bool per_dimension>
CONVMASK_INLINE void measure(const scalar_t* const* pixels, int64_t stride, int64_t dims, const scalar_t* proposal,
                             const scalar_t* margin, Lanes<scalar_t>* values) {
  Lanes<scalar_t> sums[kVectors] = {};
  for (int64_t d = 0; d < dims; ++d) {
    const scalar_t center = proposal[d];
    CONVMASK_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto difference = load(pixels[v] + d * stride) - center;
      if constexpr (per_dimension) {
        sums[v] = sums[v] + difference * difference * margin[d];
      } else {
        sums[v] = sums[v] + difference * difference;
      }
    }
  }
  const scalar_t factor = per_dimension ? scalar_t{-1} : -margin[0];
  CONVMASK_UNROLL
  for (int64_t v = 0; v < kVectors; ++v) {
    values[v] = sums[v] * factor;
  }
}

// Pixels [begin, end) of the map, at most kBlock, against all proposals. `block` has room for dims * kBlock.
template <typename scalar_t>
CONVMASK_INLINE void measure_block(const Embeddings<scalar_t>& map, int64_t begin, int64_t end, scalar_t* block,
                                   scalar_t* values) {
  const int64_t pixels = end - begin;
  for (int64_t d = 0; d < map.dims; ++d) {
    const scalar_t* source = map.pixels + d * map.size() + begin;
    std::memcpy(block + d * kBlock, source, pixels * sizeof(scalar_t));
    std::fill(block + d * kBlock + pixels, block + (d + 1) * kBlock, scalar_t{0});
  }
  const scalar_t* vectors[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    vectors[v] = block + v * kLanes;
  }
  for (int64_t k = 0; k < map.count; ++k) {
    Lanes<scalar_t> found[kVectors];
    const scalar_t* proposal = map.proposals + k * map.dims;
    if (map.per_dimension) {
      measure<scalar_t, true>(vectors, kBlock, map.dims, proposal, map.margins + k * map.dims, found);
    } else {
      measure<scalar_t, false>(vectors, kBlock, map.dims, proposal, map.margins + k, found);
    }
    std::memcpy(values + k * map.size() + begin, found, pixels * sizeof(scalar_t));
  }
}

// The value of one pixel, where a whole vector would reach beyond the map.
template <typename scalar_t>
CONVMASK_INLINE scalar_t measure_one(const Embeddings<scalar_t>& map, int64_t pixel, const scalar_t* proposal,
                                     const scalar_t* margin) {
  scalar_t sum = 0;
  for (int64_t d = 0; d < map.dims; ++d) {
    const scalar_t difference = map.pixels[d * map.size() + pixel] - proposal[d];
    sum += (map.per_dimension ? margin[d] : scalar_t{1}) * difference * difference;
  }
  return map.per_dimension ? -sum : -margin[0] * sum;
}

// A vector of pixels of a row, of which the first `count` belong to the box.
template <typename scalar_t>
struct Piece {
  scalar_t* target;
  int64_t count;
};

template <typename scalar_t>
CONVMASK_INLINE void measure_pieces(const Embeddings<scalar_t>& map, const scalar_t** vectors,
                                    const Piece<scalar_t>* pieces, int64_t number, const scalar_t* proposal,
                                    const scalar_t* margin) {
  for (int64_t v = number; v < kVectors; ++v) {
    vectors[v] = vectors[0];
  }
  Lanes<scalar_t> found[kVectors];
  if (map.per_dimension) {
    measure<scalar_t, true>(vectors, map.size(), map.dims, proposal, margin, found);
  } else {
    measure<scalar_t, false>(vectors, map.size(), map.dims, proposal, margin, found);
  }
  for (int64_t v = 0; v < number; ++v) {
    if (pieces[v].count == kLanes) {
      store(pieces[v].target, found[v]);
    } else {
      scalar_t lanes[kLanes];
      store(lanes, found[v]);
      for (int64_t lane = 0; lane < pieces[v].count; ++lane) {
        pieces[v].target[lane] = lanes[lane];
      }
    }
  }
}

// The cells of a box against its proposal k.
template <typename scalar_t>
CONVMASK_INLINE void measure_window(const Embeddings<scalar_t>& map, int64_t k, const Window& window,
                                    scalar_t* values) {
  const scalar_t* proposal = map.proposals + k * map.dims;
  const scalar_t* margin = map.margins + (map.per_dimension ? k * map.dims : k);
  const scalar_t* vectors[kVectors];
  Piece<scalar_t> pieces[kVectors];
  int64_t number = 0;
  for (int64_t row = 0; row < window.height; ++row) {
    const int64_t source = (window.y + row) * map.width + window.x;
    scalar_t* target = values + window.offset + row * window.stride;
    for (int64_t x = 0; x < window.width; x += kLanes) {
      const int64_t count = std::min(kLanes, window.width - x);
      if (source + x + kLanes > map.size()) {
        for (int64_t lane = 0; lane < count; ++lane) {
          target[x + lane] = measure_one(map, source + x + lane, proposal, margin);
        }
        continue;
      }
      vectors[number] = map.pixels + source + x;
      pieces[number++] = {target + x, count};
      if (number == kVectors) {
        measure_pieces(map, vectors, pieces, number, proposal, margin);
        number = 0;
      }
    }
  }
  if (number > 0) {
    measure_pieces(map, vectors, pieces, number, proposal, margin);
  }
}

// Gradients, (dims, height * width) of the pixels and (count, dims) of the others, in one dimension each.
template <typename scalar_t>
struct Gradients {
  scalar_t* pixels;
  scalar_t* proposals;
  scalar_t* margins;
};

template <typename scalar_t>
CONVMASK_INLINE scalar_t twice_margin(const Embeddings<scalar_t>& map, int64_t k, int64_t d) {
  return 2 * map.margins[map.per_dimension ? k * map.dims + d : k];
}

// Pixels [begin, end) of whole maps, at most kTile, in the dimensions [first, last). `tile` has the gradients of all
// proposals there, (count, kTile); `sums` the sums of the other gradients so far, (last - first, count, 2, kLanes).
template <typename scalar_t>
CONVMASK_INLINE void differentiate_tile(const Embeddings<scalar_t>& map, int64_t begin, int64_t end, int64_t first,
                                        int64_t last, const scalar_t* tile, scalar_t* sums,
                                        const Gradients<scalar_t>& gradients) {
  const int64_t pixels = end - begin;
  for (int64_t d = first; d < last; ++d) {
    scalar_t buffer[kTile] = {};
    std::memcpy(buffer, map.pixels + d * map.size() + begin, pixels * sizeof(scalar_t));
    Lanes<scalar_t> values[kTileVectors], of_pixels[kTileVectors] = {};
    for (int64_t v = 0; v < kTileVectors; ++v) {
      values[v] = load(buffer + v * kLanes);
    }
    scalar_t* sum = sums + (d - first) * map.count * 2 * kLanes;
    for (int64_t k = 0; k < map.count; ++k, sum += 2 * kLanes) {
      const scalar_t center = map.proposals[k * map.dims + d];
      const scalar_t factor = -twice_margin(map, k, d);
      auto of_proposal = load(sum), of_margin = load(sum + kLanes);
      CONVMASK_UNROLL
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const auto difference = values[v] - center;
        const auto weighted = load(tile + k * kTile + v * kLanes) * difference;
        of_pixels[v] = of_pixels[v] + weighted * factor;
        of_proposal = of_proposal + weighted;
        of_margin = of_margin + weighted * difference;
      }
      store(sum, of_proposal);
      store(sum + kLanes, of_margin);
    }
    for (int64_t v = 0; v < kTileVectors; ++v) {
      store(buffer + v * kLanes, of_pixels[v]);
    }
    std::memcpy(gradients.pixels + d * map.size() + begin, buffer, pixels * sizeof(scalar_t));
  }
}

// The first `count` lanes of a vector, and zeros.
template <typename scalar_t>
CONVMASK_INLINE Lanes<scalar_t> load_some(const scalar_t* source, int64_t count) {
  scalar_t lanes[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    lanes[lane] = source[lane];
  }
  return load(lanes);
}

// The cells of a box in one dimension. Adds to the gradient of the pixels.
template <typename scalar_t>
CONVMASK_INLINE void differentiate_window(const Embeddings<scalar_t>& map, int64_t k, int64_t d, const Window& window,
                                          const scalar_t* gradient, const Gradients<scalar_t>& gradients) {
  const scalar_t center = map.proposals[k * map.dims + d];
  const scalar_t factor = twice_margin(map, k, d);
  Lanes<scalar_t> of_proposal[2] = {}, of_margin[2] = {};
  for (int64_t row = 0; row < window.height; ++row) {
    const int64_t source = d * map.size() + (window.y + row) * map.width + window.x;
    const scalar_t* pixels = map.pixels + source;
    const scalar_t* outer = gradient + window.offset + row * window.stride;
    scalar_t* of_pixels = gradients.pixels + source;
    int64_t x = 0;
    for (int64_t v = 0; x + kLanes <= window.width; x += kLanes, v ^= 1) {
      const auto difference = load(pixels + x) - center;
      const auto weighted = load(outer + x) * difference;
      store(of_pixels + x, load(of_pixels + x) + weighted * -factor);
      of_proposal[v] = of_proposal[v] + weighted;
      of_margin[v] = of_margin[v] + weighted * difference;
    }
    if (x < window.width) {
      // where the gradient is 0, 0 times the difference is too: the pixels read are those of the box
      const int64_t count = window.width - x;
      scalar_t lanes[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = lane < count ? pixels[x + lane] : center;
      }
      const auto difference = load(lanes) - center;
      const auto weighted = load_some(outer + x, count) * difference;
      store(lanes, weighted * -factor);
      for (int64_t lane = 0; lane < count; ++lane) {
        of_pixels[x + lane] += lanes[lane];
      }
      of_proposal[0] = of_proposal[0] + weighted;
      of_margin[0] = of_margin[0] + weighted * difference;
    }
  }
  gradients.proposals[k * map.dims + d] = factor * sum_of(of_proposal[0] + of_proposal[1]);
  gradients.margins[k * map.dims + d] = -sum_of(of_margin[0] + of_margin[1]);
}

#define CONVMASK_STAMP(scalar_t)                                                                                      \
  CONVMASK_CLONES void run_measure_block(const Embeddings<scalar_t>& map, int64_t begin, int64_t end, scalar_t* block,\
                                         scalar_t* values) {                                                          \
    measure_block(map, begin, end, block, values);                                                                    \
  }                                                                                                                   \
  CONVMASK_CLONES void run_measure_window(const Embeddings<scalar_t>& map, int64_t k, const Window& window,           \
                                          scalar_t* values) {                                                         \
    measure_window(map, k, window, values);                                                                           \
  }                                                                                                                   \
  CONVMASK_CLONES void run_differentiate_tile(const Embeddings<scalar_t>& map, int64_t begin, int64_t end,            \
                                              int64_t first, int64_t last, const scalar_t* tile, scalar_t* sums,      \
                                              const Gradients<scalar_t>& gradients) {                                 \
    differentiate_tile(map, begin, end, first, last, tile, sums, gradients);                                          \
  }                                                                                                                   \
  CONVMASK_CLONES void run_differentiate_window(const Embeddings<scalar_t>& map, int64_t k, int64_t first,            \
                                                int64_t last, const Window& window, const scalar_t* gradient,         \
                                                const Gradients<scalar_t>& gradients) {                               \
    for (int64_t d = first; d < last; ++d) {                                                                          \
      differentiate_window(map, k, d, window, gradient, gradients);                                                   \
    }                                                                                                                 \
  }
CONVMASK_STAMP(float)
CONVMASK_STAMP(double)

// Dense tensors of the wide dtype; holds them as long as the pointers are used.
template <typename scalar_t>
struct WideEmbeddings {
  Tensor pixels, proposals, margins;
  Embeddings<scalar_t> map;

  WideEmbeddings(const Tensor& pixels_, const Tensor& proposals_, const Tensor& margins_)
      : pixels(widen(pixels_)), proposals(widen(proposals_)), margins(widen(margins_)) {
    map = {pixels.const_data_ptr<scalar_t>(),
           proposals.const_data_ptr<scalar_t>(),
           margins.const_data_ptr<scalar_t>(),
           margins.dim() == 2,
           proposals.size(0),
           pixels.size(0),
           pixels.size(1),
           pixels.size(2)};
  }

  static Tensor widen(const Tensor& tensor) { return tensor.to(embedding_dtype(tensor)).contiguous(); }
};

// The windows of the boxes, cut to the map. Their values lie in whole maps, or (in_boxes) one box after the other.
std::vector<Window> windows_of(const Tensor& boxes, int64_t height, int64_t width, bool in_boxes) {
  const Tensor dense = boxes.contiguous();
  const int64_t* box = dense.const_data_ptr<int64_t>();
  std::vector<Window> windows(boxes.size(0));
  int64_t offset = 0;
  for (size_t k = 0; k < windows.size(); ++k, box += 4) {
    const int64_t x = std::clamp<int64_t>(box[0], 0, width), y = std::clamp<int64_t>(box[1], 0, height);
    const int64_t columns = std::max<int64_t>(std::clamp<int64_t>(box[2], 0, width) - x, 0);
    const int64_t rows = std::max<int64_t>(std::clamp<int64_t>(box[3], 0, height) - y, 0);
    windows[k] = {x, y, columns, rows, offset, columns};
    if (in_boxes) {
      offset += rows * columns;
    } else {
      windows[k].offset = static_cast<int64_t>(k) * height * width + y * width + x;
      windows[k].stride = width;
    }
  }
  return windows;
}

int64_t cells_of(const std::vector<Window>& windows) {
  int64_t cells = 0;
  for (const Window& window : windows) {
    cells += window.width * window.height;
  }
  return cells;
}

template <typename scalar_t>
void measure_all(const Embeddings<scalar_t>& map, scalar_t* values) {
  const int64_t blocks = (map.size() + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> block(map.dims * kBlock);
    for (int64_t b = begin; b < end; ++b) {
      run_measure_block(map, b * kBlock, std::min((b + 1) * kBlock, map.size()), block.data(), values);
    }
  });
}

template <typename scalar_t>
void measure_windows(const Embeddings<scalar_t>& map, const std::vector<Window>& windows, scalar_t* values) {
  at::parallel_for(0, static_cast<int64_t>(windows.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      run_measure_window(map, k, windows[k], values);
    }
  });
}

template <typename scalar_t>
void differentiate_all(const Embeddings<scalar_t>& map, const scalar_t* gradient,
                       const Gradients<scalar_t>& gradients) {
  at::parallel_for(0, map.dims, 1, [&](int64_t first, int64_t last) {
    std::vector<scalar_t> tile(map.count * kTile), sums((last - first) * map.count * 2 * kLanes);
    for (int64_t begin = 0; begin < map.size(); begin += kTile) {
      const int64_t end = std::min(begin + kTile, map.size());
      for (int64_t k = 0; k < map.count; ++k) {
        std::memcpy(tile.data() + k * kTile, gradient + k * map.size() + begin, (end - begin) * sizeof(scalar_t));
        std::fill(tile.begin() + k * kTile + (end - begin), tile.begin() + (k + 1) * kTile, scalar_t{0});
      }
      run_differentiate_tile(map, begin, end, first, last, tile.data(), sums.data(), gradients);
    }
    for (int64_t d = first; d < last; ++d) {
      for (int64_t k = 0; k < map.count; ++k) {
        const scalar_t* sum = sums.data() + ((d - first) * map.count + k) * 2 * kLanes;
        gradients.proposals[k * map.dims + d] = twice_margin(map, k, d) * sum_of(load(sum));
        gradients.margins[k * map.dims + d] = -sum_of(load(sum + kLanes));
      }
    }
  });
}

template <typename scalar_t>
void differentiate_windows(const Embeddings<scalar_t>& map, const std::vector<Window>& windows,
                           const scalar_t* gradient, const Gradients<scalar_t>& gradients) {
  at::parallel_for(0, map.dims, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k < map.count; ++k) {
      run_differentiate_window(map, k, first, last, windows[k], gradient, gradients);
    }
  });
}

Tensor embedding_masks_cpu(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                           const std::optional<Tensor>& boxes, double fill) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  const std::vector<int64_t> shape{proposals.size(0), pixels.size(1), pixels.size(2)};
  const Tensor values = boxes.has_value() ? at::full(shape, fill, options) : at::empty(shape, options);
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "embedding_masks", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    if (boxes.has_value()) {
      measure_windows(wide.map, windows_of(*boxes, pixels.size(1), pixels.size(2), false),
                      values.data_ptr<scalar_t>());
    } else {
      measure_all(wide.map, values.data_ptr<scalar_t>());
    }
  });
  return values.to(pixels.scalar_type());
}

Tensor embedding_masks_in_boxes_cpu(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                                    const Tensor& boxes, int64_t size) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  const auto windows = windows_of(boxes, pixels.size(1), pixels.size(2), true);
  TORCH_CHECK(size == cells_of(windows), "size: ", size, " values, but the boxes have ", cells_of(windows), " cells");
  const Tensor values = at::empty({size}, pixels.options().dtype(embedding_dtype(pixels)));
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "embedding_masks_in_boxes", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    measure_windows(wide.map, windows, values.data_ptr<scalar_t>());
  });
  return values.to(pixels.scalar_type());
}

EmbeddingGradients backward(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                            const Tensor& margins, const std::optional<Tensor>& boxes, bool in_boxes) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  check_embedding_masks_gradient(gradient, pixels, proposals, in_boxes);
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  std::vector<Window> windows;
  if (boxes.has_value()) {
    windows = windows_of(*boxes, pixels.size(1), pixels.size(2), in_boxes);
    TORCH_CHECK(!in_boxes || gradient.size(0) == cells_of(windows), "gradient: ", gradient.size(0),
                " values, but the boxes have ", cells_of(windows), " cells");
  }
  const Tensor of_pixels =
      boxes.has_value() ? at::zeros(pixels.sizes(), options) : at::empty(pixels.sizes(), options);
  const Tensor of_proposals = at::empty(proposals.sizes(), options);
  const Tensor of_margins = at::empty(proposals.sizes(), options);
  const Tensor wide_gradient = gradient.to(embedding_dtype(gradient)).contiguous();
  AT_DISPATCH_FLOATING_TYPES(of_pixels.scalar_type(), "embedding_masks_backward", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    const Gradients<scalar_t> gradients{of_pixels.data_ptr<scalar_t>(), of_proposals.data_ptr<scalar_t>(),
                                        of_margins.data_ptr<scalar_t>()};
    const scalar_t* outer = wide_gradient.const_data_ptr<scalar_t>();
    if (boxes.has_value()) {
      differentiate_windows(wide.map, windows, outer, gradients);
    } else {
      differentiate_all(wide.map, outer, gradients);
    }
  });
  const Tensor all_margins = margins.dim() == 2 ? of_margins : of_margins.sum(1);
  const auto dtype = pixels.scalar_type();
  return {of_pixels.to(dtype), of_proposals.to(dtype), all_margins.to(dtype)};
}

EmbeddingGradients embedding_masks_backward_cpu(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                                                const Tensor& margins, const std::optional<Tensor>& boxes) {
  return backward(gradient, pixels, proposals, margins, boxes, false);
}

EmbeddingGradients embedding_masks_in_boxes_backward_cpu(const Tensor& gradient, const Tensor& pixels,
                                                         const Tensor& proposals, const Tensor& margins,
                                                         const Tensor& boxes) {
  return backward(gradient, pixels, proposals, margins, boxes, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) {
  library.impl("embedding_masks", embedding_masks_cpu);
  library.impl("embedding_masks_backward", embedding_masks_backward_cpu);
  library.impl("embedding_masks_in_boxes", embedding_masks_in_boxes_cpu);
  library.impl("embedding_masks_in_boxes_backward", embedding_masks_in_boxes_backward_cpu);
}

}  // namespace convmask
