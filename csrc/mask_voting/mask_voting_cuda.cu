// CUDA kernels of mask voting, without any synchronisation with the host:
//   suppress  NMS by class, in the order of a sort        a block for each class
//   vote      candidates, extent and mask of each result  a block for each result
// A canvas is never stored: its pixels are computed where they are looked at. Sums are in the order of the RoIs.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "mask_voting.h"

namespace convmask {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;

// kept (C - 1, M): the RoIs that NMS keeps, by score, and -1 behind them. `order` (C - 1, R) has all by score.
__global__ void suppress(const double* boxes, const double* scores, const int64_t* order, int64_t rois, int64_t classes,
                         VotingOptions options, int64_t* kept, double* kept_scores) {
  for (int64_t category = 1 + blockIdx.x; category < classes; category += gridDim.x) {
    int64_t* mine = kept + (category - 1) * options.max_detections;
    double* my_scores = kept_scores + (category - 1) * options.max_detections;
    int64_t count = 0;  // the same in every thread
    for (int64_t i = 0; i < rois && count < options.max_detections; ++i) {
      const int64_t roi = order[(category - 1) * rois + i];
      const double score = scores[roi * classes + category];
      if (!(score >= options.score_threshold)) {
        break;
      }
      int covered = 0;
      for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
        covered |= overlap(boxes + 4 * mine[k], boxes + 4 * roi) > options.nms_threshold;
      }
      if (!__syncthreads_or(covered)) {
        if (threadIdx.x == 0) {
          mine[count] = roi;
          my_scores[count] = score;
        }
        ++count;
      }
      __syncthreads();
    }
  }
}

struct Candidates {
  const int64_t* rois;
  const double* weights;
  int64_t count;
};

__device__ PixelBox box_of(int64_t roi, const double* edges, const VotingOptions& options) {
  return to_pixels(edges + 4 * roi, options.procedure != kChainercv);
}

// One pixel of the weighted sum of the candidates' binarised masks.
__device__ double canvas_at(int32_t x, int32_t y, const Candidates& candidates, const double* masks,
                            const double* edges, const VotingOptions& options) {
  const int32_t size = options.size;
  double sum = 0;
  for (int64_t i = 0; i < candidates.count; ++i) {
    const int64_t roi = candidates.rois[i];
    const PixelBox box = box_of(roi, edges, options);
    if (x < box.left || x >= box.right || y < box.top || y >= box.bottom) {
      continue;
    }
    const Sample row = sample_at(y - box.top, static_cast<double>(size) / (box.bottom - box.top), 0, 0, size - 1);
    const Sample column = sample_at(x - box.left, static_cast<double>(size) / (box.right - box.left), 0, 0, size - 1);
    const double* mask = masks + roi * size * size;
    const double before =
        mix(mask[row.before * size + column.before], mask[row.after * size + column.before], row.share);
    const double after = mix(mask[row.before * size + column.after], mask[row.after * size + column.after], row.share);
    if (mix(before, after, column.share) >= options.binary_threshold) {
      sum += candidates.weights[i];
    }
  }
  return sum;
}

