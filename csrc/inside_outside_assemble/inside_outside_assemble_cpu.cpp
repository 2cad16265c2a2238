// CPU kernels of inside/outside assembly. The maps of one grid cell are small enough for a processor's cache (1.5 MB of
// 76 MB in the case of COCO), so the outermost loop is over grid cells and the next over RoIs; the innermost is over
// classes, in vectors. Where the classes of a cell are no neighbours in memory, the grid cell is transposed first.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../ps_roi_pool/rois_cpu.h"
#include "inside_outside_assemble.h"

// The inner loops are compiled for several processors, of which the loader takes the best.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define CONVMASK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CONVMASK_CLONES
#endif
#if defined(__GNUC__)
#define CONVMASK_INLINE inline __attribute__((always_inline))
#else
#define CONVMASK_INLINE inline
#endif

namespace convmask {
namespace {

// `lanes` neighbouring classes that are computed with at once.
#if defined(__GNUC__)
template <typename scalar_t, int lanes>
struct Vector {
  typedef scalar_t Lanes __attribute__((vector_size(lanes * sizeof(scalar_t))));
  Lanes values;

  static CONVMASK_INLINE Vector load(const scalar_t* from) {
    Vector vector;
    std::memcpy(&vector.values, from, sizeof(Lanes));
    return vector;
  }
  CONVMASK_INLINE void store(scalar_t* to) const { std::memcpy(to, &values, sizeof(Lanes)); }
  CONVMASK_INLINE void add(const Vector& other) { values += other.values; }
  CONVMASK_INLINE void add_product(const Vector& other, scalar_t factor) { values += other.values * factor; }
  CONVMASK_INLINE Vector times(scalar_t factor) const { return {values * factor}; }
  static CONVMASK_INLINE Vector larger(const Vector& a, const Vector& b) {
    return {a.values >= b.values ? a.values : b.values};
  }
  // x where a >= b, else 0.
  static CONVMASK_INLINE Vector where_not_less(const Vector& a, const Vector& b, const Vector& x) {
    return {a.values >= b.values ? x.values : Lanes{}};
  }
  CONVMASK_INLINE Vector minus(const Vector& other) const { return {values - other.values}; }
};
template <typename scalar_t>
struct Vector<scalar_t, 1> {
#else
template <typename scalar_t, int lanes>
struct Vector {
  static_assert(lanes == 1, "without vector extensions the classes are computed one by one");
#endif
  scalar_t value;

  static CONVMASK_INLINE Vector load(const scalar_t* from) { return {*from}; }
  CONVMASK_INLINE void store(scalar_t* to) const { *to = value; }
  CONVMASK_INLINE void add(const Vector& other) { value += other.value; }
  CONVMASK_INLINE void add_product(const Vector& other, scalar_t factor) { value += other.value * factor; }
  CONVMASK_INLINE Vector times(scalar_t factor) const { return {value * factor}; }
  static CONVMASK_INLINE Vector larger(const Vector& a, const Vector& b) {
    return {a.value >= b.value ? a.value : b.value};
  }
  static CONVMASK_INLINE Vector where_not_less(const Vector& a, const Vector& b, const Vector& x) {
    return {a.value >= b.value ? x.value : scalar_t{0}};
  }
  CONVMASK_INLINE Vector minus(const Vector& other) const { return {value - other.value}; }
};

// The two maps of one grid cell and image, the classes of a cell being neighbours.
template <typename scalar_t>
struct Plane {
  scalar_t* data;
  int64_t row, column, side;  // strides
};

// Bins with the same cells, of which there are several where a RoI is small, are computed once.
struct Run {
  Cells cells;
  int64_t bins;
};

struct Runs {
  std::vector<Run> rows, columns;

