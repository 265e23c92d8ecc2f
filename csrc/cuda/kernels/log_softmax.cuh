// log_softmax and its backward: each input is read once where the row fits the chip, and the output written once.
#pragma once

#include "cross_entropy_planes.cuh"

namespace nllx {

// The vectors of a row that a thread of `threads` holds in registers.
template <typename T>
struct RegisterRow {
  static constexpr int kVectors = register_vectors(sizeof(T)), kSize = Vector<T>::kSize;
  Vector<T> values[kVectors];
  int past, lane, threads;

  __device__ __forceinline__ RegisterRow(const T* row, int classes, int lane, int threads)
      : past(elements_past_boundary(row)), lane(lane), threads(threads) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) values[j] = load_vector(row, first(j), classes);
  }
  __device__ __forceinline__ int first(int j) const { return (lane + j * threads) * kSize - past; }
};

// Unit of work: a row by `threads_per_row` threads of a warp, which hold it in registers. Reads each input once.
// Preconditions as cross_entropy_register_rows_kernel's. Plan: CudaFamily::kRegisterRows of CudaOp::kLogSoftmax.
template <typename T>
__global__ void __launch_bounds__(kRegisterThreads, resident<T>(6, 4, 2))
    log_softmax_forward_register_rows_kernel(LogSoftmaxForward p, int threads_per_row) {
  using acc = typename AccOf<T>::type;
  using Row = RegisterRow<T>;
  const int lane = threadIdx.x % threads_per_row, rows_at_once = kRegisterThreads / threads_per_row;
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t rows = p.extent.rows();
  // Every thread stays in the loop until the block's rows are done: the shuffles need whole warps.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    int64_t outer = 0, inner = 0;
    if (row < rows) split_row(p.extent, row, outer, inner);
    const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner * p.input_strides.inner;
    const Row values(x, row < rows ? classes : 0, lane, threads_per_row);
    RowState<acc> s = RowState<acc>::empty();
    Vector<T> largest = values.values[0];
#pragma unroll
    for (int j = 1; j < Row::kVectors; ++j) largest = larger(largest, values.values[j]);
    s.max = max_in_warp(larger(s.max, largest_of(largest)), threads_per_row);
    const acc m = finite_max(s.max);
    const Exponentials<T> exponentials(m);
#pragma unroll
    for (int j = 0; j < Row::kVectors; ++j) {
      acc part = 0;
#pragma unroll
      for (int i = 0; i < Row::kSize; ++i) part += exponentials(values.values[j][i]);
      s.sum += part;
    }
    s.sum = exponentials.normalized(sum_in_warp(s.sum, threads_per_row), m);
    if (row >= rows) continue;
    const RowStats<acc> stats = s.stats();
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    const bool aligned = values.past == elements_past_boundary(y);
#pragma unroll
    for (int j = 0; j < Row::kVectors; ++j) {
      const Vector<T> out = Vector<T>::of([&](int i) { return (values.values[j][i] - stats.max) - stats.log_sum; });
      if (values.first(j) < classes) store_vector(y, values.first(j), classes, out, aligned);
    }
  }
}

// gradient = g - exp(y) Σ g. As above; y is read where g is, in single elements where they are not equally aligned.
template <typename T>
__global__ void __launch_bounds__(kRegisterThreads, resident<T>(4, 2, 2))
    log_softmax_backward_register_rows_kernel(LogSoftmaxBackward p, int threads_per_row) {
  using acc = typename AccOf<T>::type;
  using Row = RegisterRow<T>;
  const int lane = threadIdx.x % threads_per_row, rows_at_once = kRegisterThreads / threads_per_row;
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t rows = p.extent.rows();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    int64_t outer = 0, inner = 0;
    if (row < rows) split_row(p.extent, row, outer, inner);
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer +
                 inner * p.grad_output_strides.inner;
    const T* y = static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner * p.grad_input_strides.inner;
    const Row gs(g, row < rows ? classes : 0, lane, threads_per_row);
    const bool together = gs.past == elements_past_boundary(y), aligned = gs.past == elements_past_boundary(grad);
    Vector<T> ys[Row::kVectors];
#pragma unroll
    for (int j = 0; j < Row::kVectors; ++j) {
      if (together) {
        ys[j] = load_vector(y, gs.first(j), row < rows ? classes : 0);
      } else {
#pragma unroll
        for (int i = 0; i < Row::kSize; ++i) {
          const int c = gs.first(j) + i;
          ys[j].set_element(i, row < rows && c >= 0 && c < classes ? y[c] : minus_infinity_of<T>());
        }
      }
    }
    acc sum = 0;
#pragma unroll
    for (int j = 0; j < Row::kVectors; ++j) {
      acc part = 0;
#pragma unroll
      for (int i = 0; i < Row::kSize; ++i) {
        const int c = gs.first(j) + i;
        if (c >= 0 && c < classes) part += gs.values[j][i];
      }
      sum += part;
    }
    sum = sum_in_warp(row < rows ? sum : acc(0), threads_per_row);
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < Row::kVectors; ++j) {
      const Vector<T> out = Vector<T>::of([&](int i) { return gs.values[j][i] - exp_of_many(ys[j][i]) * sum; });
      if (gs.first(j) < classes) store_vector(grad, gs.first(j), classes, out, aligned);
    }
  }
}

