// The gradient of the logits from the statistics that the forward has saved, in one read of the logits and one write.
#pragma once

#include "cross_entropy_planes.cuh"

namespace nllx {

// Blocks of the kernel below that share a multiprocessor.
template <typename T, bool kTerms>
constexpr int kBackwardBlocks = kTerms || sizeof(T) == 8 ? 2 : 3;

// Unit of work: a row by `threads_per_row` threads, or a part of one by each of `splits` blocks. 16-byte reads at any
// alignment, kVectorsAtOnce of a thread in flight, and 16-byte writes where gradient and logits are equally aligned.
// Preconditions: class stride 1; threads_per_row is a power of two, and the whole block where splits is not 1. Plan:
// CudaFamily::kBlockRows of CudaOp::kBackward.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(256, kBackwardBlocks<T, kTerms>)
    cross_entropy_backward_rows_kernel(CrossEntropyBackward p, int threads_per_row, int splits, const void* mass,
                                       BadTarget* bad) {
  constexpr int kSize = Vector<T>::kSize, kAtOnce = kTerms || sizeof(T) == 8 ? kVectorsAtOnce / 2 : kVectorsAtOnce;
  const int shift = log2_of(threads_per_row), t = static_cast<int>(threadIdx.x) & (threads_per_row - 1);
  const int rows_at_once = static_cast<int>(blockDim.x) >> shift;
  const int64_t rows = p.extent.rows();
  for (int64_t unit = blockIdx.x;; unit += gridDim.x) {
    const int64_t group = splits == 1 ? unit : unit / splits;
    const int part = static_cast<int>(unit - group * splits);
    const int64_t row = group * rows_at_once + (static_cast<int>(threadIdx.x) >> shift);
    if (row >= rows) break;
    int64_t outer, inner;
    split_row(p.extent, row, outer, inner);
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    const ClassRange mine =
        splits == 1 ? ClassRange(p.extent.classes) : ClassRange(p.extent.classes, splits, part, kSize);
    x += mine.begin;
    grad += mine.begin;
    ClassReader<T, kAtOnce> reader(x, mine.end - mine.begin, t, threads_per_row);
    const RowGradient<T> gradient = saved_row_gradient<T>(p, row, outer, inner, mass, t == 0 && part == 0, bad, kTerms);
    const bool aligned = elements_past_boundary(x) == elements_past_boundary(grad);
    // The target once for the row: in each vector it would keep a warp waiting for one thread. Its logit is read before
    // the gradient may be written over it.
    const int64_t target = gradient.target - mine.begin;
    const bool takes_target = gradient.target >= 0 && reader.takes(target);
    const T target_logit = takes_target ? x[target] : T();
    reader.each([&](int64_t c, T value) { grad[c] = from_acc<T>(gradient(to_acc(value), mine.begin + c)); },
                [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
                  for (int j = 0; j < kAtOnce; ++j) {
                    const int64_t at = c + j * step;
                    if (at < tail)
                      store_whole_vector(grad + at, gradient.beside_target(vectors[j], mine.begin + at), aligned);
                  }
                });
    if (takes_target) grad[target] = from_acc<T>(gradient(to_acc(target_logit), gradient.target));
  }
}

// Unit of work: kTileThreads neighbouring rows by a block, a thread each, in dynamic shared memory, into which the
// logits of the `ahead` tiles that it takes next are on their way. Preconditions: dense rows, of logits and gradient,
// of at most most_tile_classes. Plan: CudaFamily::kTileRows.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(kTileThreads, resident<T>(8, 8, 4))
    cross_entropy_backward_tile_rows_kernel(CrossEntropyBackward p, int ahead, const void* mass, BadTarget* bad) {
  DYNAMIC_SHARED(memory);
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t rows = p.extent.rows(), step = static_cast<int64_t>(gridDim.x) * kTileThreads;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTileThreads;
  const T* logits = static_cast<const T*>(p.logits);
  const int past = elements_past_boundary(logits);
  TileRing<T> ring(memory, classes, past, ahead);
  const auto elements = [&](int64_t first) {
    return first < rows ? static_cast<int>(rows - first < kTileThreads ? rows - first : kTileThreads) * classes : 0;
  };
  const auto copy = [&](int64_t first) { ring.copy(logits + first * classes, elements(first)); };
  for (int i = 0; i < ahead; ++i) copy(begin + i * step);
  for (int64_t first = begin; first < rows; first += step) {
    const int64_t row = first + threadIdx.x;
    const int n = elements(first);
    Vector<T>* const tile = ring.next([&] { copy(first + ahead * step); });
    if (row < rows) {
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const TileRow<T, kTerms> x(tile, past, classes);
      x.become(saved_row_gradient<T>(p, row, outer, inner, mass, true, bad, kTerms));
    }
    __syncthreads();  // the gradient is there
    store_tile(static_cast<T*>(p.grad_logits) + first * classes, n, tile, past);
  }
}

// Unit of work: a tile of neighbouring rows of one plane, kRows to a thread; threads beyond `side` take every so many
// classes. Preconditions as cross_entropy_planes_kernel's, for logits and gradient. Plan: CudaFamily::kPlanes.
template <typename T, int kRows>
__global__ void __launch_bounds__(kPlaneThreads, kRows == 1 ? 3 : 2)
    cross_entropy_backward_planes_kernel(CrossEntropyBackward p, int side, const void* mass, BadTarget* bad) {
  constexpr int kAtOnce = 8;
  const PlaneTile where(p.extent, side, kRows);
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, kRows, outer, inner);
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner;
    const int64_t row = outer * p.extent.inner + inner;
    using acc = typename AccOf<T>::type;
    if (kRows == 1) {
      const RowGradient<T> gradient =
          saved_row_gradient<T>(p, row, outer, inner, mass, where.part == 0, bad, has_terms(p.targets));
#pragma unroll 4
      for (int64_t c = where.part; c < p.extent.classes; c += where.parts) {
        grad[c * p.grad_strides.classes] = from_acc<T>(gradient(to_acc(x[c * p.logits_strides.classes]), c));
      }
    } else {  // index targets without smoothing: what differs between the rows, in registers
      acc max[kRows], ka[kRows], target_term[kRows];
      int64_t target[kRows];
      unsigned counting = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const RowGradient<T> gradient = saved_row_gradient<T>(p, row + i, outer, inner + i, mass, true, bad, false);
        max[i] = gradient.max;
        ka[i] = gradient.ka;
        counting |= static_cast<unsigned>(gradient.counts) << i;
        target_term[i] = gradient.k * gradient.target_term;
        // A weight of zero: k may be infinite.
        target[i] = gradient.counts && gradient.target_term != acc(0) ? gradient.target : -1;
      }
      for (int64_t start = 0; start < p.extent.classes; start += kAtOnce) {
        Neighbours<T, kRows> v[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (start + j < p.extent.classes)
            v[j] = Neighbours<T, kRows>::load(x + (start + j) * p.logits_strides.classes);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (start + j >= p.extent.classes) break;
          store_neighbours<T, kRows>(grad + (start + j) * p.grad_strides.classes, [&](int i) {
            acc g = ka[i] * exp_of_many(v[j][i] - max[i]);
            if (start + j == target[i]) g -= target_term[i];
            return counting >> i & 1 ? g : acc(0);
          });
        }
      }
    }
  }
}