  static void collect(const Cells* cells, int64_t begin, int64_t end, std::vector<Run>& runs) {
    runs.clear();
    for (int64_t bin = begin; bin < end; ++bin) {
      const Cells now = cells[bin];
      if (now.count() == 0) {
        continue;
      }
      if (!runs.empty() && runs.back().cells.begin == now.begin && runs.back().cells.end == now.end) {
        ++runs.back().bins;
      } else {
        runs.push_back({now, 1});
      }
    }
  }
};

template <typename scalar_t, int lanes, int count>
CONVMASK_INLINE void sum_cells(const Plane<const scalar_t>& plane, const Cells& rows, const Cells& columns,
                               int64_t first, Vector<scalar_t, lanes>* outside, Vector<scalar_t, lanes>* inside) {
  using V = Vector<scalar_t, lanes>;
  const scalar_t* cell = plane.data + rows.begin * plane.row + columns.begin * plane.column + first;
  for (int v = 0; v < count; ++v) {
    outside[v] = V::load(cell + v * lanes);
    inside[v] = V::load(cell + plane.side + v * lanes);
  }
  int64_t x = columns.begin + 1;
  for (int64_t y = rows.begin; y < rows.end; ++y, x = columns.begin) {
    for (; x < columns.end; ++x) {
      cell = plane.data + y * plane.row + x * plane.column + first;
      for (int v = 0; v < count; ++v) {
        outside[v].add(V::load(cell + v * lanes));
        inside[v].add(V::load(cell + plane.side + v * lanes));
      }
    }
  }
}

// Adds to scores[first, first + lanes * count) the larger mean of each bin of one grid cell.
template <typename scalar_t, int lanes, int count>
CONVMASK_INLINE void add_scores(const Plane<const scalar_t>& plane, const Runs& runs, int64_t first, scalar_t* scores) {
  using V = Vector<scalar_t, lanes>;
  V sums[count] = {};
  for (const Run& rows : runs.rows) {
    for (const Run& columns : runs.columns) {
      V outside[count], inside[count];
      sum_cells<scalar_t, lanes, count>(plane, rows.cells, columns.cells, first, outside, inside);
      const auto weight = static_cast<scalar_t>(rows.bins * columns.bins) /
                          static_cast<scalar_t>(rows.cells.count() * columns.cells.count());
      for (int v = 0; v < count; ++v) {
        sums[v].add_product(V::larger(outside[v], inside[v]), weight);
      }
    }
  }
  for (int v = 0; v < count; ++v) {
    sums[v].store(scores + first + v * lanes);
  }
}

// Adds the gradient of the classes [first, first + lanes * count) of one RoI and grid cell.
template <typename scalar_t, int lanes, int count>
CONVMASK_INLINE void add_gradients(const Plane<const scalar_t>& plane, const Runs& runs, int64_t first,
                                   const scalar_t* of_scores, const Plane<scalar_t>& gradient) {
  using V = Vector<scalar_t, lanes>;
  for (const Run& rows : runs.rows) {
    for (const Run& columns : runs.columns) {
      V outside[count], inside[count];
      sum_cells<scalar_t, lanes, count>(plane, rows.cells, columns.cells, first, outside, inside);
      const auto weight = static_cast<scalar_t>(rows.bins * columns.bins) /
                          static_cast<scalar_t>(rows.cells.count() * columns.cells.count());
      for (int v = 0; v < count; ++v) {
        const V share = V::load(of_scores + first + v * lanes).times(weight);
        outside[v] = V::where_not_less(outside[v], inside[v], share);
        inside[v] = share.minus(outside[v]);
      }
      for (int64_t y = rows.cells.begin; y < rows.cells.end; ++y) {
        for (int64_t x = columns.cells.begin; x < columns.cells.end; ++x) {
          scalar_t* cell = gradient.data + y * gradient.row + x * gradient.column + first;
          for (int v = 0; v < count; ++v) {
            V sum = V::load(cell + v * lanes);
            sum.add(outside[v]);
            sum.store(cell + v * lanes);
            sum = V::load(cell + gradient.side + v * lanes);
            sum.add(inside[v]);
            sum.store(cell + gradient.side + v * lanes);
          }
        }
      }
    }
  }
}

// Calls visit.run<lanes, count>(first) for parts of the classes that together hold each class at least once; with
// `once` exactly once.
template <bool once, typename Visit>
CONVMASK_INLINE void visit_classes(int64_t classes, const Visit& visit) {
  int64_t first = 0;
#if defined(__GNUC__)
  constexpr int kWide = 16, kNarrow = 4;
  for (; first + 3 * kWide <= classes; first += 3 * kWide) {
    visit.template run<kWide, 3>(first);
  }
  for (; first + kWide <= classes; first += kWide) {
    visit.template run<kWide, 1>(first);
  }
  if (!once && first < classes && classes >= kWide) {  // the last ones once more, with some before them
    visit.template run<kWide, 1>(classes - kWide);
    return;
  }
  for (; first + kNarrow <= classes; first += kNarrow) {
    visit.template run<kNarrow, 1>(first);
  }
#endif
  for (; first < classes; ++first) {
    visit.template run<1, 1>(first);
  }
}

template <typename scalar_t>
struct ScoreVisit {
  const Plane<const scalar_t>& plane;
  const Runs& runs;
  scalar_t* scores;

