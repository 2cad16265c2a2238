// CPU kernels of embedding-distance masks. The map is cut into tiles of kTile pixels. A tile is copied together, so
// that all of its dimensions stay in the first cache while every proposal whose box reaches it visits it; the pixels
// are computed with side by side, kLanes at a time. Forward, threads share the tiles; backward, the dimensions: each
// dimension of all gradients belongs to one thread.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
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
constexpr int64_t kVectors = 8;  // of kLanes pixels: a tile
constexpr int64_t kTile = kVectors * kLanes;
constexpr int64_t kVisitors = 32;  // proposals whose gradients fit into the first cache with a tile

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
#define CONVMASK_LANES_OPERATOR(symbol, right, right_value)                            \
  template <typename scalar_t>                                                         \
  inline Lanes<scalar_t> operator symbol(Lanes<scalar_t> a, right b) {                 \
    for (int64_t i = 0; i < kLanes; ++i) a.values[i] = a.values[i] symbol right_value; \
    return a;                                                                          \
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

// A part of the map that is visited by every proposal before the next one is: kVectors vectors, side by side in one row
// of a map without boxes, below each other otherwise.
struct Tile {
  int64_t x, y;     // of the first vector
  int64_t across;   // vectors in a row
  int64_t rows;     // that the map has here
  int64_t columns;  // that the map has here

  CONVMASK_INLINE int64_t row_of(int64_t vector) const { return vector / across; }
  CONVMASK_INLINE int64_t column_of(int64_t vector) const { return vector % across * kLanes; }
  // How many lanes of a vector are on the map.
  CONVMASK_INLINE int64_t lanes(int64_t vector) const {
    return row_of(vector) < rows ? std::clamp<int64_t>(columns - column_of(vector), 0, kLanes) : 0;
  }
};

// The tiles of a map. Without boxes it is one long row.
struct Tiles {
  int64_t height, width;  // of the map, or 1 and its size
  int64_t across, down;   // vectors of a tile
  int64_t per_row, count;

  Tiles(int64_t height_, int64_t width_, bool boxes)
      : height(boxes ? height_ : 1),
        width(boxes ? width_ : height_ * width_),
        across(boxes ? 1 : kVectors),
        down(boxes ? kVectors : 1),
        per_row((width + across * kLanes - 1) / (across * kLanes)),
        count((height + down - 1) / down * per_row) {}

  Tile operator[](int64_t index) const {
    const int64_t x = index % per_row * across * kLanes, y = index / per_row * down;
    return {x, y, across, std::min(down, height - y), std::min(across * kLanes, width - x)};
  }
};

template <typename scalar_t>
CONVMASK_INLINE void copy_lanes(scalar_t* target, const scalar_t* source, int64_t lanes) {
  if (lanes == kLanes) {
    std::memcpy(target, source, kLanes * sizeof(scalar_t));
  } else {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      target[lane] = source[lane];
    }
  }
}

// Copies a tile of one plane, (height, width), to kTile numbers. What is not on the map stays as it is.
template <typename scalar_t>
CONVMASK_INLINE void copy_tile(scalar_t* block, const scalar_t* plane, int64_t width, const Tile& tile) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t source = (tile.y + tile.row_of(v)) * width + tile.x + tile.column_of(v);
    copy_lanes(block + v * kLanes, plane + source, tile.lanes(v));
  }
}

// Asks for a tile of one plane, whose rows lie too far apart for the processor to see what comes next.
template <typename scalar_t>
CONVMASK_INLINE void prefetch_tile(const scalar_t* plane, int64_t width, const Tile& tile) {
#if defined(__GNUC__)
  for (int64_t row = 0; row < tile.rows; ++row) {
    const scalar_t* source = plane + (tile.y + row) * width + tile.x;
    for (int64_t x = 0; x < tile.columns; x += kLanes) {
      __builtin_prefetch(source + x);
    }
    __builtin_prefetch(source + tile.columns - 1);
  }
#endif
}

// The part of a box in a tile: vectors [first, last), and in each of them the lanes [begin(v), end(v)).
struct Overlap {
  int64_t first, last, left, right;
  const Tile* tile;

