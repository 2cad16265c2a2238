// CPU kernel of mask voting. A binarised mask is kept as the runs of its rows, which are found from its S x S values
// without looking at every pixel; a canvas is never stored, only those of its pixels that a result needs.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "mask_voting.h"

// The loop over rows is compiled for several processors, of which the loader takes the best.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define CONVMASK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CONVMASK_CLONES
#endif

namespace convmask {
namespace {

struct Candidate {
  int64_t roi;
  double weight;
};

// A RoI and the class that it stands for.
struct Chosen {
  int64_t roi, category;
  double score;
};

// Columns [begin, end).
struct Run {
  int32_t begin, end;
};

// The set pixels of a binarised mask in the image, by rows from `top`.
struct RunMask {
  int32_t top = 0;
  // Of each row, from the first set pixel to behind the last; INT32_MAX and 0 if it is empty.
  std::vector<int32_t> begins, ends;
  // Of each row, and behind the last, the place in `runs`; only a row of several runs has any there.
  std::vector<int32_t> first;
  std::vector<Run> runs;

  int32_t bottom() const { return top + static_cast<int32_t>(begins.size()); }
};

// Whether two boxes have an IoU of at least, or above, a threshold. Most have no pixel in common, which is seen at
// once.
bool overlap_reaches(const double* a, const double* b, double threshold, bool above) {
  if (threshold > 0 && (a[0] >= b[2] || b[0] >= a[2] || a[1] >= b[3] || b[1] >= a[3])) {
    return false;
  }
  const double iou = overlap(a, b);
  return above ? iou > threshold : iou >= threshold;
}

// The results, by class and then by score. NMS decides about a RoI by those of its class with higher scores alone, so
// all classes go on together, the highest score first, until there are enough results. Scores are taken and sorted in
// bands, since few of the many are high.
std::vector<Chosen> choose(const double* scores, int64_t rois, int64_t classes, const std::vector<double>& boxes,
                           const VotingOptions& options) {
  const auto is_before = [](const Chosen& a, const Chosen& b) {
    return a.score != b.score ? a.score > b.score : a.category != b.category ? a.category < b.category : a.roi < b.roi;
  };
  std::vector<std::vector<Chosen>> kept(std::max<int64_t>(classes, 1));
  std::vector<Chosen> band;
  int64_t count = 0;
  double high = std::numeric_limits<double>::infinity();
  for (double low = 0.125; high > options.score_threshold && count < options.max_detections; low /= 8) {
    low = low > std::max(options.score_threshold, 1e-6) ? low : options.score_threshold;
    band.clear();
    for (int64_t r = 0; r < rois; ++r) {
      for (int64_t category = 1; category < classes; ++category) {
        const double score = scores[r * classes + category];
        if (score >= low && (score < high || std::isinf(high))) {
          band.push_back({r, category, score});
        }
      }
    }
    std::sort(band.begin(), band.end(), is_before);
    for (size_t i = 0; i < band.size() && count < options.max_detections; ++i) {
      const Chosen& next = band[i];
      const auto covers = [&](const Chosen& one) {
        return overlap_reaches(&boxes[4 * one.roi], &boxes[4 * next.roi], options.nms_threshold, /*above=*/true);
      };
      std::vector<Chosen>& mine = kept[next.category];
      if (std::none_of(mine.begin(), mine.end(), covers)) {
        mine.push_back(next);
        ++count;
      }
    }
    high = low;
  }
  std::vector<Chosen> all;
  for (const auto& some : kept) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

// The columns of a box that are in the image, [left, right): how far each is from the mask cell before it to the next,
// and the first column of each interval between two cells, counted from `left`.
struct Columns {
  Columns(const PixelBox& box, int32_t left, int32_t right, int32_t size)
      : left(left), shares(right - left), starts(size + 1, right - left) {
    const double step = static_cast<double>(size) / (static_cast<double>(box.right) - box.left);
    for (int32_t x = right - left - 1; x >= 0; --x) {
      const Sample sample = sample_at(static_cast<int64_t>(x) + left - box.left, step, 0, 0, size - 1);
      shares[x] = sample.share;
      starts[sample.before] = x;
    }
    for (int32_t cell = size - 1; cell >= 0; --cell) {
      starts[cell] = std::min(starts[cell], starts[cell + 1]);
    }
    per_cell = 1 / step;
    centre = 0.5 * per_cell - 0.5 - left + box.left;
  }

  int32_t left;
  double per_cell, centre;  // distance between two cells, place of the first, in columns
  std::vector<double> shares;
  std::vector<int32_t> starts;
};

// The first column from a cell to the next, with values `a` and `b`, that is on the other side of the threshold than
// `a` (`inside`: a reaches it); the next cell's if none is. It is where a straight line crosses, but what columns hold
// is decided by their values.
inline int32_t find_border(double a, double b, bool inside, int32_t cell, const Columns& columns, double threshold) {
  const int32_t begin = columns.starts[cell], end = columns.starts[cell + 1];
  const auto is_behind = [&](int32_t x) { return (mix(a, b, columns.shares[x]) >= threshold) != inside; };
  const double crossing = columns.centre + (cell + (threshold - a) / (b - a)) * columns.per_cell;
  int32_t x = begin;
  if (crossing > begin) {  // false for NaN
    x = crossing < end ? static_cast<int32_t>(std::ceil(crossing)) : end;
  }
  while (x < end && !is_behind(x)) {
    ++x;
  }
  while (x > begin && is_behind(x - 1)) {
    --x;
  }
  return x;
}

// The place of the lowest bit that is set.
inline int32_t lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int32_t place = 0;
  while ((bits >> place & 1) == 0) {
    ++place;
  }
  return place;
#endif
}

// Cells are bits of words: whether each of them reaches the threshold.
constexpr int32_t kBits = 64;

// A row between two of a mask.
struct MixedRow {
  const double *before, *after;
  double share;