  template <int lanes, int count>
  CONVMASK_INLINE void run(int64_t first) const {
    add_scores<scalar_t, lanes, count>(plane, runs, first, scores);
  }
};

template <typename scalar_t>
struct GradientVisit {
  const Plane<const scalar_t>& plane;
  const Runs& runs;
  const scalar_t* of_scores;
  const Plane<scalar_t>& gradient;

  template <int lanes, int count>
  CONVMASK_INLINE void run(int64_t first) const {
    add_gradients<scalar_t, lanes, count>(plane, runs, first, of_scores, gradient);
  }
};

CONVMASK_CLONES void score_classes(const Plane<const float>& plane, const Runs& runs, int64_t classes, float* scores) {
  visit_classes<false>(classes, ScoreVisit<float>{plane, runs, scores});
}
CONVMASK_CLONES void score_classes(const Plane<const double>& plane, const Runs& runs, int64_t classes,
                                   double* scores) {
  visit_classes<false>(classes, ScoreVisit<double>{plane, runs, scores});
}
CONVMASK_CLONES void spread_classes(const Plane<const float>& plane, const Runs& runs, int64_t classes,
                                    const float* of_scores, const Plane<float>& gradient) {
  visit_classes<true>(classes, GradientVisit<float>{plane, runs, of_scores, gradient});
}
CONVMASK_CLONES void spread_classes(const Plane<const double>& plane, const Runs& runs, int64_t classes,
                                    const double* of_scores, const Plane<double>& gradient) {
  visit_classes<true>(classes, GradientVisit<double>{plane, runs, of_scores, gradient});
}

// The maps by image and grid cell, whatever their strides.
template <typename scalar_t>
class Maps {
 public:
  explicit Maps(const Tensor& maps) : data_(maps.const_data_ptr<scalar_t>()), sizes_(maps.sizes()) {
    std::copy(maps.strides().begin(), maps.strides().end(), strides_);
  }

  int64_t group() const { return sizes_[1]; }
  int64_t classes() const { return sizes_[4]; }
  int64_t height() const { return sizes_[5]; }
  int64_t width() const { return sizes_[6]; }

  // The first value of a map: its rows and columns have the strides of `row` and `column`.
  const scalar_t* map(int64_t image, int64_t g, int64_t h, int64_t side, int64_t category) const {
    return data_ + image * strides_[0] + g * strides_[1] + h * strides_[2] + side * strides_[3] +
           category * strides_[4];
  }
  int64_t row() const { return strides_[5]; }
  int64_t column() const { return strides_[6]; }