// A of each row, for probability targets, which need not sum to one. Units of work as above; `threads_per_row` up to
// 32, or the whole block.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    probability_mass_rows_kernel(Extent extent, Targets targets, int threads_per_row, void* mass) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(acc, scratch, 32);
  const int t = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = extent.rows();
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    acc sum = 0;
    if (row < rows) {
      int64_t outer, inner;
      split_row(extent, row, outer, inner);
      const ClassTerms<T> terms(targets, extent.classes, outer, inner);
      for (int64_t c = t; c < extent.classes; c += threads_per_row) sum += terms(c);
    }
    sum = threads_per_row <= 32 ? sum_in_warp(sum, threads_per_row) : sum_in_block(sum, scratch);
    if (row < rows && t == 0) static_cast<acc*>(mass)[row] = sum;
  }
}
template <typename T>
__global__ void __launch_bounds__(256, 1) probability_mass_planes_kernel(Extent extent, Targets targets, void* mass) {
  using acc = typename AccOf<T>::type;
  const int64_t tiles = (extent.inner + blockDim.x - 1) / blockDim.x;
  for (int64_t tile = blockIdx.x; tile < extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= extent.inner) continue;
    const ClassTerms<T> terms(targets, extent.classes, outer, inner);
    acc sum = 0;
    for (int64_t start = 0; start < extent.classes; start += 64) {  // in blocks: fewer additions to a large sum
      acc block = 0;
      for (int64_t c = start; c < extent.classes && c < start + 64; ++c) block += terms(c);
      sum += block;
    }
    static_cast<acc*>(mass)[outer * extent.inner + inner] = sum;
  }
}

}  // namespace nllx
