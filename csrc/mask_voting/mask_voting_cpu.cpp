// CPU kernel of mask voting. A binarised mask is kept as the runs of its rows, which are found from its S x S values
// without looking at every pixel; a canvas is never stored, only one row of it at a time.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "mask_voting.h"

// The inner loop is compiled for several processors, of which the loader takes the best.
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

// The set pixels of a binarised mask in the image.
struct RunMask {
  int32_t top = 0, left = 0, right = 0;
  std::vector<int32_t> first;  // of the runs of each row, and behind the last
  std::vector<Run> runs;

  int32_t bottom() const { return top + std::max<int32_t>(static_cast<int32_t>(first.size()) - 1, 0); }
};

// The results, by class and then by score. NMS decides about a RoI by those of its class with higher scores alone, so
// all classes go on together, the highest score first, until there are enough results.
std::vector<Chosen> choose(const double* scores, int64_t rois, int64_t classes, const std::vector<double>& boxes,
                           const VotingOptions& options) {
  std::vector<Chosen> open;
  for (int64_t r = 0; r < rois; ++r) {
    for (int64_t category = 1; category < classes; ++category) {
      const double score = scores[r * classes + category];
      if (score >= options.score_threshold) {
        open.push_back({r, category, score});
      }
    }
  }
  const auto is_later = [](const Chosen& a, const Chosen& b) {
    return a.score != b.score ? a.score < b.score : a.category != b.category ? a.category > b.category : a.roi > b.roi;
  };
  std::make_heap(open.begin(), open.end(), is_later);
  std::vector<std::vector<Chosen>> kept(std::max<int64_t>(classes, 1));
  int64_t count = 0;
  while (!open.empty() && count < options.max_detections) {
    std::pop_heap(open.begin(), open.end(), is_later);
    const Chosen next = open.back();
    open.pop_back();
    const auto covers = [&](const Chosen& one) {
      return overlap(&boxes[4 * one.roi], &boxes[4 * next.roi]) > options.nms_threshold;
    };
    std::vector<Chosen>& mine = kept[next.category];
    if (std::none_of(mine.begin(), mine.end(), covers)) {
      mine.push_back(next);
      ++count;
    }
  }
  std::vector<Chosen> all;
  for (const auto& some : kept) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

// The columns of a box: where each samples the mask, and the first column of each interval between two mask cells.
struct Columns {
  std::vector<Sample> samples;
  std::vector<int32_t> starts;
};

Columns columns_of(int32_t width, int32_t size) {
  Columns columns;
  columns.samples.resize(width);
  columns.starts.assign(size + 1, width);
  const double step = static_cast<double>(size) / width;
  for (int32_t x = width - 1; x >= 0; --x) {
    columns.samples[x] = sample_at(x, step, 0, 0, size - 1);
    columns.starts[columns.samples[x].before] = x;
  }
  for (int32_t cell = size - 1; cell >= 0; --cell) {
    columns.starts[cell] = std::min(columns.starts[cell], columns.starts[cell + 1]);
  }
  return columns;
}

// The cells of a row mixed from two, and in `above` a bit for each of them, 64 in a word, that reaches the threshold.
CONVMASK_CLONES void mix_rows(const double* a, const double* b, double share, int32_t size, double threshold,
                              double* line, uint64_t* above) {
  for (int32_t x = 0; x < size; ++x) {
    line[x] = mix(a[x], b[x], share);
  }
  for (int32_t first = 0; first < size; first += 64) {
    uint64_t bits = 0;
    for (int32_t x = first; x < std::min(first + 64, size); ++x) {
      bits |= static_cast<uint64_t>(line[x] >= threshold) << (x - first);
    }
    above[first / 64] = bits;
  }
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

// Appends the runs of one row of a box to `runs`, moved by `left` and cut at the image's sides. Only between two mask
// cells of which one reaches the threshold is there a border; it is found by halving, since the values rise or fall.
void find_runs(const double* line, const uint64_t* above, const Columns& columns, int32_t left,
               const VotingOptions& options, std::vector<Run>& runs) {
  const auto close = [&](int32_t begin, int32_t end) {
    begin = std::max(begin + left, 0);
    end = std::min(end + left, options.width);
    if (begin < end) {
      runs.push_back({begin, end});
    }
  };
  bool inside = above[0] & 1;
  int32_t begin = 0;
  const int32_t words = (options.size + 63) / 64;
  for (int32_t word = 0; word < words; ++word) {
    // Bit i: whether cell i and the next one differ. The last cell has no next one.
    const uint64_t next = word + 1 < words ? above[word + 1] << 63 : 0;
    uint64_t changes = above[word] ^ (above[word] >> 1 | next);
    if (word + 1 == words) {
      changes &= (uint64_t{1} << ((options.size - 1) % 64)) - 1;
    }
    for (; changes != 0; changes &= changes - 1) {
      const int32_t cell = 64 * word + lowest_bit(changes);
      int32_t low = columns.starts[cell], high = columns.starts[cell + 1];
      while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        const double value = mix(line[cell], line[cell + 1], columns.samples[middle].share);
        if ((value >= options.binary_threshold) == inside) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (inside) {
        close(begin, low);
      }
      begin = low;
      inside = !inside;
    }
  }
  if (inside) {
    close(begin, static_cast<int32_t>(columns.samples.size()));
  }
}

RunMask render(const double* mask, const double* box, const VotingOptions& options) {
  RunMask result;
  const PixelBox place = to_pixels(box, options.procedure != kChainercv);
  const int32_t top = std::max(place.top, 0), bottom = std::min(place.bottom, options.height);
  result.left = std::max(place.left, 0);
  result.right = std::min(place.right, options.width);
  if (top >= bottom || result.left >= result.right) {
    return result;
  }
  const int32_t size = options.size, last = size - 1;
  const Columns columns = columns_of(place.right - place.left, size);
  const double step = static_cast<double>(size) / (place.bottom - place.top);
  std::vector<double> line(size);
  std::vector<uint64_t> above((size + 63) / 64);
  result.top = top;
  result.runs.reserve(bottom - top);
  result.first.reserve(bottom - top + 1);
  for (int32_t y = top; y < bottom; ++y) {
    result.first.push_back(static_cast<int32_t>(result.runs.size()));
    const Sample row = sample_at(y - place.top, step, 0, 0, last);
    mix_rows(mask + row.before * size, mask + row.after * size, row.share, size, options.binary_threshold, line.data(),
             above.data());
    find_runs(line.data(), above.data(), columns, place.left, options, result.runs);
  }
  result.first.push_back(static_cast<int32_t>(result.runs.size()));
  return result;
}

// The weighted sum of the candidates' binarised masks, a row at a time, as the sum of the steps at the ends of runs.
class Canvas {
 public:
  Canvas(const std::vector<Candidate>& candidates, const std::vector<RunMask>& masks, int32_t width)
      : steps_(width + 1), row_(width) {
    for (const Candidate& candidate : candidates) {
      const RunMask& mask = masks[candidate.roi];
      if (mask.first.empty()) {
        continue;
      }
      members_.push_back({&mask, candidate.weight});
      top = std::min(top, mask.top);
      bottom = std::max(bottom, mask.bottom());
      left = std::min(left, mask.left);
      right = std::max(right, mask.right);
    }
    left = std::min(left, right);
  }

  // Values of row y at [left, right); all others are 0.
  const double* row(int32_t y) {
    add_steps(y);
    double sum = 0;
    for (int32_t x = left; x < right; ++x) {
      sum += steps_[x];
      steps_[x] = 0;
      row_[x] = sum;
    }
    steps_[right] = 0;
    return row_.data();
  }

  // Whether the runs of row y that reach over columns `first` to `last` have the weight for a pixel there.
  bool may_exceed(int32_t y, int32_t first, int32_t last, double threshold) const {
    double before = 0, after = 0;
    for (const Member& member : members_) {
      const RunMask& mask = *member.mask;
      if (y < mask.top || y >= mask.bottom()) {
        continue;
      }
      const int32_t* runs = &mask.first[y - mask.top];
      if (runs[0] < runs[1]) {
        before += mask.runs[runs[0]].begin < first ? member.weight : 0;
        after += mask.runs[runs[1] - 1].end > last + 1 ? member.weight : 0;
      }
    }
    return before >= threshold || after >= threshold;
  }

  // The first and the last pixel of row y from the threshold on, each searched from its side; false if there are none.
  bool find(int32_t y, double threshold, int32_t& first, int32_t& last) {
    add_steps(y);
    double sum = 0;
    for (first = left; first < right; ++first) {
      sum += steps_[first];
      if (sum >= threshold) {
        break;
      }
    }
    sum = 0;
    for (last = right - 1; last >= first; --last) {
      sum -= steps_[last + 1];
      if (sum >= threshold) {
        break;
      }
    }
    std::fill(steps_.begin() + left, steps_.begin() + right + 1, 0.0);
    return first <= last;
  }

  int32_t top = INT32_MAX, bottom = 0, left = INT32_MAX, right = 0;

 private:
  struct Member {
    const RunMask* mask;
    double weight;
  };

  void add_steps(int32_t y) {
    for (const Member& member : members_) {
      const RunMask& mask = *member.mask;
      if (y < mask.top || y >= mask.bottom()) {
        continue;
      }
      const int32_t* first = &mask.first[y - mask.top];
      for (int32_t i = first[0]; i < first[1]; ++i) {
        steps_[mask.runs[i].begin] += member.weight;
        steps_[mask.runs[i].end] -= member.weight;
      }
    }
  }

  std::vector<Member> members_;
  std::vector<double> steps_;  // 0 between calls
  std::vector<double> row_;
};

// First and last row and column at or above the threshold, ends included; false if there are none. First and last row
// are searched from their sides; rows between them matter only if they may reach over the columns found so far.
bool find_extent(Canvas& canvas, double threshold, PixelBox& extent) {
  threshold -= kRounding;
  extent = {INT32_MAX, INT32_MAX, -1, -1};
  int32_t top = canvas.top, bottom = canvas.bottom - 1, first, last;
  const auto look = [&](int32_t y) {
    if (!canvas.find(y, threshold, first, last)) {
      return false;
    }
    extent.left = std::min(extent.left, first);
    extent.right = std::max(extent.right, last);
    return true;
  };
  while (top <= bottom && !look(top)) {
    ++top;
  }
  while (top < bottom && !look(bottom)) {
    --bottom;
  }
  if (top > bottom) {
    return false;
  }
  extent.top = top;
  extent.bottom = bottom;
  for (int32_t y = top + 1; y < bottom; ++y) {
    if (canvas.may_exceed(y, extent.left, extent.right, threshold)) {
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
  for (int32_t j = 0; j < size; ++j) {
    columns[j] =
        sample_at(j, across, extent.left, outside ? 0 : extent.left, outside ? options.width - 1 : extent.right);
  }
  // Resized along x, a row that is looked at twice only once.
  int32_t known[2] = {-1, -1};
  std::vector<double> lines[2] = {std::vector<double>(size), std::vector<double>(size)};
  const auto line_of = [&](int32_t y, int slot) {
    if (known[slot] != y && known[1 - slot] == y) {
      std::swap(lines[0], lines[1]);
      std::swap(known[0], known[1]);
    }
    if (known[slot] != y) {
      const double* values = canvas.row(y);
      for (int32_t j = 0; j < size; ++j) {
        lines[slot][j] = mix(values[columns[j].before], values[columns[j].after], columns[j].share);
      }
      known[slot] = y;
    }
  };
  for (int32_t i = 0; i < size; ++i) {
    const Sample vertical =
        sample_at(i, down, extent.top, outside ? 0 : extent.top, outside ? options.height - 1 : extent.bottom);
    line_of(vertical.before, 0);
    const bool same = vertical.after == vertical.before;
    if (!same) {
      line_of(vertical.after, 1);
    }
    for (int32_t j = 0; j < size; ++j) {
      mask[i * size + j] = mix(lines[0][j], lines[same ? 0 : 1][j], vertical.share);
    }
  }
}

std::vector<Candidate> candidates_of(const Chosen& chosen, const double* scores, int64_t rois, int64_t classes,
                                     const std::vector<double>& boxes, double threshold) {
  std::vector<Candidate> candidates;
  double sum = 0;
  for (int64_t r = 0; r < rois; ++r) {
    if (overlap(&boxes[4 * chosen.roi], &boxes[4 * r]) >= threshold) {
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
  const Tensor exact_masks = masks.to(at::kDouble).contiguous(), exact_boxes = boxes.to(at::kDouble).contiguous();
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
  std::vector<char> used(rois);
  for (int64_t i = 0; i < count; ++i) {
    candidates[i] = candidates_of(chosen[i], score, rois, classes, extended, options.merge_threshold);
    for (const Candidate& candidate : candidates[i]) {
      used[candidate.roi] = 1;
    }
  }
  std::vector<RunMask> rendered(rois);
  at::parallel_for(0, rois, /*grain_size=*/4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (used[r]) {
        rendered[r] = render(exact_masks.const_data_ptr<double>() + r * area, edges + 4 * r, options);
      }
    }
  });

  const Tensor voted_boxes = at::zeros({max_detections, 4}, exact_boxes.options());
  const Tensor voted_masks = at::zeros({max_detections, options.size, options.size}, exact_masks.options());
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
