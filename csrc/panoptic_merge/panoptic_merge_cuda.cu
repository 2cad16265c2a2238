// CUDA kernels of panoptic merging, in five launches without any synchronisation with the host:
//   pack_masks    all masks to bits, 32 pixels a word, and their areas         grid over pixels x instances
//   claim_pixels  which instances stay, in rank order                          one block: every step needs the one
//   before paint_things  ids of things; counts the labels of the pixels in between    grid over pixels number_stuff ids
//   of labels, in ascending order                            one block paint_stuff   ids of stuff grid over pixels
// Sums are sums of integers, so the order of the atomic operations does not matter.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "panoptic_merge.h"

namespace convmask {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kOneBlockThreads = 1024;  // of the kernels that run in a single block
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kAbsent = -1;  // in the table of labels: no pixel has this label

// Atomic addition is defined for the unsigned type only; two's complement makes it right for both.
__device__ void atomic_add(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// What a kernel knows of an instance. `first_word` and `last_word` bound the words that have a bit set.
struct Instances {
  int64_t count;
  int64_t words;        // of one mask
  uint32_t* bits;       // (count, words)
  int64_t* areas;       // (count,), zero at first
  int64_t* first_word;  // (count,), `words` at first
  int64_t* last_word;   // (count,), -1 at first
};

// A warp packs kWarp words, that is kWarp * kWarp consecutive pixels: its lanes read neighbours, and each word is a
// ballot. Lane i keeps word i. A warp's words belong to one instance.
template <typename scalar_t>
__global__ void pack_masks(const scalar_t* masks, const double* scores, int64_t pixels, scalar_t mask_threshold,
                           double score_threshold, Instances instances) {
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = (instances.words + kWarp - 1) / kWarp;  // of kWarp words, in one mask
  const int64_t first = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  for (int64_t item = first; item < instances.count * groups; item += step) {
    const int64_t instance = item / groups;
    const int64_t word = item % groups * kWarp + lane;  // the one that this lane keeps
    if (scores[instance] < score_threshold) {
      continue;  // merging stops before this one; the whole warp agrees
    }
    const scalar_t* mask = masks + instance * pixels;
    uint32_t kept = 0;
    for (int i = 0; i < kWarp; ++i) {
      const int64_t pixel = (item % groups * kWarp + i) * kWarp + lane;
      bool set = false;
      if (pixel < pixels) {
        if constexpr (std::is_same_v<scalar_t, bool>) {
          set = mask[pixel];
        } else {
          set = mask[pixel] >= mask_threshold;
        }
      }
      const uint32_t ballot = __ballot_sync(kAllLanes, set);
      kept = lane == i ? ballot : kept;
    }
    if (word < instances.words) {
      instances.bits[instance * instances.words + word] = kept;
      if (kept != 0) {
        atomic_add(instances.areas + instance, __popc(kept));
        atomicMin(reinterpret_cast<long long*>(instances.first_word + instance), static_cast<long long>(word));
        atomicMax(reinterpret_cast<long long*>(instances.last_word + instance), static_cast<long long>(word));
      }
    }
  }
}

// The sum of `value` over all threads of the block, in every thread. All threads call it. `shared` is free afterwards.
__device__ int64_t block_sum(int64_t value, int64_t* shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kAllLanes, value, offset);
  }
  if (threadIdx.x == 0) {
    *shared = 0;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    atomic_add(shared, value);
  }
  __syncthreads();
  const int64_t sum = *shared;
  __syncthreads();
  return sum;
}

// Segment table and the list of things, filled in the order of ids.
struct Segments {
  int64_t* rows;    // (capacity, kColumns)
  int64_t* counts;  // (3,)
};

__device__ void write_segment(Segments segments, int64_t row, int64_t category, int64_t instance, int64_t area) {
  segments.rows[row * kColumns + kCategory] = category;
  segments.rows[row * kColumns + kInstance] = instance;
  segments.rows[row * kColumns + kArea] = area;
}