// Unit of work: a row by a block, or by the blocks of a cluster, each a part. The first `kept` vectors of the part stay
// in dynamic shared memory; the rest is read again. Preconditions: class stride 1,
// and whole clusters in the grid. Plan: CudaFamily::kBlockRows of CudaOp::kLogSoftmax.
template <typename T>
__global__ void __launch_bounds__(256, resident<T>(3, 2, 1))
    log_softmax_forward_block_rows_kernel(LogSoftmaxForward p, int kept, int ahead) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  DYNAMIC_SHARED(memory);
  const Keep<T, kStateVectors<T, false>> read{reinterpret_cast<Vector<T>*>(memory), kept, ahead};
  SHARED_ARRAY(RowState<acc>, states, 32);
  SHARED_ARRAY(RowState<acc>, slots, 2 * kMostClusterBlocks);
  ClusterParts<RowState<acc>> cluster(slots);
  const int64_t rows = p.extent.rows(), threads = blockDim.x;
  for (int64_t row = blockIdx.x / cluster.blocks; row < rows; row += gridDim.x / cluster.blocks) {
    int64_t outer, inner;
    split_row(p.extent, row, outer, inner);
    const ClassRange mine(p.extent.classes, cluster.blocks, cluster.rank, kSize);
    const int64_t classes = mine.end - mine.begin;
    const T* x =
        static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner * p.input_strides.inner + mine.begin;
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner + mine.begin;
    const RowVectors<T> part(x, classes);
    const bool aligned = elements_past_boundary(x) == elements_past_boundary(y);
    RowState<acc> s = state_of_row<T, false>(x, classes, 0, ClassTerms<T>(Targets(), classes, 0, 0), read);
    merge_in_block(s, states);
    if (cluster.blocks > 1) s = merge_parts(cluster.exchange(s), cluster.blocks);
    const RowStats<acc> stats = s.stats();
    const auto output = [&](T value) { return from_acc<T>((to_acc(value) - stats.max) - stats.log_sum); };
    for_kept(part, read, true, x, [&](int64_t c, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
      for (int j = 0; j < kStateVectors<T, false>; ++j) {
        const int64_t at = c + j * 32 * kSize;
        const Vector<T> out = Vector<T>::of([&](int i) { return (vectors[j][i] - stats.max) - stats.log_sum; });
        if (at < tail) store_whole_vector(y + at, out, aligned);
      }
    });
    for (int64_t c = threadIdx.x; c < part.head; c += threads) y[c] = output(x[c]);
    for (int64_t c = part.tail + threadIdx.x; c < classes; c += threads) y[c] = output(x[c]);
  }
}