  // The plane of a grid cell; `buffer` is used if its classes are no neighbours.
  Plane<const scalar_t> plane(int64_t image, int64_t g, int64_t h, std::unique_ptr<scalar_t[]>& buffer) const {
    if (strides_[4] == 1 || classes() == 1) {
      return {map(image, g, h, 0, 0), row(), column(), strides_[3]};
    }
    const int64_t cell = 2 * classes();
    if (!buffer) {
      buffer.reset(new scalar_t[height() * width() * cell]);
    }
    transpose(image, g, h, buffer.get());
    return {buffer.get(), width() * cell, cell, classes()};
  }

 private:
  // In tiles: neither the reads along a row nor the writes along the classes leave the cache between them.
  void transpose(int64_t image, int64_t g, int64_t h, scalar_t* to) const {
    constexpr int64_t kTile = 16;
    const int64_t cell = 2 * classes();
    for (int64_t y = 0; y < height(); ++y) {
      for (int64_t left = 0; left < width(); left += kTile) {
        const int64_t right = std::min(left + kTile, width());
        for (int64_t channel = 0; channel < cell; ++channel) {
          const scalar_t* from = map(image, g, h, channel / classes(), channel % classes()) + y * row();
          scalar_t* target = to + (y * width()) * cell + channel;
          for (int64_t x = left; x < right; ++x) {
            target[x * cell] = from[x * column()];
          }
        }
      }
    }
  }