// One block. Goes through the instances in rank order; the bits of those that stay are reduced to the pixels that they
// paint, and `painted` (words,) becomes the union of these. Thread t always has the words t, t + blockDim.x, ...: no
// word is read or written by two threads.
__global__ void claim_pixels(Instances instances, const int64_t* order, const double* scores, const int64_t* classes,
                             double score_threshold, double overlap_threshold, uint32_t* painted, Segments segments) {
  __shared__ int64_t shared;
  int64_t things = 0;
  for (int64_t rank = 0; rank < instances.count; ++rank) {
    const int64_t instance = order[rank];
    if (scores[instance] < score_threshold) {
      break;
    }
    const int64_t area = instances.areas[instance];
    if (area == 0) {
      continue;
    }
    uint32_t* bits = instances.bits + instance * instances.words;
    const int64_t first = instances.first_word[instance] / blockDim.x * blockDim.x + threadIdx.x;
    const int64_t last = instances.last_word[instance];
    int64_t mine = 0;
    for (int64_t word = first; word <= last; word += blockDim.x) {
      mine += __popc(bits[word] & painted[word]);
    }
    const int64_t covered = block_sum(mine, &shared);
    if (covered_too_much(covered, area, overlap_threshold)) {
      continue;
    }
    for (int64_t word = first; word <= last; word += blockDim.x) {
      const uint32_t claimed = bits[word] & ~painted[word];
      bits[word] = claimed;
      painted[word] |= claimed;
    }
    if (threadIdx.x == 0) {
      write_segment(segments, things, classes[instance], instance, area - covered);
    }
    ++things;
  }
  if (threadIdx.x == 0) {
    segments.counts[0] = things;
  }
}

// How often each label occurs on free pixels; kAbsent where it does not occur.
__device__ void count_label(int64_t* label_pixels, int64_t label, int64_t pixels, int64_t* out_of_range) {
  if (!is_label(label)) {
    *out_of_range = 1;  // whoever writes, writes the same
    return;
  }
  // Whoever comes first makes 0 of kAbsent; nobody finds kAbsent later.
  auto* address = reinterpret_cast<unsigned long long*>(label_pixels + (label - kFirstLabel));
  atomicCAS(address, static_cast<unsigned long long>(kAbsent), 0ull);
  if (pixels > 0) {
    atomicAdd(address, static_cast<unsigned long long>(pixels));
  }
}

// A warp has the 32 pixels of one word. Equal labels of a warp are counted together: maps of labels have large areas.
__global__ void paint_things(Instances instances, const uint32_t* painted, const int64_t* labels, int64_t pixels,
                             bool count_covered_labels, int32_t* panoptic, int64_t* label_pixels, Segments segments) {
  const int lane = threadIdx.x % kWarp;
  const int64_t things = segments.counts[0];
  const int64_t first = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  for (int64_t word = first; word < instances.words; word += step) {
    const int64_t pixel = word * kWarp + lane;
    int32_t id = 0;
    if (painted[word] != 0) {
      for (int64_t thing = 0; thing < things; ++thing) {
        const int64_t instance = segments.rows[thing * kColumns + kInstance];
        if (word >= instances.first_word[instance] && word <= instances.last_word[instance] &&
            (instances.bits[instance * instances.words + word] >> lane & 1u) != 0) {
          id = static_cast<int32_t>(thing + 1);
        }
      }
    }
    const bool counts = pixel < pixels && (id == 0 || count_covered_labels);
    if (pixel < pixels) {
      panoptic[pixel] = id;
    }
    uint32_t waiting = __ballot_sync(kAllLanes, counts);
    const int64_t label = counts ? labels[pixel] : 0;
    while (waiting != 0) {
      const int leader = __ffs(static_cast<int>(waiting)) - 1;
      const int64_t leading_label = __shfl_sync(kAllLanes, label, leader);
      const uint32_t equal = __ballot_sync(kAllLanes, counts && label == leading_label);
      const uint32_t visible = __ballot_sync(kAllLanes, counts && label == leading_label && id == 0);
      if (lane == leader) {
        count_label(label_pixels, label, __popc(visible), segments.counts + 2);
      }
      waiting &= ~equal;
    }
  }
}