  double at(int32_t cell) const { return mix(before[cell], after[cell], share); }
};

// Sets row `index` of `result`, from its cells that reach the threshold. Only between two of which one does is there a
// border.
inline void set_row(const MixedRow& row, const uint64_t* above, int32_t words, const Columns& columns,
                    const VotingOptions& options, int32_t index, RunMask& result) {
  const size_t first = result.runs.size();
  Run whole{INT32_MAX, 0};
  const auto close = [&](int32_t begin, int32_t end) {
    if (begin == end) {
      return;
    }
    const Run run{begin + columns.left, end + columns.left};
    if (whole.end > 0) {
      if (result.runs.size() == first) {
        result.runs.push_back(whole);
      }
      result.runs.push_back(run);
    }
    whole = {std::min(whole.begin, run.begin), run.end};
  };
  bool inside = above[0] & 1;
  int32_t begin = 0;
  for (int32_t word = 0; word < words; ++word) {
    // Bit i: whether cell i and the next one differ. The last cell has no next one.
    const uint64_t next = word + 1 < words ? above[word + 1] << (kBits - 1) : 0;
    uint64_t changes = above[word] ^ (above[word] >> 1 | next);
    if (word + 1 == words) {
      changes &= (uint64_t{1} << ((options.size - 1) % kBits)) - 1;
    }
    for (; changes != 0; changes &= changes - 1) {
      const int32_t cell = kBits * word + lowest_bit(changes);
      const int32_t border =
          find_border(row.at(cell), row.at(cell + 1), inside, cell, columns, options.binary_threshold);
      if (inside) {
        close(begin, border);
      }
      begin = border;
      inside = !inside;
    }
  }
  if (inside) {
    close(begin, static_cast<int32_t>(columns.shares.size()));
  }
  result.begins[index] = whole.begin;
  result.ends[index] = whole.end;
  result.first[index] = static_cast<int32_t>(first);
}

// A bit for each cell of a row that reaches the threshold.
void compare_cells(const double* row, int32_t size, double threshold, uint64_t* above) {
  for (int32_t first = 0; first < size; first += kBits) {
    uint64_t bits = 0;
    for (int32_t i = first; i < std::min(first + kBits, size); ++i) {
      bits |= static_cast<uint64_t>(row[i] >= threshold) << (i - first);
    }
    above[first / kBits] = bits;
  }
}

RunMask render(const double* mask, const double* box, const VotingOptions& options) {
  RunMask result;
  const PixelBox place = to_pixels(box, options.procedure != kChainercv);
  const int32_t top = std::max(place.top, 0), bottom = std::min(place.bottom, options.height);
  const int32_t left = std::max(place.left, 0), right = std::min(place.right, options.width);
  if (top >= bottom || left >= right) {
    return result;
  }
  const int32_t size = options.size, words = (size + kBits - 1) / kBits;
  const double threshold = options.binary_threshold;
  const Columns columns(place, left, right, size);
  std::vector<uint64_t> above(size * words), mixed(words);
  for (int32_t i = 0; i < size; ++i) {
    compare_cells(mask + i * size, size, threshold, &above[i * words]);
  }
  result.top = top;
  result.begins.resize(bottom - top);
  result.ends.resize(bottom - top);
  result.first.resize(bottom - top + 1);
  const double step = static_cast<double>(size) / (static_cast<double>(place.bottom) - place.top);
  for (int32_t y = top; y < bottom; ++y) {
    const Sample sample = sample_at(static_cast<int64_t>(y) - place.top, step, 0, 0, size - 1);
    const MixedRow row{mask + sample.before * size, mask + sample.after * size, sample.share};
    // A value between two that reach the threshold does too, and one between two that do not does not.
    for (int32_t word = 0; word < words; ++word) {
      const uint64_t a = above[sample.before * words + word], b = above[sample.after * words + word];
      mixed[word] = a & b;
      for (uint64_t open = a ^ b; open != 0; open &= open - 1) {
        const bool reaches = row.at(kBits * word + lowest_bit(open)) >= threshold;
        mixed[word] |= reaches ? open & ~(open - 1) : 0;
      }
    }
    set_row(row, mixed.data(), words, columns, options, y - top, result);
  }
  result.first.back() = static_cast<int32_t>(result.runs.size());
  return result;
}

// A candidate's mask and weight.
struct Member {
  const RunMask* mask;
  double weight;
};

// sums[i] += weight where begins[i] is before `first`, or ends[i] behind `last`.
CONVMASK_CLONES void add_reach(const int32_t* begins, const int32_t* ends, int32_t rows, int32_t first, int32_t last,
                               float weight, float* sums_before, float* sums_after) {
  for (int32_t i = 0; i < rows; ++i) {
    sums_before[i] += begins[i] < first ? weight : 0;
    sums_after[i] += ends[i] > last ? weight : 0;
  }
}

// The weighted sum of the candidates' binarised masks.
class Canvas {
 public:
  Canvas(const std::vector<Candidate>& candidates, const std::vector<RunMask>& masks, int32_t width)
      : width_(width), steps_(width + 1) {
    for (const Candidate& candidate : candidates) {
      const RunMask& mask = masks[candidate.roi];
      if (mask.begins.empty()) {
        continue;
      }
      members_.push_back({&mask, candidate.weight});
      top = std::min(top, mask.top);
      bottom = std::max(bottom, mask.bottom());
    }
    top = std::min(top, bottom);
  }