  const scalar_t* data_;
  at::IntArrayRef sizes_;
  int64_t strides_[7];
};

// RoIs by image, and what a thread does at a time: some RoIs in one grid cell.
struct Task {
  int64_t image, g, h;
  const int64_t* rois;
  int64_t count;
};

class Tasks {
 public:
  Tasks(const RoiTable& table, int64_t images, int64_t group, int64_t most_rois) : rois_(images) {
    for (int64_t r = 0; r < table.size(); ++r) {
      rois_[table[r].image].push_back(r);
    }
    for (int64_t image = 0; image < images; ++image) {
      const auto count = static_cast<int64_t>(rois_[image].size());
      for (int64_t cell = 0; cell < group * group && count > 0; ++cell) {
        for (int64_t start = 0; start < count; start += most_rois) {
          tasks_.push_back(
              {image, cell / group, cell % group, rois_[image].data() + start, std::min(most_rois, count - start)});
        }
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
  const Task& operator[](int64_t task) const { return tasks_[task]; }

 private:
  std::vector<std::vector<int64_t>> rois_;
  std::vector<Task> tasks_;
};

// Calls work(task, plane, runs) for every task and runs(roi) in it; each plane is made once in a thread.
template <typename scalar_t, typename Work>
void for_each_task(const Maps<scalar_t>& maps, const Tasks& tasks, const Work& work) {
  at::parallel_for(0, tasks.size(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<scalar_t[]> buffer;
    Plane<const scalar_t> plane{};
    Runs runs;
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = tasks[t];
      const Task* before = t > begin ? &tasks[t - 1] : nullptr;
      if (!before || before->image != task.image || before->g != task.g || before->h != task.h) {
        plane = maps.plane(task.image, task.g, task.h, buffer);
      }
      work(task, plane, runs);
    }
  });
}

void collect_runs(const RoiBins& roi, int64_t g, int64_t h, int64_t group, int64_t size, Runs& runs) {
  Runs::collect(roi.rows, first_bin(g, group, size), first_bin(g + 1, group, size), runs.rows);
  Runs::collect(roi.columns, first_bin(h, group, size), first_bin(h + 1, group, size), runs.columns);
}

template <typename scalar_t>
void assemble_scores(const Maps<scalar_t>& maps, const RoiTable& table, const Tasks& tasks, int64_t size,
                     scalar_t* scores) {
  const int64_t group = maps.group(), classes = maps.classes(), row = table.size() * classes;
  // Each grid cell has scores of its own, which are added up in one order.
  std::unique_ptr<scalar_t[]> parts(new scalar_t[group * group * row]());
  for_each_task(maps, tasks, [&](const Task& task, const Plane<const scalar_t>& plane, Runs& runs) {
    scalar_t* part = parts.get() + (task.g * group + task.h) * row;
    for (int64_t i = 0; i < task.count; ++i) {
      collect_runs(table[task.rois[i]], task.g, task.h, group, size, runs);
      score_classes(plane, runs, classes, part + task.rois[i] * classes);
    }
  });
  at::parallel_for(0, row, /*grain_size=*/4096, [&](int64_t begin, int64_t end) {
    std::fill(scores + begin, scores + end, scalar_t{0});
    for (int64_t cell = 0; cell < group * group; ++cell) {
      for (int64_t i = begin; i < end; ++i) {
        scores[i] += parts[cell * row + i];
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      scores[i] /= static_cast<scalar_t>(size * size);
    }
  });
}

// The values of one class in each bin.
template <typename scalar_t>
void assemble_masks(const Maps<scalar_t>& maps, const RoiTable& table, const int64_t* classes, int64_t size,
                    scalar_t* masks) {
  const int64_t group = maps.group();
  at::parallel_for(0, table.size() * 2, /*grain_size=*/8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const RoiBins roi = table[task / 2];
      const int64_t category = classes[task / 2];
      scalar_t* out = masks + task * size * size;
      if (category < 0 || category >= maps.classes()) {
        std::fill_n(out, size * size, scalar_t{0});
        continue;
      }
      for (int64_t p = 0; p < size; ++p) {
        for (int64_t q = 0; q < size; ++q) {
          const scalar_t* map = maps.map(roi.image, p * group / size, q * group / size, task % 2, category);
          const Cells rows = roi.rows[p], columns = roi.columns[q];
          scalar_t sum = 0;
          for (int64_t y = rows.begin; y < rows.end; ++y) {
            for (int64_t x = columns.begin; x < columns.end; ++x) {
              sum += map[y * maps.row() + x * maps.column()];
            }
          }
          const int64_t area = static_cast<int64_t>(rows.count()) * columns.count();
          *out++ = area > 0 ? sum / static_cast<scalar_t>(area) : scalar_t{0};
        }
      }
    }
  });
}

template <typename scalar_t>
void best_classes(const scalar_t* scores, int64_t rois, int64_t classes, int64_t first_class, int64_t* best) {
  for (int64_t r = 0; r < rois; ++r) {
    const scalar_t* row = scores + r * classes;
    best[r] = std::max_element(row + first_class, row + classes) - row;
  }
}

AssembleResult inside_outside_assemble_cpu(const Tensor& maps, const Tensor& rois, const std::optional<Tensor>& labels,
                                           int64_t output_size, double spatial_scale, bool rounded,
                                           int64_t first_class) {
  check_inside_outside_assemble(maps, rois, labels, output_size, first_class);
  const Tensor wide = maps.to(sum_dtype(maps));
  const RoiTable table(rois, maps.size(0), maps.size(5), maps.size(6), output_size, spatial_scale, rounded);
  const Tasks tasks(table, maps.size(0), maps.size(1), /*most_rois=*/512);
  const Tensor scores = at::empty({rois.size(0), maps.size(4)}, wide.options());
  const Tensor masks = at::empty({rois.size(0), 2, output_size, output_size}, wide.options());
  const Tensor classes =
      labels ? labels->clone(at::MemoryFormat::Contiguous) : at::empty({rois.size(0)}, rois.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "inside_outside_assemble", [&] {
    const Maps<scalar_t> by_cell(wide);
    assemble_scores(by_cell, table, tasks, output_size, scores.data_ptr<scalar_t>());
    if (!labels) {
      best_classes(scores.const_data_ptr<scalar_t>(), rois.size(0), maps.size(4), first_class,
                   classes.data_ptr<int64_t>());
    }
    assemble_masks(by_cell, table, classes.const_data_ptr<int64_t>(), output_size, masks.data_ptr<scalar_t>());
  });
  return {scores.to(maps.scalar_type()), masks.to(maps.scalar_type()), classes};
}

// Adds the gradient of the mask of one RoI in one grid cell.
template <typename scalar_t>
void spread_mask(const scalar_t* of_mask, const RoiBins& roi, const Task& task, int64_t group, int64_t size,
                 int64_t category, const Plane<scalar_t>& gradient) {
  for (int64_t p = first_bin(task.g, group, size); p < first_bin(task.g + 1, group, size); ++p) {
    for (int64_t q = first_bin(task.h, group, size); q < first_bin(task.h + 1, group, size); ++q) {
      const Cells rows = roi.rows[p], columns = roi.columns[q];
      const auto area = static_cast<scalar_t>(static_cast<int64_t>(rows.count()) * columns.count());
      for (int64_t side = 0; side < 2; ++side) {
        const scalar_t value = of_mask[(side * size + p) * size + q];
        if (value == 0) {  // as it is for all RoIs of the background in training
          continue;
        }
        for (int64_t y = rows.begin; y < rows.end; ++y) {
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            gradient.data[y * gradient.row + x * gradient.column + side * gradient.side + category] += value / area;
          }
        }
      }
    }
  }
}

template <typename scalar_t>
void spread_gradients(const Maps<scalar_t>& maps, const RoiTable& table, const Tasks& tasks, int64_t size,
                      const scalar_t* of_scores, const scalar_t* of_masks, const int64_t* classes,
                      const Tensor& result) {
  const int64_t group = maps.group(), count = maps.classes();
  const auto strides = result.strides();
  auto* data = result.data_ptr<scalar_t>();
  for_each_task(maps, tasks, [&](const Task& task, const Plane<const scalar_t>& plane, Runs& runs) {
    const Plane<scalar_t> gradient{data + task.image * strides[0] + task.g * strides[1] + task.h * strides[2],
                                   strides[5], strides[6], strides[3]};
    std::vector<scalar_t> shares(count);
    for (int64_t i = 0; i < task.count; ++i) {
      const int64_t r = task.rois[i];
      collect_runs(table[r], task.g, task.h, group, size, runs);
      bool any = false;
      for (int64_t c = 0; c < count; ++c) {
        shares[c] = of_scores[r * count + c] / static_cast<scalar_t>(size * size);
        any |= shares[c] != 0;
      }
      if (any) {  // hard example mining leaves most RoIs without a gradient
        spread_classes(plane, runs, count, shares.data(), gradient);
      }
      if (classes[r] >= 0 && classes[r] < count) {
        spread_mask(of_masks + r * 2 * size * size, table[r], task, group, size, classes[r], gradient);
      }
    }
  });
}

Tensor inside_outside_assemble_backward_cpu(const Tensor& score_gradient, const Tensor& mask_gradient,
                                            const Tensor& maps, const Tensor& rois, const Tensor& classes,
                                            int64_t output_size, double spatial_scale, bool rounded) {
  check_inside_outside_assemble_backward(score_gradient, mask_gradient, maps, rois, classes, output_size);
  const auto dtype = sum_dtype(maps);
  const Tensor wide = maps.to(dtype);
  const RoiTable table(rois, maps.size(0), maps.size(5), maps.size(6), output_size, spatial_scale, rounded);
  const Tasks tasks(table, maps.size(0), maps.size(1), /*most_rois=*/std::max<int64_t>(rois.size(0), 1));
  const Tensor of_scores = score_gradient.to(dtype).contiguous(), of_masks = mask_gradient.to(dtype).contiguous();
  const Tensor dense_classes = classes.contiguous();
  const Tensor result = zero_gradient(maps, dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "inside_outside_assemble_backward", [&] {
    spread_gradients(Maps<scalar_t>(wide), table, tasks, output_size, of_scores.const_data_ptr<scalar_t>(),
                     of_masks.const_data_ptr<scalar_t>(), dense_classes.const_data_ptr<int64_t>(), result);
  });
  return result.to(maps.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) {
  library.impl("inside_outside_assemble", inside_outside_assemble_cpu);
  library.impl("inside_outside_assemble_backward", inside_outside_assemble_backward_cpu);
}

}  // namespace convmask