template <typename T>
__global__ void __launch_bounds__(256, resident<T>(3, 3, 1))
    log_softmax_backward_block_rows_kernel(LogSoftmaxBackward p, int kept, int ahead) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  DYNAMIC_SHARED(memory);
  constexpr int kCount = kVectorsAtOnce;
  const Keep<T, kCount> read{reinterpret_cast<Vector<T>*>(memory), kept, ahead};
  SHARED_ARRAY(acc, scratch, 32);
  SHARED_ARRAY(acc, slots, 2 * kMostClusterBlocks);
  ClusterParts<acc> cluster(slots);
  const int64_t rows = p.extent.rows(), threads = blockDim.x;
  for (int64_t row = blockIdx.x / cluster.blocks; row < rows; row += gridDim.x / cluster.blocks) {
    int64_t outer, inner;
    split_row(p.extent, row, outer, inner);
    const ClassRange mine(p.extent.classes, cluster.blocks, cluster.rank, kSize);
    const int64_t classes = mine.end - mine.begin;
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer +
                 inner * p.grad_output_strides.inner + mine.begin;
    const T* y =
        static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner + mine.begin;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner * p.grad_input_strides.inner +
              mine.begin;
    const int past = elements_past_boundary(g);
    const RowVectors<T> part(g, classes);
    const bool together = past == elements_past_boundary(y), aligned = past == elements_past_boundary(grad);
    acc sum = 0;
    read(
        g, classes, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
        [&](int64_t, T element) { sum += to_acc(element); },
        [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            if (c + j * step >= tail) continue;
            acc part = 0;
#pragma unroll
            for (int i = 0; i < kSize; ++i) part += vectors[j][i];
            sum += part;
          }
        });
    sum = sum_in_block(sum, scratch);
    if (cluster.blocks > 1) {
      const acc* const sums = cluster.exchange(sum);
      sum = sums[0];
      for (int i = 1; i < cluster.blocks; ++i) sum += sums[i];
    }
    const auto gradient = [&](T g, T y) { return from_acc<T>(to_acc(g) - exp_of_many(to_acc(y)) * sum); };
    for_kept(part, read, true, g, [&](int64_t c, int64_t tail, const Vector<T>* gs) {
      Vector<T> ys[kCount];  // all loads before the first store
      if (together) {
        Batch<T, kCount> batch;
        batch.load(y, c, 32 * kSize, tail);
#pragma unroll
        for (int j = 0; j < kCount; ++j) ys[j] = batch.vectors[j];
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const int64_t at = c + j * 32 * kSize;
#pragma unroll
          for (int i = 0; i < kSize; ++i) ys[j].set_element(i, at < tail ? y[at + i] : minus_infinity_of<T>());
        }
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int64_t at = c + j * 32 * kSize;
        const Vector<T> out = Vector<T>::of([&](int i) { return gs[j][i] - exp_of_many(ys[j][i]) * sum; });
        if (at < tail) store_whole_vector(grad + at, out, aligned);
      }
    });
    for (int64_t c = threadIdx.x; c < part.head; c += threads) grad[c] = gradient(g[c], y[c]);
    for (int64_t c = part.tail + threadIdx.x; c < classes; c += threads) grad[c] = gradient(g[c], y[c]);
  }
}

// Unit of work: a tile of neighbouring rows of one plane; threads beyond `side` take every so many classes. The input
// is read again for the output, soon after. Precondition: inner stride 1. Plan: CudaFamily::kPlanes.
template <typename T>
__global__ void __launch_bounds__(kPlaneThreads, 1) log_softmax_forward_planes_kernel(LogSoftmaxForward p, int side) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(RowState<acc>, parts, kPlaneThreads);
  const PlaneTile where(p.extent, side, 1);
  const int64_t classes = p.extent.classes;
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    const bool exists = inner < p.extent.inner;
    const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner;
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner;
    RowState<acc> s = RowState<acc>::empty();
    if (exists)
      states_of_columns<T, 1, false>(x, p.input_strides.classes, classes, where.part, where.parts,
                                     ClassTerms<T>(Targets(), classes, 0, 0), &s);
    if (where.parts > 1) {
      __syncthreads();  // the parts of the tile before may still be read
      parts[threadIdx.x] = s;
      __syncthreads();  // all parts are there
      s = parts[threadIdx.x % side];
      for (int i = 1; i < where.parts; ++i) s.merge(parts[i * side + threadIdx.x % side]);
    }
    if (!exists) continue;
    const RowStats<acc> stats = s.stats();
    for (int64_t c = where.part; c < classes; c += where.parts) {
      y[c * p.output_strides.classes] =
          from_acc<T>((to_acc(x[c * p.input_strides.classes]) - stats.max) - stats.log_sum);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlaneThreads, 1) log_softmax_backward_planes_kernel(LogSoftmaxBackward p, int side) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(acc, parts, kPlaneThreads);
  const PlaneTile where(p.extent, side, 1);
  const int64_t classes = p.extent.classes;
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    const bool exists = inner < p.extent.inner;
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer + inner;
    const T* y = static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner;
    acc sum = 0;
    if (exists) {
      const int64_t step = static_cast<int64_t>(64) * where.parts;
      for (int64_t start = where.part; start < classes; start += step) {  // blocks: fewer additions to a large sum
        acc block = 0;
#pragma unroll 4
        for (int64_t c = start; c < classes && c < start + step; c += where.parts)
          block += to_acc(g[c * p.grad_output_strides.classes]);
        sum += block;
      }
    }
    if (where.parts > 1) {
      __syncthreads();  // the sums of the tile before may still be read
      parts[threadIdx.x] = sum;
      __syncthreads();  // all sums are there
      sum = parts[threadIdx.x % side];
      for (int i = 1; i < where.parts; ++i) sum += parts[i * side + threadIdx.x % side];
    }
    if (!exists) continue;
    for (int64_t c = where.part; c < classes; c += where.parts) {
      const acc softmax = exp_of_many(to_acc(y[c * p.output_strides.classes]));
      grad[c * p.grad_input_strides.classes] =
          from_acc<T>(to_acc(g[c * p.grad_output_strides.classes]) - softmax * sum);
    }
  }
}

}  // namespace nllx