  // Values of row y at columns in ascending order. `ranks` has, for each column of the image and the one behind the
  // last, how many of them are before it.
  void sample(int32_t y, const std::vector<int32_t>& ranks, std::vector<double>& values) {
    for_runs(y, [&](const Run& run, double weight) {
      steps_[ranks[run.begin]] += weight;
      steps_[ranks[run.end]] -= weight;
    });
    double sum = 0;
    for (int32_t i = 0; i < ranks.back(); ++i) {
      sum += steps_[i];
      values[i] = sum;
      steps_[i] = 0;
    }
    steps_[ranks.back()] = 0;
  }

  // Bounds, for each row from `top`, of what a pixel before column `first` and one behind column `last` can hold.
  void bounds(int32_t first, int32_t last, std::vector<float>& before, std::vector<float>& after) const {
    const float margin = 1e-4F + 1e-7F * static_cast<float>(members_.size());  // for the rounding of float32
    before.assign(bottom - top, margin);
    after.assign(bottom - top, margin);
    for (const Member& member : members_) {
      const RunMask& mask = *member.mask;
      const int32_t skip = mask.top - top;
      const float weight = member.weight > 0 ? static_cast<float>(member.weight) : 0;
      add_reach(mask.begins.data(), mask.ends.data(), static_cast<int32_t>(mask.begins.size()), first, last + 1, weight,
                before.data() + skip, after.data() + skip);
    }
  }

  // The first and the last pixel of row y from the threshold on, each searched from its side; false if there are none.
  bool find(int32_t y, double threshold, int32_t& first, int32_t& last) {
    Run whole{width_, 0};
    for_runs(y, [&](const Run& run, double weight) {
      steps_[run.begin] += weight;
      steps_[run.end] -= weight;
      whole = {std::min(whole.begin, run.begin), std::max(whole.end, run.end)};
    });
    double sum = 0;
    for (first = whole.begin; first < whole.end; ++first) {
      sum += steps_[first];
      if (sum >= threshold) {
        break;
      }
    }
    sum = 0;
    for (last = whole.end - 1; last >= first; --last) {
      sum -= steps_[last + 1];
      if (sum >= threshold) {
        break;
      }
    }
    if (whole.begin <= whole.end) {
      std::fill(steps_.begin() + whole.begin, steps_.begin() + whole.end + 1, 0.0);
    }
    return first <= last;
  }

  int32_t top = INT32_MAX, bottom = 0;