  CONVMASK_INLINE int64_t begin(int64_t vector) const {
    return std::clamp<int64_t>(left - tile->column_of(vector), 0, kLanes);
  }
  CONVMASK_INLINE int64_t end(int64_t vector) const {
    return std::clamp<int64_t>(right - tile->column_of(vector), 0, kLanes);
  }
};

CONVMASK_INLINE Overlap overlap(const Tile& tile, const Window& window) {
  const int64_t top = std::max<int64_t>(window.y - tile.y, 0);
  const int64_t bottom = std::min(window.y + window.height - tile.y, tile.rows);
  const int64_t left = std::max<int64_t>(window.x - tile.x, 0);
  const int64_t right = std::min(window.x + window.width - tile.x, tile.columns);
  if (top >= bottom || left >= right) {
    return {0, 0, 0, 0, &tile};
  }
  if (tile.across > 1) {  // one row
    return {left / kLanes, (right + kLanes - 1) / kLanes, left, right, &tile};
  }
  return {top, bottom, left, right, &tile};
}

// Where the value of lane 0 of a vector lies: perhaps before the values, where that lane is not in the box.
CONVMASK_INLINE int64_t value_of(const Tile& tile, const Window& window, int64_t vector) {
  return window.offset + (tile.y + tile.row_of(vector) - window.y) * window.stride + tile.x + tile.column_of(vector) -
         window.x;
}

// `number` vectors of a block, (dims, kVectors, kLanes), against one proposal: minus their distances.
template <typename scalar_t, bool per_dimension, int64_t number>
CONVMASK_INLINE void measure(const scalar_t* block, int64_t dims, const scalar_t* proposal, const scalar_t* margin,
                             Lanes<scalar_t>* values) {
  Lanes<scalar_t> sums[number] = {};
  for (int64_t d = 0; d < dims; ++d) {
    const scalar_t center = proposal[d];
    CONVMASK_UNROLL
    for (int64_t v = 0; v < number; ++v) {
      const auto difference = load(block + d * kTile + v * kLanes) - center;
      if constexpr (per_dimension) {
        sums[v] = sums[v] + difference * difference * margin[d];
      } else {
        sums[v] = sums[v] + difference * difference;
      }
    }
  }
  const scalar_t factor = per_dimension ? scalar_t{-1} : -margin[0];
  CONVMASK_UNROLL
  for (int64_t v = 0; v < number; ++v) {
    values[v] = sums[v] * factor;
  }
}

template <typename scalar_t, bool per_dimension>
CONVMASK_INLINE void measure_some(const scalar_t* block, int64_t dims, const scalar_t* proposal, const scalar_t* margin,
                                  int64_t first, int64_t last, Lanes<scalar_t>* values) {
  if (last - first > 4) {
    measure<scalar_t, per_dimension, kVectors>(block, dims, proposal, margin, values);
    return;
  }
  const int64_t start = std::min<int64_t>(first, kVectors - 4);
  measure<scalar_t, per_dimension, 4>(block + start * kLanes, dims, proposal, margin, values + start);
}

// The values of all boxes in a tile. `block` has room for (dims, kTile) and holds finite numbers.
template <typename scalar_t>
CONVMASK_INLINE void measure_tile(const Embeddings<scalar_t>& map, const Tiles& tiles, int64_t index,
                                  const Window* windows, scalar_t* block, scalar_t* values) {
  const Tile tile = tiles[index];
  bool copied = false;
  for (int64_t k = 0; k < map.count; ++k) {
    const Overlap part = overlap(tile, windows[k]);
    if (part.first == part.last) {
      continue;
    }
    for (int64_t d = 0; d < map.dims && !copied; ++d) {
      copy_tile(block + d * kTile, map.pixels + d * map.size(), tiles.width, tile);
      if (index + 1 < tiles.count) {
        prefetch_tile(map.pixels + d * map.size(), tiles.width, tiles[index + 1]);
      }
    }
    copied = true;
    Lanes<scalar_t> found[kVectors];
    const scalar_t* proposal = map.proposals + k * map.dims;
    if (map.per_dimension) {
      measure_some<scalar_t, true>(block, map.dims, proposal, map.margins + k * map.dims, part.first, part.last, found);
    } else {
      measure_some<scalar_t, false>(block, map.dims, proposal, map.margins + k, part.first, part.last, found);
    }
    for (int64_t v = part.first; v < part.last; ++v) {
      const int64_t begin = part.begin(v), end = part.end(v);
      scalar_t* target = values + value_of(tile, windows[k], v) + begin;
      if (end - begin == kLanes) {
        store(target, found[v]);
      } else {
        scalar_t lanes[kLanes];
        store(lanes, found[v]);
        copy_lanes(target, lanes + begin, end - begin);
      }
    }
  }
}

