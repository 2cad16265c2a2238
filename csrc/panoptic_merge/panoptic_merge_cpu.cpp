// CPU kernel of panoptic merging. The masks are read from memory once and kept as bits, 64 pixels a word: what follows
// works on an eighth of the data, and skips the blocks of an image that an instance does not touch.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "panoptic_merge.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define CONVMASK_SSE2
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

namespace convmask {
namespace {

constexpr int64_t kWordPixels = 64;
constexpr int64_t kBlockWords = 64;
constexpr int64_t kBlockPixels =
    kWordPixels * kBlockWords;  // three rows of an image or so: small enough to skip, and fits into L1

#if defined(_MSC_VER)
inline int64_t count_bits(uint64_t word) { return static_cast<int64_t>(__popcnt64(word)); }
inline int lowest_bit(uint64_t word) {
  unsigned long index;
  _BitScanForward64(&index, word);
  return static_cast<int>(index);
}
#else
inline int64_t count_bits(uint64_t word) { return __builtin_popcountll(word); }
inline int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }  // of a word that is not 0
#endif

// 64 bytes, each zero or not, to 64 bits; byte 0 is bit 0.
inline uint64_t pack_word(const uint8_t* bytes) {
  uint64_t word = 0;
#if defined(CONVMASK_SSE2)
  const __m128i zero = _mm_setzero_si128();
  for (int part = 0; part < 4; ++part) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * part));
    const auto is_zero = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(sixteen, zero)));
    word |= static_cast<uint64_t>(is_zero ^ 0xFFFFu) << (16 * part);
  }
#else
  for (int bit = 0; bit < kWordPixels; ++bit) {
    word |= static_cast<uint64_t>(bytes[bit] != 0) << bit;
  }
#endif
  return word;
}

// Calls visit(start, length) for every run of set bits, in ascending order.
template <typename Visit>
inline void for_each_run(uint64_t word, const Visit& visit) {
  while (word != 0) {
    const int start = lowest_bit(word);
    const uint64_t after = ~(word >> start);  // its lowest set bit is where the run ends; 0 only for a full word
    const int length = after == 0 ? 64 : lowest_bit(after);
    visit(start, length);
    if (start + length >= 64) {
      return;
    }
    word &= ~uint64_t{0} << (start + length);
  }
}

// Packs `pixels` (at most a block of them) into words and returns how many are set. A mask is set where it is >=
// threshold.
template <typename scalar_t>
int64_t pack_block(const scalar_t* mask, int64_t pixels, scalar_t threshold, uint64_t* words) {
  int64_t area = 0;
  for (int64_t start = 0; start < pixels; start += kWordPixels) {
    const int64_t length = std::min(kWordPixels, pixels - start);
    uint64_t word;
    if (std::is_same_v<scalar_t, bool> && length == kWordPixels) {
      word = pack_word(reinterpret_cast<const uint8_t*>(mask + start));
    } else {
      uint8_t bytes[kWordPixels] = {};
      if constexpr (std::is_same_v<scalar_t, bool>) {
        std::memcpy(bytes, mask + start, length);
      } else {
        for (int64_t i = 0; i < length; ++i) {
          bytes[i] = mask[start + i] >= threshold;
        }
      }
      word = pack_word(bytes);
    }
    words[start / kWordPixels] = word;
    area += count_bits(word);
  }
  return area;
}

// The instances that take part, in rank order, as bits. Words of a block that an instance does not touch hold no value.
struct PackedMasks {
  int64_t pixels;              // of the image
  int64_t blocks;              // of the image
  std::vector<int64_t> order;  // rank -> index of the instance
  std::vector<int32_t> areas;  // (rank, block)
  Tensor bits;                 // (rank, block, kBlockWords)

  uint64_t* words(int64_t rank, int64_t block) {
    return reinterpret_cast<uint64_t*>(bits.data_ptr<int64_t>()) + (rank * blocks + block) * kBlockWords;
  }
  int32_t area(int64_t rank, int64_t block) const { return areas[rank * blocks + block]; }
  int64_t area(int64_t rank) const {
    int64_t sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      sum += area(rank, block);
    }
    return sum;
  }
};

// Instances from the highest score down (equal scores in their own order), up to the first one below the threshold.
std::vector<int64_t> rank(const Tensor& scores, double score_threshold) {
  const Tensor exact = scores.to(at::kDouble).contiguous();
  const Tensor order = std::get<1>((-exact).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false)).contiguous();
  std::vector<int64_t> ranked;
  for (int64_t i = 0; i < order.numel(); ++i) {
    const int64_t instance = order.data_ptr<int64_t>()[i];
    if (exact.data_ptr<double>()[instance] < score_threshold) {
      break;
    }
    ranked.push_back(instance);
  }
  return ranked;
}