 private:
  // Calls function(run, weight) for the runs of row y of all members.
  template <typename Function>
  void for_runs(int32_t y, const Function& function) const {
    for (const Member& member : members_) {
      const RunMask& mask = *member.mask;
      const int32_t row = y - mask.top;
      if (row < 0 || row >= static_cast<int32_t>(mask.begins.size())) {
        continue;
      }
      const int32_t first = mask.first[row], behind = mask.first[row + 1];
      if (first == behind && mask.begins[row] < mask.ends[row]) {
        function(Run{mask.begins[row], mask.ends[row]}, member.weight);
      }
      for (int32_t i = first; i < behind; ++i) {
        function(mask.runs[i], member.weight);
      }
    }
  }

  int32_t width_;
  std::vector<Member> members_;
  std::vector<double> steps_;  // 0 between calls
};

// First and last row and column at or above the threshold, ends included; false if there are none. First and last row
// are searched from their sides; of those between, one in the middle gives columns over which few others may reach.
bool find_extent(Canvas& canvas, double threshold, PixelBox& extent) {
  threshold -= kRounding;
  extent = {INT32_MAX, INT32_MAX, -1, -1};
  int32_t top = canvas.top, bottom = canvas.bottom - 1, first, last;
  std::vector<float> before, after;
  const auto look = [&](int32_t y) {
    if (!canvas.find(y, threshold, first, last)) {
      return false;
    }
    extent.left = std::min(extent.left, first);
    extent.right = std::max(extent.right, last);
    return true;
  };
  canvas.bounds(INT32_MAX, -1, before, after);
  while (top <= bottom && !(before[top - canvas.top] >= threshold && look(top))) {
    ++top;
  }
  while (top < bottom && !(before[bottom - canvas.top] >= threshold && look(bottom))) {
    --bottom;
  }
  if (top > bottom) {
    return false;
  }
  extent.top = top;
  extent.bottom = bottom;
  look(top + (bottom - top) / 2);
  canvas.bounds(extent.left, extent.right, before, after);
  for (int32_t y = top + 1; y < bottom; ++y) {
    if (before[y - canvas.top] >= threshold || after[y - canvas.top] >= threshold) {
      look(y);
    }
  }
  return true;
}

// The canvas in the extent, resized to size x size.
void resize(Canvas& canvas, const PixelBox& extent, const VotingOptions& options, double* mask) {
  const bool outside = options.procedure == kGpu;
  const int32_t size = options.size;
  const double down = static_cast<double>(extent.bottom - extent.top + 1) / size;
  const double across = static_cast<double>(extent.right - extent.left + 1) / size;
  std::vector<Sample> columns(size);
  std::vector<int32_t> ranks(options.width + 1);
  for (int32_t j = 0; j < size; ++j) {
    columns[j] =
        sample_at(j, across, extent.left, outside ? 0 : extent.left, outside ? options.width - 1 : extent.right);
    ranks[columns[j].before] = ranks[columns[j].after] = 1;
  }
  int32_t rank = 0;
  for (int32_t& place : ranks) {
    rank += std::exchange(place, rank);
  }
  std::vector<double> values(rank), lines[2] = {std::vector<double>(size), std::vector<double>(size)};
  const auto set_line = [&](int32_t y, std::vector<double>& line) {
    canvas.sample(y, ranks, values);
    for (int32_t j = 0; j < size; ++j) {
      line[j] = mix(values[ranks[columns[j].before]], values[ranks[columns[j].after]], columns[j].share);
    }
  };
  for (int32_t i = 0; i < size; ++i) {
    const Sample vertical =
        sample_at(i, down, extent.top, outside ? 0 : extent.top, outside ? options.height - 1 : extent.bottom);
    set_line(vertical.before, lines[0]);
    set_line(vertical.after, lines[1]);
    for (int32_t j = 0; j < size; ++j) {
      mask[i * size + j] = mix(lines[0][j], lines[1][j], vertical.share);
    }
  }
}

std::vector<Candidate> candidates_of(const Chosen& chosen, const double* scores, int64_t rois, int64_t classes,
                                     const std::vector<double>& boxes, double threshold) {
  std::vector<Candidate> candidates;
  double sum = 0;
  for (int64_t r = 0; r < rois; ++r) {
    if (overlap_reaches(&boxes[4 * chosen.roi], &boxes[4 * r], threshold, /*above=*/false)) {
      candidates.push_back({r, scores[r * classes + chosen.category]});
      sum += candidates.back().weight;
    }
  }
  for (Candidate& candidate : candidates) {
    candidate.weight /= sum;
  }
  return candidates;
}

// A result as the operator returns it, in float64; false if it is dropped.
bool vote(const std::vector<Candidate>& candidates, const std::vector<RunMask>& masks, const VotingOptions& options,
          double* box, double* mask) {
  Canvas canvas(candidates, masks, options.width);
  PixelBox extent;
  if (!find_extent(canvas, options.binary_threshold, extent)) {
    if (options.procedure != kCpu) {
      return false;
    }
    extent = {options.width / 2, options.height / 2, options.width / 2, options.height / 2};
  } else if (options.procedure == kGpu && (extent.left == extent.right || extent.top == extent.bottom)) {
    return false;
  }
  const double end = options.procedure == kChainercv ? 1 : 0;
  box[0] = extent.left;
  box[1] = extent.top;
  box[2] = extent.right + end;
  box[3] = extent.bottom + end;
  resize(canvas, extent, options, mask);
  return true;
}

MaskVotingResult mask_voting_cpu(const Tensor& masks, const Tensor& boxes, const Tensor& scores, int64_t height,
                                 int64_t width, double nms_threshold, double merge_threshold, double binary_threshold,
                                 double score_threshold, int64_t max_detections, int64_t procedure) {
  const VotingOptions options = check_mask_voting(masks, boxes, scores, height, width, nms_threshold, merge_threshold,
                                                  binary_threshold, score_threshold, max_detections, procedure);
  const int64_t rois = masks.size(0), classes = scores.size(1), area = masks.size(1) * masks.size(2);
  const Tensor dense_masks = masks.contiguous(), exact_boxes = boxes.to(at::kDouble).contiguous();
  const Tensor exact_scores = scores.to(at::kDouble).contiguous();
  const double* score = exact_scores.const_data_ptr<double>();
  const double* edges = exact_boxes.const_data_ptr<double>();
  std::vector<double> extended(edges, edges + 4 * rois);
  for (int64_t r = 0; r < rois && procedure != kChainercv; ++r) {
    extended[4 * r + 2] += 1;
    extended[4 * r + 3] += 1;
  }
  const std::vector<Chosen> chosen = choose(score, rois, classes, extended, options);
  const auto count = static_cast<int64_t>(chosen.size());

  std::vector<std::vector<Candidate>> candidates(count);
  at::parallel_for(0, count, /*grain_size=*/8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      candidates[i] = candidates_of(chosen[i], score, rois, classes, extended, options.merge_threshold);
    }
  });
  std::vector<char> used(rois);
  for (const auto& some : candidates) {
    for (const Candidate& candidate : some) {
      used[candidate.roi] = 1;
    }
  }
  std::vector<RunMask> rendered(rois);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, masks.scalar_type(), "mask_voting", [&] {
    const auto* values = dense_masks.const_data_ptr<scalar_t>();
    at::parallel_for(0, rois, /*grain_size=*/4, [&](int64_t begin, int64_t end) {
      std::vector<double> exact(area);
      for (int64_t r = begin; r < end; ++r) {
        if (used[r]) {
          std::copy_n(values + r * area, area, exact.data());
          rendered[r] = render(exact.data(), edges + 4 * r, options);
        }
      }
    });
  });

  const Tensor voted_boxes = at::zeros({max_detections, 4}, exact_boxes.options());
  const Tensor voted_masks = at::zeros({max_detections, options.size, options.size}, exact_boxes.options());
  const Tensor voted_scores = at::zeros({max_detections}, exact_scores.options());
  const Tensor voted_classes = at::full({max_detections}, -1, boxes.options().dtype(at::kLong));
  auto* box = voted_boxes.data_ptr<double>();
  auto* mask = voted_masks.data_ptr<double>();
  std::vector<char> kept(count);
  at::parallel_for(0, count, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kept[i] = vote(candidates[i], rendered, options, box + 4 * i, mask + i * area);
    }
  });
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!kept[i]) {
      continue;
    }
    if (rows < i) {
      std::copy_n(box + 4 * i, 4, box + 4 * rows);
      std::copy_n(mask + i * area, area, mask + rows * area);
    }
    voted_scores.data_ptr<double>()[rows] = chosen[i].score;
    voted_classes.data_ptr<int64_t>()[rows] = chosen[i].category;
    ++rows;
  }
  std::fill(box + 4 * rows, box + 4 * max_detections, 0.0);
  std::fill(mask + rows * area, mask + max_detections * area, 0.0);
  return {voted_boxes.to(boxes.scalar_type()), voted_scores.to(scores.scalar_type()), voted_classes,
          voted_masks.to(masks.scalar_type()), at::scalar_tensor(rows, boxes.options().dtype(at::kLong))};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) { library.impl("mask_voting", mask_voting_cpu); }

}  // namespace convmask