// Gradients: (dims, height * width) of the pixels, (count, dims) of the others.
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

// What a thread needs to differentiate the dimensions [first, last).
template <typename scalar_t>
struct Workspace {
  int64_t first, last;
  std::vector<scalar_t> outer;      // (kVisitors, kTile), gradients of the values
  std::vector<int64_t> visitors;    // proposals whose boxes are in the tile, kVisitors at most at a time
  std::vector<scalar_t> sums;       // (last - first, count, 2, kLanes), of the other gradients so far
  std::vector<scalar_t> of_pixels;  // (last - first, kTile)

  Workspace(int64_t first_, int64_t last_, int64_t count)
      : first(first_),
        last(last_),
        outer(kVisitors * kTile),
        sums((last - first) * count * 2 * kLanes),
        of_pixels((last - first) * kTile) {
    visitors.reserve(kVisitors);
  }
};

// The visitors of a tile in one dimension.
template <typename scalar_t>
CONVMASK_INLINE void differentiate_visitors(const Embeddings<scalar_t>& map, const scalar_t* block, int64_t d,
                                            Workspace<scalar_t>& work) {
  Lanes<scalar_t> values[kVectors], of_pixels[kVectors];
  scalar_t* total = work.of_pixels.data() + (d - work.first) * kTile;
  CONVMASK_UNROLL
  for (int64_t v = 0; v < kVectors; ++v) {
    values[v] = load(block + v * kLanes);
    of_pixels[v] = load(total + v * kLanes);
  }
  scalar_t* sums = work.sums.data() + (d - work.first) * map.count * 2 * kLanes;
  const scalar_t* outer = work.outer.data();
  const int64_t* visitors = work.visitors.data();
  const auto number = static_cast<int64_t>(work.visitors.size());
  for (int64_t i = 0; i < number; ++i, outer += kTile) {
    const int64_t k = visitors[i];
    const scalar_t center = map.proposals[k * map.dims + d];
    const scalar_t factor = -twice_margin(map, k, d);
    scalar_t* sum = sums + k * 2 * kLanes;
    Lanes<scalar_t> of_proposal[2] = {}, of_margin[2] = {};
    CONVMASK_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto difference = values[v] - center;
      const auto weighted = load(outer + v * kLanes) * difference;
      of_pixels[v] = of_pixels[v] + weighted * factor;
      of_proposal[v % 2] = of_proposal[v % 2] + weighted;
      of_margin[v % 2] = of_margin[v % 2] + weighted * difference;
    }
    store(sum, load(sum) + (of_proposal[0] + of_proposal[1]));
    store(sum + kLanes, load(sum + kLanes) + (of_margin[0] + of_margin[1]));
  }
  CONVMASK_UNROLL
  for (int64_t v = 0; v < kVectors; ++v) {
    store(total + v * kLanes, of_pixels[v]);
  }
}

template <typename scalar_t>
CONVMASK_INLINE void differentiate_dimensions(const Embeddings<scalar_t>& map, int64_t width, const Tile& tile,
                                              Workspace<scalar_t>& work) {
  if (work.visitors.empty()) {
    return;
  }
  for (int64_t d = work.first; d < work.last; ++d) {
    scalar_t block[kTile] = {};
    copy_tile(block, map.pixels + d * map.size(), width, tile);
    differentiate_visitors(map, block, d, work);
  }
  work.visitors.clear();
}