PackedMasks pack(const Tensor& masks, std::vector<int64_t> order, double mask_threshold) {
  const auto instances = static_cast<int64_t>(order.size());
  const int64_t pixels = masks.size(1) * masks.size(2);
  const int64_t blocks = (pixels + kBlockPixels - 1) / kBlockPixels;
  PackedMasks packed{pixels, blocks, std::move(order), std::vector<int32_t>(instances * blocks),
                     at::empty({instances, blocks, kBlockWords}, masks.options().dtype(at::kLong))};
  const Tensor dense = masks.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND3(at::kBool, at::kHalf, at::kBFloat16, dense.scalar_type(), "panoptic_merge", [&] {
    const scalar_t* data = dense.const_data_ptr<scalar_t>();
    const auto threshold = static_cast<scalar_t>(mask_threshold);
    at::parallel_for(0, instances * blocks, /*grain_size=*/8, [&](int64_t begin, int64_t end) {
      uint64_t words[kBlockWords];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t rank = item / blocks;
        const int64_t block = item % blocks;
        const int64_t start = block * kBlockPixels;
        const int64_t length = std::min(kBlockPixels, pixels - start);
        const auto area =
            static_cast<int32_t>(pack_block(data + packed.order[rank] * pixels + start, length, threshold, words));
        packed.areas[item] = area;
        if (area > 0) {  // most blocks of most masks are empty: not storing them saves an eighth of the memory traffic
          const int64_t used = (length + kWordPixels - 1) / kWordPixels;
          uint64_t* destination = packed.words(rank, block);
          std::copy_n(words, used, destination);
          std::fill(destination + used, destination + kBlockWords, 0);
        }
      }
    });
  });
  return packed;
}

struct Thing {
  int64_t rank;
  int64_t area;  // painted pixels
};

// Decides in rank order which instances stay. Their words in `packed` are reduced to the pixels that they paint;
// `painted` (block, kBlockWords) becomes the union of these.
std::vector<Thing> claim_pixels(PackedMasks& packed, std::vector<uint64_t>& painted, double overlap_threshold) {
  std::vector<Thing> things;
  for (int64_t rank = 0; rank < static_cast<int64_t>(packed.order.size()); ++rank) {
    const int64_t area = packed.area(rank);
    if (area == 0) {
      continue;
    }
    int64_t covered = 0;
    for (int64_t block = 0; block < packed.blocks; ++block) {
      if (packed.area(rank, block) > 0) {
        const uint64_t* words = packed.words(rank, block);
        const uint64_t* taken = painted.data() + block * kBlockWords;
        for (int64_t i = 0; i < kBlockWords; ++i) {
          covered += count_bits(words[i] & taken[i]);
        }
      }
    }
    if (covered_too_much(covered, area, overlap_threshold)) {
      continue;
    }
    for (int64_t block = 0; block < packed.blocks; ++block) {
      if (packed.area(rank, block) > 0) {
        uint64_t* words = packed.words(rank, block);
        uint64_t* taken = painted.data() + block * kBlockWords;
        for (int64_t i = 0; i < kBlockWords; ++i) {
          words[i] &= ~taken[i];
          taken[i] |= words[i];
        }
      }
    }
    things.push_back({rank, area - covered});
  }
  return things;
}

// Pixels of every label that no thing covers.
class LabelCounts {
 public:
  static constexpr int64_t kAbsent = -1;

  LabelCounts() : pixels_(kLabels, kAbsent) {}

  void add(int64_t label, int64_t pixels) {
    if (!is_label(label)) {
      out_of_range_ = true;
      return;
    }
    const int64_t entry = label - kFirstLabel;
    pixels_[entry] = std::max<int64_t>(pixels_[entry], 0) + pixels;
    begin_ = std::min(begin_, entry);
    end_ = std::max(end_, entry + 1);
  }
  // Adds `length` labels, counted as `weight` pixels each. Labels come in runs: the table is touched once a run.
  void add_run(const int64_t* labels, int64_t length, int64_t weight) {
    int64_t start = 0;
    for (int64_t i = 1; i < length; ++i) {
      if (labels[i] != labels[start]) {
        add(labels[start], (i - start) * weight);
        start = i;
      }
    }
    add(labels[start], (length - start) * weight);
  }
  void merge(const LabelCounts& other) {
    for (int64_t entry = other.begin_; entry < other.end_; ++entry) {
      if (other.pixels_[entry] != kAbsent) {
        add(entry + kFirstLabel, other.pixels_[entry]);
      }
    }
    out_of_range_ |= other.out_of_range_;
  }
  int64_t operator[](int64_t label) const { return pixels_[label - kFirstLabel]; }
  bool out_of_range() const { return out_of_range_; }

 private:
  std::vector<int64_t> pixels_;
  int64_t begin_ = kLabels;  // entries from here to end_ are in use
  int64_t end_ = 0;
  bool out_of_range_ = false;
};

// The words of `painted` inverted, without the bits behind the image's last pixel.
inline uint64_t free_pixels(uint64_t painted, int64_t pixels_left) {
  return pixels_left >= kWordPixels ? ~painted : ~painted & ((uint64_t{1} << pixels_left) - 1);
}