// `chosen` (M,) are RoIs, -1 for none; `categories` (M,) their classes. `rois` and `weights` (M, R) are space.
__global__ void vote(const double* masks, const double* edges, const double* boxes, const double* scores,
                     const int64_t* chosen, const int64_t* categories, int64_t rois, int64_t classes,
                     VotingOptions options, int64_t* space, double* weights, double* voted_boxes, double* voted_masks,
                     double* voted_scores, int64_t* dropped) {
  __shared__ int64_t count;
  __shared__ int32_t extent[4];  // left, top, right, bottom, ends included
  __shared__ int32_t area[4];    // of all candidates, ends excluded
  for (int64_t result = blockIdx.x; result < options.max_detections; result += gridDim.x) {
    const int64_t roi = chosen[result], category = categories[result];
    if (roi < 0) {  // the same in every thread
      continue;
    }
    int64_t* mine = space + result * rois;
    double* my_weights = weights + result * rois;
    for (int64_t r = threadIdx.x; r < rois; r += blockDim.x) {
      mine[r] = overlap(boxes + 4 * roi, boxes + 4 * r) >= options.merge_threshold;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      count = 0;
      double sum = 0;
      area[0] = options.width;
      area[1] = options.height;
      area[2] = area[3] = 0;
      extent[0] = extent[1] = INT32_MAX;
      extent[2] = extent[3] = -1;
      for (int64_t r = 0; r < rois; ++r) {
        if (mine[r]) {
          const PixelBox box = box_of(r, edges, options);
          area[0] = min(area[0], max(box.left, 0));
          area[1] = min(area[1], max(box.top, 0));
          area[2] = max(area[2], min(box.right, options.width));
          area[3] = max(area[3], min(box.bottom, options.height));
          my_weights[count] = scores[r * classes + category];
          sum += my_weights[count];
          mine[count++] = r;  // never behind the place that is read
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        my_weights[i] /= sum;
      }
    }
    __syncthreads();
    const Candidates candidates{mine, my_weights, count};
    const int32_t width = max(area[2] - area[0], 0);
    const int64_t pixels = static_cast<int64_t>(width) * max(area[3] - area[1], 0);
    for (int64_t i = threadIdx.x; i < pixels; i += blockDim.x) {
      const int32_t x = area[0] + static_cast<int32_t>(i % width), y = area[1] + static_cast<int32_t>(i / width);
      if (canvas_at(x, y, candidates, masks, edges, options) >= options.binary_threshold - kRounding) {
        atomicMin(&extent[0], x);
        atomicMin(&extent[1], y);
        atomicMax(&extent[2], x);
        atomicMax(&extent[3], y);
      }
    }
    __syncthreads();
    const bool empty = extent[2] < 0;
    const bool thin = !empty && (extent[0] == extent[2] || extent[1] == extent[3]);
    const bool drop = (empty && options.procedure != kCpu) || (thin && options.procedure == kGpu);
    const int32_t left = empty ? options.width / 2 : extent[0], top = empty ? options.height / 2 : extent[1];
    const int32_t right = empty ? left : extent[2], bottom = empty ? top : extent[3];
    const bool outside = options.procedure == kGpu;
    const int32_t size = options.size;
    for (int32_t i = threadIdx.x; i < size * size && !drop; i += blockDim.x) {
      const Sample row = sample_at(i / size, static_cast<double>(bottom - top + 1) / size, top, outside ? 0 : top,
                                   outside ? options.height - 1 : bottom);
      const Sample column = sample_at(i % size, static_cast<double>(right - left + 1) / size, left, outside ? 0 : left,
                                      outside ? options.width - 1 : right);
      const double before = mix(canvas_at(column.before, row.before, candidates, masks, edges, options),
                                canvas_at(column.before, row.after, candidates, masks, edges, options), row.share);
      const double after = mix(canvas_at(column.after, row.before, candidates, masks, edges, options),
                               canvas_at(column.after, row.after, candidates, masks, edges, options), row.share);
      voted_masks[result * size * size + i] = mix(before, after, column.share);
    }
    if (threadIdx.x == 0 && !drop) {
      const double end = options.procedure == kChainercv ? 1 : 0;
      voted_boxes[4 * result] = left;
      voted_boxes[4 * result + 1] = top;
      voted_boxes[4 * result + 2] = right + end;
      voted_boxes[4 * result + 3] = bottom + end;
      voted_scores[result] = scores[roi * classes + category];
      dropped[result] = 0;
    }
    __syncthreads();
  }
}

MaskVotingResult mask_voting_cuda(const Tensor& masks, const Tensor& boxes, const Tensor& scores, int64_t height,
                                  int64_t width, double nms_threshold, double merge_threshold, double binary_threshold,
                                  double score_threshold, int64_t max_detections, int64_t procedure) {
  const VotingOptions options = check_mask_voting(masks, boxes, scores, height, width, nms_threshold, merge_threshold,
                                                  binary_threshold, score_threshold, max_detections, procedure);
  const c10::cuda::CUDAGuard guard(masks.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int64_t rois = masks.size(0), classes = scores.size(1), limit = max_detections;
  const auto real = boxes.options().dtype(at::kDouble), whole = boxes.options().dtype(at::kLong);
  const Tensor voted_boxes = at::zeros({limit, 4}, real), voted_scores = at::zeros({limit}, real);
  const Tensor voted_masks = at::zeros({limit, options.size, options.size}, real);
  Tensor voted_classes = at::full({limit}, -1, whole);
  const Tensor dropped = at::full({limit}, 1, whole);
  if (rois == 0 || classes < 2) {
    return {voted_boxes.to(boxes.scalar_type()), voted_scores.to(scores.scalar_type()), voted_classes,
            voted_masks.to(masks.scalar_type()), at::zeros({}, whole)};
  }
  const Tensor exact_masks = masks.to(at::kDouble).contiguous(), exact_scores = scores.to(at::kDouble).contiguous();
  const Tensor edges = boxes.to(at::kDouble).contiguous();
  const Tensor extended = edges.clone();
  if (procedure != kChainercv) {
    extended.slice(1, 2, 4).add_(1);
  }
  const Tensor by_class = exact_scores.slice(1, 1, classes).t();
  const Tensor order = std::get<1>(at::sort(by_class, /*stable=*/true, /*dim=*/1, /*descending=*/true)).contiguous();
  const Tensor kept = at::full({classes - 1, limit}, -1, whole);
  const Tensor kept_scores = at::full({classes - 1, limit}, -1.0, real);
  suppress<<<static_cast<unsigned>(std::min(classes - 1, kMostBlocks)), kThreads, 0, stream>>>(
      extended.const_data_ptr<double>(), exact_scores.const_data_ptr<double>(), order.const_data_ptr<int64_t>(), rois,
      classes, options, kept.data_ptr<int64_t>(), kept_scores.data_ptr<double>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  // The best of all classes, then by class again; those that are none come last.
  const auto ranked = at::sort(kept_scores.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const Tensor best = std::get<1>(ranked).slice(0, 0, limit);
  const Tensor none = at::full({}, kept.numel(), whole);
  const Tensor place = std::get<0>(at::where(std::get<0>(ranked).slice(0, 0, limit).lt(0), none, best).sort());
  const Tensor found = place.lt(kept.numel());
  const Tensor safe = place.clamp_max(kept.numel() - 1);
  const Tensor chosen = at::where(found, kept.flatten().index_select(0, safe), at::full({}, -1, whole)).contiguous();
  const Tensor categories = safe.div(limit, "floor").add(1).contiguous();

  const Tensor space = at::empty({limit, rois}, whole), weights = at::empty({limit, rois}, real);
  vote<<<static_cast<unsigned>(std::min(limit, kMostBlocks)), kThreads, 0, stream>>>(
      exact_masks.const_data_ptr<double>(), edges.const_data_ptr<double>(), extended.const_data_ptr<double>(),
      exact_scores.const_data_ptr<double>(), chosen.const_data_ptr<int64_t>(), categories.const_data_ptr<int64_t>(),
      rois, classes, options, space.data_ptr<int64_t>(), weights.data_ptr<double>(), voted_boxes.data_ptr<double>(),
      voted_masks.data_ptr<double>(), voted_scores.data_ptr<double>(), dropped.data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  // Rows that are left out go behind the others; they hold zeros.
  const Tensor rows = std::get<1>(at::sort(dropped, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  voted_classes = at::where(dropped.eq(0), categories, voted_classes).index_select(0, rows);
  return {voted_boxes.index_select(0, rows).to(boxes.scalar_type()),
          voted_scores.index_select(0, rows).to(scores.scalar_type()), voted_classes,
          voted_masks.index_select(0, rows).to(masks.scalar_type()), dropped.eq(0).sum()};
}

}  // namespace

TORCH_LIBRARY_IMPL(convmask, CUDA, library) { library.impl("mask_voting", mask_voting_cuda); }

}  // namespace convmask