// A tile: gradients of its pixels, and what it adds to the sums of the proposals whose boxes are in it.
template <typename scalar_t>
CONVMASK_INLINE void differentiate_tile(const Embeddings<scalar_t>& map, const Tiles& tiles, int64_t index,
                                        const Window* windows, const scalar_t* gradient, Workspace<scalar_t>& work,
                                        scalar_t* of_pixels) {
  const Tile tile = tiles[index];
  std::fill(work.of_pixels.begin(), work.of_pixels.end(), scalar_t{0});
  for (int64_t k = 0; k < map.count; ++k) {
    const Overlap part = overlap(tile, windows[k]);
    if (part.first == part.last) {
      continue;
    }
    scalar_t* outer = work.outer.data() + work.visitors.size() * kTile;
    if (part.first > 0 || part.last < kVectors || part.begin(0) > 0 || part.end(kVectors - 1) < kLanes) {
      std::fill(outer, outer + kTile, scalar_t{0});
    }
    for (int64_t v = part.first; v < part.last; ++v) {
      const int64_t begin = part.begin(v);
      const scalar_t* source = gradient + value_of(tile, windows[k], v) + begin;
      copy_lanes(outer + v * kLanes + begin, source, part.end(v) - begin);
#if defined(__GNUC__)
      __builtin_prefetch(source + tile.across * kLanes);  // of the next tile; may lie beyond the values
#endif
    }
    work.visitors.push_back(k);
    if (work.visitors.size() == kVisitors) {
      differentiate_dimensions(map, tiles.width, tile, work);
    }
  }
  differentiate_dimensions(map, tiles.width, tile, work);
  for (int64_t d = work.first; d < work.last; ++d) {
    const scalar_t* total = work.of_pixels.data() + (d - work.first) * kTile;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t target = (tile.y + tile.row_of(v)) * tiles.width + tile.x + tile.column_of(v);
      copy_lanes(of_pixels + d * map.size() + target, total + v * kLanes, tile.lanes(v));
    }
  }
}

#define CONVMASK_STAMP(scalar_t)                                                                                     \
  CONVMASK_CLONES void run_measure(const Embeddings<scalar_t>& map, const Tiles& tiles, int64_t begin, int64_t end,  \
                                   const Window* windows, scalar_t* block, scalar_t* values) {                       \
    for (int64_t tile = begin; tile < end; ++tile) {                                                                 \
      measure_tile(map, tiles, tile, windows, block, values);                                                        \
    }                                                                                                                \
  }                                                                                                                  \
  CONVMASK_CLONES void run_differentiate(const Embeddings<scalar_t>& map, const Tiles& tiles, const Window* windows, \
                                         const scalar_t* gradient, Workspace<scalar_t>& work, scalar_t* of_pixels) { \
    for (int64_t tile = 0; tile < tiles.count; ++tile) {                                                             \
      differentiate_tile(map, tiles, tile, windows, gradient, work, of_pixels);                                      \
    }                                                                                                                \
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
// Without boxes every window is the map as one long row.
std::vector<Window> windows_of(const std::optional<Tensor>& boxes, int64_t count, int64_t height, int64_t width,
                               bool in_boxes) {
  std::vector<Window> windows(count);
  const Tensor dense = boxes.has_value() ? boxes->contiguous() : Tensor();
  int64_t offset = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (!boxes.has_value()) {
      windows[k] = {0, 0, height * width, 1, k * height * width, height * width};
      continue;
    }
    const int64_t* box = dense.const_data_ptr<int64_t>() + 4 * k;
    const int64_t x = std::clamp<int64_t>(box[0], 0, width), y = std::clamp<int64_t>(box[1], 0, height);
    const int64_t columns = std::max<int64_t>(std::clamp<int64_t>(box[2], 0, width) - x, 0);
    const int64_t rows = std::max<int64_t>(std::clamp<int64_t>(box[3], 0, height) - y, 0);
    windows[k] = {x, y, columns, rows, offset, columns};
    if (in_boxes) {
      offset += rows * columns;
    } else {
      windows[k].offset = k * height * width + y * width + x;
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
void measure_all(const Embeddings<scalar_t>& map, const std::vector<Window>& windows, bool boxes, scalar_t* values) {
  const Tiles tiles(map.height, map.width, boxes);
  at::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> block(map.dims * kTile);
    run_measure(map, tiles, begin, end, windows.data(), block.data(), values);
  });
}

template <typename scalar_t>
void differentiate_all(const Embeddings<scalar_t>& map, const std::vector<Window>& windows, bool boxes,
                       const scalar_t* gradient, const Gradients<scalar_t>& gradients) {
  const Tiles tiles(map.height, map.width, boxes);
  at::parallel_for(0, map.dims, 1, [&](int64_t first, int64_t last) {
    Workspace<scalar_t> work(first, last, map.count);
    run_differentiate(map, tiles, windows.data(), gradient, work, gradients.pixels);
    for (int64_t d = first; d < last; ++d) {
      for (int64_t k = 0; k < map.count; ++k) {
        const scalar_t* sum = work.sums.data() + ((d - first) * map.count + k) * 2 * kLanes;
        gradients.proposals[k * map.dims + d] = twice_margin(map, k, d) * sum_of(load(sum));
        gradients.margins[k * map.dims + d] = -sum_of(load(sum + kLanes));
      }
    }
  });
}

Tensor embedding_masks_cpu(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                           const std::optional<Tensor>& boxes, double fill) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  const std::vector<int64_t> shape{proposals.size(0), pixels.size(1), pixels.size(2)};
  const Tensor values = boxes.has_value() ? at::full(shape, fill, options) : at::empty(shape, options);
  const auto windows = windows_of(boxes, proposals.size(0), pixels.size(1), pixels.size(2), false);
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "embedding_masks", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    measure_all(wide.map, windows, boxes.has_value(), values.data_ptr<scalar_t>());
  });
  return values.to(pixels.scalar_type());
}