// Takes some labels out of the table. The list travels as a kernel argument, which needs no copy from the host.
struct LabelList {
  static constexpr int kCapacity = 256;
  int count;
  int32_t labels[kCapacity];
};

__global__ void forget_labels(LabelList list, int64_t* label_pixels) {
  for (int i = threadIdx.x; i < list.count; i += blockDim.x) {
    label_pixels[list.labels[i] - kFirstLabel] = kAbsent;
  }
}

// One block. Thread t has kLabels / blockDim.x labels in a row. Gives the labels that stay their ids, in ascending
// order.
__global__ void number_stuff(const int64_t* label_pixels, int64_t stuff_area_limit, int32_t* id_of_label,
                             Segments segments) {
  __shared__ int64_t stuff_of_thread[kOneBlockThreads];
  const int64_t share = kLabels / blockDim.x;
  const int64_t begin = threadIdx.x * share;
  const auto stays = [&](int64_t entry) {
    return label_pixels[entry] != kAbsent && label_pixels[entry] >= stuff_area_limit;
  };
  int64_t stuff = 0;
  for (int64_t entry = begin; entry < begin + share; ++entry) {
    stuff += stays(entry);
  }
  stuff_of_thread[threadIdx.x] = stuff;
  __syncthreads();
  const int64_t things = segments.counts[0];
  int64_t row = things;
  for (int thread = 0; thread < threadIdx.x; ++thread) {
    row += stuff_of_thread[thread];
  }
  for (int64_t entry = begin; entry < begin + share; ++entry) {
    int32_t id = 0;
    if (stays(entry)) {
      write_segment(segments, row, entry + kFirstLabel, -1, label_pixels[entry]);
      id = static_cast<int32_t>(++row);
    }
    id_of_label[entry] = id;
  }
  if (threadIdx.x == blockDim.x - 1) {
    segments.counts[1] = row - things;
  }
}

__global__ void paint_stuff(const int64_t* labels, const int32_t* id_of_label, int64_t pixels, int32_t* panoptic) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t pixel = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; pixel < pixels; pixel += step) {
    if (panoptic[pixel] == 0 && is_label(labels[pixel])) {
      panoptic[pixel] = id_of_label[labels[pixel] - kFirstLabel];
    }
  }
}

// Blocks for `threads` threads. Every kernel strides over its grid, so that any number is right.
unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, int64_t{1} << 20));
}

void remove_things_labels(at::IntArrayRef things_labels, int64_t* label_pixels, cudaStream_t stream) {
  LabelList list{};
  const auto flush = [&] {
    if (list.count > 0) {
      forget_labels<<<1, LabelList::kCapacity, 0, stream>>>(list, label_pixels);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      list.count = 0;
    }
  };
  for (const int64_t label : things_labels) {
    if (is_label(label)) {
      list.labels[list.count++] = static_cast<int32_t>(label);
      if (list.count == LabelList::kCapacity) {
        flush();
      }
    }
  }
  flush();
}