// Writes the ids of the things into `panoptic` (every pixel of it) and counts the labels of the pixels in between.
LabelCounts paint_things(PackedMasks& packed, const std::vector<Thing>& things, const std::vector<uint64_t>& painted,
                         const int64_t* labels, bool count_covered_labels, int32_t* panoptic) {
  LabelCounts counts;
  std::mutex mutex;
  at::parallel_for(0, packed.blocks, /*grain_size=*/4, [&](int64_t begin, int64_t end) {
    LabelCounts mine;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * kBlockPixels;
      const int64_t length = std::min(kBlockPixels, packed.pixels - start);
      std::fill_n(panoptic + start, length, 0);
      for (size_t i = 0; i < things.size(); ++i) {
        if (packed.area(things[i].rank, block) > 0) {
          const uint64_t* words = packed.words(things[i].rank, block);
          for (int64_t w = 0; w < kBlockWords; ++w) {
            for_each_run(words[w], [&](int at, int run) {
              std::fill_n(panoptic + start + w * kWordPixels + at, run, static_cast<int32_t>(i + 1));
            });
          }
        }
      }
      for (int64_t first = start; first < start + length; first += kWordPixels) {
        const uint64_t free = free_pixels(painted[first / kWordPixels], packed.pixels - first);
        for_each_run(free, [&](int at, int run) { mine.add_run(labels + first + at, run, 1); });
      }
      if (count_covered_labels) {
        mine.add_run(labels + start, length, 0);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    counts.merge(mine);
  });
  return counts;
}

// Writes the ids of the stuff segments where no thing is.
void paint_stuff(const std::vector<uint64_t>& painted, const int64_t* labels, const std::vector<int32_t>& id_of_label,
                 int64_t pixels, int32_t* panoptic) {
  const int64_t words = (pixels + kWordPixels - 1) / kWordPixels;
  at::parallel_for(0, words, /*grain_size=*/4 * kBlockWords, [&](int64_t begin, int64_t end) {
    for (int64_t word = begin; word < end; ++word) {
      const int64_t first = word * kWordPixels;
      for_each_run(free_pixels(painted[word], pixels - first), [&](int at, int run) {
        for (int64_t i = first + at; i < first + at + run; ++i) {
          panoptic[i] = is_label(labels[i]) ? id_of_label[labels[i] - kFirstLabel] : 0;
        }
      });
    }
  });
}

PanopticMergeResult panoptic_merge_cpu(const Tensor& masks, const Tensor& scores, const Tensor& classes,
                                       const Tensor& sem_seg, double overlap_threshold, int64_t stuff_area_limit,
                                       double score_threshold, double mask_threshold, at::IntArrayRef things_labels) {
  check_panoptic_merge(masks, scores, classes, sem_seg);
  const int64_t pixels = sem_seg.numel();
  const Tensor panoptic = at::empty(sem_seg.sizes(), sem_seg.options().dtype(at::kInt));
  const Tensor segments =
      at::zeros({segment_capacity(masks.size(0), pixels, stuff_area_limit), kColumns}, sem_seg.options());
  const Tensor counts = at::zeros({3}, sem_seg.options());
  if (pixels == 0) {
    return {panoptic, segments, counts};
  }

  PackedMasks packed = pack(masks, rank(scores, score_threshold), mask_threshold);
  std::vector<uint64_t> painted(packed.blocks * kBlockWords, 0);
  const std::vector<Thing> things = claim_pixels(packed, painted, overlap_threshold);

  const Tensor dense_labels = sem_seg.contiguous();
  const int64_t* labels = dense_labels.const_data_ptr<int64_t>();
  auto* ids = panoptic.data_ptr<int32_t>();
  const LabelCounts visible = paint_things(packed, things, painted, labels, stuff_area_limit <= 0, ids);

  auto* row = segments.data_ptr<int64_t>();
  const auto add_segment = [&row](int64_t category, int64_t instance, int64_t area) {
    row[kCategory] = category;
    row[kInstance] = instance;
    row[kArea] = area;
    row += kColumns;
  };
  const Tensor dense_classes = classes.contiguous();
  for (const Thing& thing : things) {
    const int64_t instance = packed.order[thing.rank];
    add_segment(dense_classes.const_data_ptr<int64_t>()[instance], instance, thing.area);
  }
  std::vector<int32_t> id_of_label(kLabels, 0);
  int64_t stuff = 0;
  for (int64_t label = kFirstLabel; label < kFirstLabel + kLabels; ++label) {
    const int64_t area = visible[label];
    if (area == LabelCounts::kAbsent || area < stuff_area_limit ||
        std::find(things_labels.begin(), things_labels.end(), label) != things_labels.end()) {
      continue;
    }
    add_segment(label, -1, area);
    ++stuff;
    id_of_label[label - kFirstLabel] = static_cast<int32_t>(things.size() + stuff);
  }
  if (stuff > 0) {
    paint_stuff(painted, labels, id_of_label, pixels, ids);
  }

  auto* count = counts.data_ptr<int64_t>();
  count[0] = static_cast<int64_t>(things.size());
  count[1] = stuff;
  count[2] = visible.out_of_range();
  return {panoptic, segments, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CPU, library) { library.impl("panoptic_merge", panoptic_merge_cpu); }

}  // namespace convmask