Tensor embedding_masks_in_boxes_cpu(const Tensor& pixels, const Tensor& proposals, const Tensor& margins,
                                    const Tensor& boxes, int64_t size) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  const auto windows = windows_of(boxes, proposals.size(0), pixels.size(1), pixels.size(2), true);
  TORCH_CHECK(size == cells_of(windows), "size: ", size, " values, but the boxes have ", cells_of(windows), " cells");
  const Tensor values = at::empty({size}, pixels.options().dtype(embedding_dtype(pixels)));
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "embedding_masks_in_boxes", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    measure_all(wide.map, windows, true, values.data_ptr<scalar_t>());
  });
  return values.to(pixels.scalar_type());
}

EmbeddingGradients backward(const Tensor& gradient, const Tensor& pixels, const Tensor& proposals,
                            const Tensor& margins, const std::optional<Tensor>& boxes, bool in_boxes) {
  check_embedding_masks(pixels, proposals, margins, boxes);
  check_embedding_masks_gradient(gradient, pixels, proposals, in_boxes);
  const auto windows = windows_of(boxes, proposals.size(0), pixels.size(1), pixels.size(2), in_boxes);
  TORCH_CHECK(!in_boxes || gradient.size(0) == cells_of(windows), "gradient: ", gradient.size(0),
              " values, but the boxes have ", cells_of(windows), " cells");
  const auto options = pixels.options().dtype(embedding_dtype(pixels));
  const Tensor of_pixels = at::empty(pixels.sizes(), options);
  const Tensor of_proposals = at::empty(proposals.sizes(), options);
  const Tensor of_margins = at::empty(proposals.sizes(), options);
  const Tensor wide_gradient = gradient.to(embedding_dtype(gradient)).contiguous();
  AT_DISPATCH_FLOATING_TYPES(of_pixels.scalar_type(), "embedding_masks_backward", [&] {
    const WideEmbeddings<scalar_t> wide(pixels, proposals, margins);
    const Gradients<scalar_t> gradients{of_pixels.data_ptr<scalar_t>(), of_proposals.data_ptr<scalar_t>(),
                                        of_margins.data_ptr<scalar_t>()};
    differentiate_all(wide.map, windows, boxes.has_value(), wide_gradient.const_data_ptr<scalar_t>(), gradients);
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