void launch_pack(const Tensor& masks, const Tensor& scores, double mask_threshold, double score_threshold,
                 const Instances& instances, cudaStream_t stream) {
  const int64_t pixels = masks.size(1) * masks.size(2);
  const int64_t groups = (instances.words + kWarp - 1) / kWarp;
  AT_DISPATCH_FLOATING_TYPES_AND3(at::kBool, at::kHalf, at::kBFloat16, masks.scalar_type(), "panoptic_merge", [&] {
    pack_masks<scalar_t><<<blocks_for(instances.count * groups * kWarp), kThreads, 0, stream>>>(
        masks.const_data_ptr<scalar_t>(), scores.const_data_ptr<double>(), pixels,
        static_cast<scalar_t>(mask_threshold), score_threshold, instances);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

PanopticMergeResult panoptic_merge_cuda(const Tensor& masks, const Tensor& scores, const Tensor& classes,
                                        const Tensor& sem_seg, double overlap_threshold, int64_t stuff_area_limit,
                                        double score_threshold, double mask_threshold, at::IntArrayRef things_labels) {
  check_panoptic_merge(masks, scores, classes, sem_seg);
  const c10::cuda::CUDAGuard guard(masks.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto options = sem_seg.options();
  const int64_t count = masks.size(0);
  const int64_t pixels = sem_seg.numel();
  const int64_t words = (pixels + kWarp - 1) / kWarp;
  const Tensor panoptic = at::empty(sem_seg.sizes(), options.dtype(at::kInt));
  const Tensor rows = at::zeros({segment_capacity(count, pixels, stuff_area_limit), kColumns}, options);
  const Tensor counts = at::zeros({3}, options);
  if (pixels == 0) {
    return {panoptic, rows, counts};
  }
  const Segments segments{rows.data_ptr<int64_t>(), counts.data_ptr<int64_t>()};

  const Tensor exact_scores = scores.to(at::kDouble).contiguous();
  const Tensor order = std::get<1>((-exact_scores).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false)).contiguous();
  const Tensor dense_masks = masks.contiguous();
  const Tensor dense_classes = classes.contiguous();
  const Tensor dense_labels = sem_seg.contiguous();
  const int64_t* labels = dense_labels.const_data_ptr<int64_t>();

  const Tensor bits = at::empty({count, words}, options.dtype(at::kInt));
  const Tensor areas = at::zeros({count}, options);
  const Tensor first_word = at::full({count}, words, options);
  const Tensor last_word = at::full({count}, -1, options);
  const Tensor painted = at::zeros({words}, options.dtype(at::kInt));
  auto* painted_words = reinterpret_cast<uint32_t*>(painted.data_ptr<int32_t>());
  const Instances instances{count,
                            words,
                            reinterpret_cast<uint32_t*>(bits.data_ptr<int32_t>()),
                            areas.data_ptr<int64_t>(),
                            first_word.data_ptr<int64_t>(),
                            last_word.data_ptr<int64_t>()};
  if (count > 0) {
    launch_pack(dense_masks, exact_scores, mask_threshold, score_threshold, instances, stream);
    claim_pixels<<<1, kOneBlockThreads, 0, stream>>>(
        instances, order.const_data_ptr<int64_t>(), exact_scores.const_data_ptr<double>(),
        dense_classes.const_data_ptr<int64_t>(), score_threshold, overlap_threshold, painted_words, segments);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const Tensor label_pixels = at::full({kLabels}, kAbsent, options);
  const Tensor id_of_label = at::empty({kLabels}, options.dtype(at::kInt));
  auto* ids = panoptic.data_ptr<int32_t>();
  paint_things<<<blocks_for(words * kWarp), kThreads, 0, stream>>>(
      instances, painted_words, labels, pixels, stuff_area_limit <= 0, ids, label_pixels.data_ptr<int64_t>(), segments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  remove_things_labels(things_labels, label_pixels.data_ptr<int64_t>(), stream);
  number_stuff<<<1, kOneBlockThreads, 0, stream>>>(label_pixels.const_data_ptr<int64_t>(), stuff_area_limit,
                                                   id_of_label.data_ptr<int32_t>(), segments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  paint_stuff<<<blocks_for(pixels), kThreads, 0, stream>>>(labels, id_of_label.const_data_ptr<int32_t>(), pixels, ids);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {panoptic, rows, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) { library.impl("panoptic_merge", panoptic_merge_cuda); }

}  // namespace convmask
