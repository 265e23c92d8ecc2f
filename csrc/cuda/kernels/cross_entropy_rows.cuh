// Loss and statistics of rows whose classes are adjacent in memory, in one read of the logits; and their gradient in
// the same pass, if asked for, in place if it lies where the logits do.
#pragma once

#include "loss_sum.cuh"
#include "row_gradient.cuh"

namespace nllx {

template <typename T>
__device__ __forceinline__ IndexTarget<typename AccOf<T>::type> row_target(const CrossEntropyForward& p, int64_t row) {
  using acc = typename AccOf<T>::type;
  return p.targets.index ? index_target<acc>(p.targets, p.extent.classes, row)
                         : IndexTarget<acc>{0, true, false, acc(1)};
}

// The same in two steps, so that an index can be loaded long before it is needed.
template <typename T>
__device__ __forceinline__ IndexTarget<typename AccOf<T>::type> row_target_of(const CrossEntropyForward& p,
                                                                              int64_t index) {
  using acc = typename AccOf<T>::type;
  return p.targets.index ? target_of_index<acc>(p.targets, p.extent.classes, index)
                         : IndexTarget<acc>{0, true, false, acc(1)};
}
__device__ __forceinline__ int64_t row_index(const CrossEntropyForward& p, int64_t row) {
  return p.targets.index ? load_index(p.targets.index, p.targets.index_type, row) : int64_t(0);
}

// Writes what one thread knows of a whole row, and adds its loss.
template <typename T, bool kTerms>
__device__ __forceinline__ void finish_row(const CrossEntropyForward& p, int64_t row,
                                           const RowState<typename AccOf<T>::type>& s,
                                           const IndexTarget<typename AccOf<T>::type>& y,
                                           typename AccOf<T>::type target_logit, BadTarget* bad, LossTerms& sum) {
  using acc = typename AccOf<T>::type;
  RowStats<acc> stats{0, 0};
  acc loss = 0;
  if (y.counts) {
    stats = s.stats();
    const acc scale = kTerms ? scale_of<acc>(p.targets) : acc(1);
    loss = row_loss_of(s, stats, kTerms, !kTerms || p.targets.index != nullptr, scale * y.weight, target_logit);
  } else if (y.bad) {
    report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
    minus_infinity(loss);
    loss -= loss;  // NaN
  }
  if (p.row_loss) store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  static_cast<RowStats<acc>*>(p.row_stats)[row] = stats;
  sum.add(loss, y.weight);
}

template <typename T>
__device__ __forceinline__ RowGradient<T> row_gradient(const CrossEntropyForward& p, const CrossEntropyBackward& b,
                                                       int64_t row, int64_t outer, int64_t inner,
                                                       const IndexTarget<typename AccOf<T>::type>& y,
                                                       const RowState<typename AccOf<T>::type>& s, bool coefficients) {
  using acc = typename AccOf<T>::type;
  const acc k = incoming_gradient<acc>(b.grad_output, b.grad_output_stride, b.total_weight, row);
  return RowGradient<T>(p.targets, p.extent.classes, outer, inner, y, s.mass, k, s.stats(), coefficients);
}

// Tiles of kTileThreads neighbouring rows of a dense array in shared memory, 16 bytes at a time, in a ring of `ahead` +
// 1 slots: while a block works on one, the next ones are on their way. A tile lies as far past a 16-byte boundary in
// its slot as it does in the array, and as do the others, since they are of whole vectors.
template <typename T>
class TileRing {
 public:
  __device__ __forceinline__ TileRing(void* memory, int classes, int past, int ahead)
      : slots_(static_cast<Vector<T>*>(memory)),
        slot_vectors_(tile_vectors(classes, sizeof(T))),
        past_(past),
        ahead_(ahead) {}

  // The tile of `n` elements at `rows`, into the next slot; none where n is 0.
  __device__ __forceinline__ void copy(const T* rows, int n) {
    Vector<T>* const tile = slots_ + to_ * slot_vectors_;
    const int end = n > 0 ? n : -past_;
    for (int v = threadIdx.x, i; (i = v * Vector<T>::kSize - past_) < end; v += kTileThreads) {
      if (i >= 0 && i <= n - Vector<T>::kSize) {
        copy_async(tile + v, rows + i);
      } else {
        tile[v] = load_vector(rows, i, n);
      }
    }
    commit_copies();  // of no tile too: groups are counted
    to_ = to_ == ahead_ ? 0 : to_ + 1;
  }

  // The next tile copied is the first of others. Behind a barrier: all threads have used up what came before.
  __device__ __forceinline__ void restart() { from_ = to_; }

  // The oldest tile, for all threads; called by all of them. copy_next() copies the tile that is `ahead` further on.
  template <typename CopyNext>
  __device__ __forceinline__ Vector<T>* next(CopyNext copy_next) {
    if (ahead_ == 0) {
      __syncthreads();  // the tile before may still be read
      copy_next();
    }
    wait_for_copies(ahead_ > 0 ? ahead_ - 1 : 0);
    __syncthreads();  // the tile is there, and the one before is used up
    if (ahead_ > 0) copy_next();
    Vector<T>* const tile = slots_ + from_ * slot_vectors_;
    from_ = from_ == ahead_ ? 0 : from_ + 1;
    return tile;
  }

 private:
  Vector<T>* slots_;
  int slot_vectors_, past_, ahead_, to_ = 0, from_ = 0;
};
// The reverse, from a tile that lies `past` a boundary.
template <typename T>
__device__ __forceinline__ void store_tile(T* rows, int n, const Vector<T>* tile, int past) {
  const bool aligned = past == elements_past_boundary(rows);
  if (aligned) {
    for (int v = threadIdx.x; v * Vector<T>::kSize < n + past; v += kTileThreads)
      store_vector(rows, v * Vector<T>::kSize - past, n, tile[v], true);
  } else {
#pragma unroll 1  // its count of turns would be made ready for every tile, and this is rare
    for (int i = threadIdx.x; i < n; i += kTileThreads) rows[i] = reinterpret_cast<const T*>(tile)[past + i];
  }
}

// A thread takes the classes of its row in a tile in the order i ^ class_turn(), so that no two threads of a warp want
// different words of one of the 32 banks of shared memory at once. As many rows begin in the same bank as the largest
// power of two that divides the words of a row says: each of them takes that many words in another order. Rows that are
// not of whole words begin in different banks, but for halves of a warp, which may meet in pairs.
template <typename T>
__device__ __forceinline__ int class_turn(int classes) {
  constexpr int kBytes = sizeof(T), kWord = kBytes < 4 ? 4 : kBytes, kBanksBytes = 128;
  const int bytes = classes * kBytes, lane = static_cast<int>(threadIdx.x) % (kBanksBytes / kWord);
  return lane * (bytes & -bytes) / kBanksBytes * (kWord / kBytes);
}

// The words of a row in a tile, of which there are kWords, in the order of class_turn: written so that the compiler
// knows all of an address but `turn`, and needs as many as threads meet.
template <int kWords>
struct TileWords {
  static constexpr int kCount = kWords, kMeet = kWords & -kWords;
  uint32_t* row;
  int turn;
  __device__ __forceinline__ uint32_t* at(int j) const { return row + (j % kMeet ^ turn) + j / kMeet * kMeet; }
};

// Calls use(TileWords<n>), for n from kLeast to kMost.
template <int kLeast, int kMost, typename Use>
__device__ __forceinline__ void with_words(uint32_t* row, int turn, int n, Use use) {
  if constexpr (kLeast == kMost) {
    use(TileWords<kMost>{row, turn});
  } else {
    constexpr int kHalf = (kLeast + kMost) / 2;
    if (n <= kHalf) {
      with_words<kLeast, kHalf>(row, turn, n, use);
    } else {
      with_words<kHalf + 1, kMost>(row, turn, n, use);
    }
  }
}

// What a thread does with its row of a tile, which lies `past` a 16-byte boundary. Up to kMostWords 32-bit words,
// without coefficients, are code for as many: no loop, and the row in registers.
template <typename T, bool kTerms>
class TileRow {
  using acc = typename AccOf<T>::type;

 public:
  __device__ __forceinline__ TileRow(Vector<T>* tile, int past, int classes)
      : x_(reinterpret_cast<T*>(tile) + past + static_cast<int>(threadIdx.x) * classes),
        classes_(classes),
        turn_(class_turn<T>(classes)),
        few_words_(sizeof(T) == 2 ? ((past | classes) & 1) == 0 : classes <= kMostWords) {}

  __device__ __forceinline__ acc operator[](int64_t c) const { return to_acc(x_[c]); }

  __device__ __forceinline__ RowState<acc> state(const ClassTerms<T>& a) const {
    RowState<acc> s = RowState<acc>::empty();
    if constexpr (kWords) {
      if (few_words_) {
        with_words([&](auto row) {
          constexpr int kCount = decltype(row)::kCount;
          uint32_t words[kCount];
#pragma unroll
          for (int j = 0; j < kCount; ++j) words[j] = read_shared(row.at(j));
          uint32_t largest = words[0];
#pragma unroll
          for (int j = 1; j < kCount; ++j) largest = larger_word<T>(largest, words[j]);
#pragma unroll
          for (int i = 0; i < kOfWord; ++i) s.max = larger(s.max, of_word<T>(largest, i));
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
#pragma unroll
            for (int i = 0; i < kOfWord; ++i) s.template add_below_max<false>(of_word<T>(words[j], i), acc(0));
          }
        });
        return s;
      }
    }
    for_classes([&](int c) { s.max = larger(s.max, to_acc(read_shared(x_ + c))); });
    for_classes([&](int c) { s.template add_below_max<kTerms>(to_acc(read_shared(x_ + c)), kTerms ? a(c) : acc(0)); });
    return s;
  }

  // Overwrites the row. The target comes last, so that no other class is compared with it.
  __device__ __forceinline__ void become(const RowGradient<T>& gradient) const {
    T of_target;
    if (gradient.target >= 0) of_target = from_acc<T>(gradient((*this)[gradient.target], gradient.target));
    overwrite(gradient);
    if (gradient.target >= 0) x_[gradient.target] = of_target;
  }

 private:
  static constexpr bool kWords = sizeof(T) <= 4 && !kTerms;
  static constexpr int kOfWord = kWords ? 4 / sizeof(T) : 1, kMostWords = kMostTileClasses / 2;
  T* x_;
  int classes_, turn_;
  bool few_words_;

  // In the order of class_turn, which costs nothing where there is none.
  template <typename Use>
  __device__ __forceinline__ void for_classes(Use use) const {
    constexpr int kWordBytes = sizeof(T) < 4 ? 4 : sizeof(T);
    if (classes_ * static_cast<int>(sizeof(T)) % (2 * kWordBytes) == 0) {
      for (int i = 0; i < classes_; ++i) use(i ^ turn_);
    } else {
      for (int c = 0; c < classes_; ++c) use(c);
    }
  }

  template <typename Use>
  __device__ __forceinline__ void with_words(Use use) const {
    nllx::with_words<1, kMostWords>(reinterpret_cast<uint32_t*>(x_), turn_ / kOfWord, classes_ / kOfWord, use);
  }

  __device__ __forceinline__ void overwrite(const RowGradient<T>& gradient) const {
    if constexpr (kWords) {
      if (few_words_) {
        with_words([&](auto row) {
#pragma unroll
          for (int j = 0; j < decltype(row)::kCount; ++j) {
            const uint32_t x = read_shared(row.at(j));
            const uint32_t g = word_of<T>([&](int i) { return gradient.probable(of_word<T>(x, i)); });
            write_shared(row.at(j), gradient.counts ? g : 0u);
          }
        });
        return;
      }
    }
    for_classes([&](int c) { write_shared(x_ + c, from_acc<T>(gradient.of_other(to_acc(read_shared(x_ + c)), c))); });
  }
};

// Unit of work: kTileThreads neighbouring rows by a block, a thread each, from dynamic shared memory, into which the
// logits of the `ahead` tiles that follow are on their way. Reads each logit once, 16 bytes at a time. Preconditions:
// dense rows of at most most_tile_classes. Plan: CudaFamily::kTileRows.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(kTileThreads, resident<T>(7, 7, 4))
    cross_entropy_tile_rows_kernel(CrossEntropyForward p, CrossEntropyBackward b, LossReduction r, int ahead,
                                   int64_t rows_per_chunk, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(double, scratch, 32);
  const int classes = static_cast<int>(p.extent.classes), t = static_cast<int>(threadIdx.x);
  const int past = elements_past_boundary(static_cast<const T*>(p.logits));
  TileRing<T> ring(memory, classes, past, ahead);
  const int64_t rows = p.extent.rows(), chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * rows_per_chunk;
    // The rows of the chunk that are left; 32 bits count them, and their elements.
    int left = static_cast<int>(rows - begin < rows_per_chunk ? rows - begin : rows_per_chunk);
    const auto elements = [&](int rows) {
      return (rows < kTileThreads ? rows > 0 ? rows : 0 : kTileThreads) * classes;
    };
    const T* next = static_cast<const T*>(p.logits) + begin * classes;
    int left_to_copy = left;
    const auto copy = [&] {
      ring.copy(next, elements(left_to_copy));
      next += kTileThreads * classes;
      left_to_copy -= kTileThreads;
    };
    int64_t row = begin + t;
    int64_t index = t < left ? row_index(p, row) : 0;
    ring.restart();
    for (int i = 0; i < ahead; ++i) copy();
    LossTerms sum;
    for (; left > 0; left -= kTileThreads, row += kTileThreads) {
      const bool exists = t < left;
      Vector<T>* const tile = ring.next(copy);
      const IndexTarget<acc> y = exists ? row_target_of<T>(p, index) : IndexTarget<acc>{0, false, false, acc(0)};
      index = t < left - kTileThreads ? row_index(p, row + kTileThreads) : 0;  // otherwise that row would wait for it
      const TileRow<T, kTerms> x(tile, past, classes);
      int64_t outer = 0, inner = 0;
      RowState<acc> s = RowState<acc>::empty();
      if (exists) {
        if (y.counts) {
          split_row(p.extent, row, outer, inner);
          s = x.state(ClassTerms<T>(p.targets, classes, outer, inner));
        }
        finish_row<T, kTerms>(p, row, s, y, p.targets.index && y.counts ? x[y.index] : acc(0), bad, sum);
      }
      if (b.grad_logits) {
        if (exists) x.become(row_gradient<T>(p, b, row, outer, inner, y, s, kTerms));
        __syncthreads();  // the gradient is there
        store_tile(static_cast<T*>(b.grad_logits) + (row - t) * classes, elements(left), tile, past);
      }
    }
    add_chunk<T>(r, p.targets, chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

// Unit of work: a row by `threads_per_row` threads of a warp, which hold it in registers: the maximum is known before
// the sum. Reads each logit once, 16 bytes at a time at any alignment. As many rows as a group has threads follow each
// other, and each thread knows the target of one of them and finishes it: the loop over the rows has nothing to wait
// for but logits, and those of the next row are on their way while one is worked on. Preconditions: class stride 1, and
// the row spans at most threads_per_row * kVectors aligned vectors. Plan: CudaFamily::kRegisterRows.
template <typename T, bool kTerms, bool kGrad>
__global__ void __launch_bounds__(kRegisterThreads, resident<T>(kTerms&& kGrad ? 3 : 4, kTerms || kGrad ? 3 : 4, 2))
    cross_entropy_register_rows_kernel(CrossEntropyForward p, CrossEntropyBackward b, LossReduction r,
                                       int threads_per_row, int64_t rows_per_chunk, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kVectors = register_vectors(sizeof(T)), kSize = Vector<T>::kSize;
  constexpr bool kAhead = !kTerms && !kGrad && sizeof(T) < 8;
  constexpr unsigned kAll = 0xffffffffu;
  SHARED_ARRAY(double, scratch, 32);
  const int lane = threadIdx.x % threads_per_row, group = threadIdx.x / threads_per_row;
  const int rows_at_once = kRegisterThreads / threads_per_row, classes = static_cast<int>(p.extent.classes);
  const int64_t rows = p.extent.rows(), chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  const auto row_of = [&](int64_t row) {
    int64_t outer, inner;
    split_row(p.extent, row, outer, inner);
    return static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
  };
  // Rows of whole vectors, each at a 16-byte boundary: the common case, which has no single elements.
  const bool whole = classes % kSize == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                     (p.extent.inner == 1 || p.logits_strides.inner % kSize == 0) &&
                     (p.extent.outer == 1 || p.logits_strides.outer % kSize == 0);
  // The vectors of a row that this thread holds; -inf where the row has none, or is not wanted.
  const auto load = [&](Vector<T>* values, int64_t row, bool wanted) {
    const T* x = row_of(wanted ? row : 0);
    if (whole) {
      const int first = lane * kSize, n = wanted ? classes - first : 0;
      const int step = threads_per_row * kSize;
      x += first;
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        values[j] = j * step < n ? Vector<T>::load(x + j * step) : Vector<T>::minus_infinities();
      return;
    }
    const int first = lane * kSize - elements_past_boundary(x);
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      values[j] = load_vector(x, first + j * threads_per_row * kSize, wanted ? classes : 0);
  };
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * rows_per_chunk, end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    LossTerms sum;
    // Every thread stays in the loops until the block's rows are done: the shuffles need whole warps.
    for (int64_t first = begin; first < end; first += kRegisterThreads) {
      const int64_t mine = first + lane * rows_at_once + group;
      const IndexTarget<acc> y = mine < end ? row_target<T>(p, mine) : IndexTarget<acc>{0, false, false, acc(0)};
      const acc target_logit = p.targets.index && y.counts ? to_acc(row_of(mine)[y.index]) : acc(0);
      RowState<acc> s = RowState<acc>::empty();  // of `mine`
      if (kGrad) __syncwarp();                   // the targets' logits have been read, which gradients may overwrite
      const int turns =
          static_cast<int>(end - first < kRegisterThreads ? (end - first + rows_at_once - 1) / rows_at_once
                                                          : static_cast<int64_t>(threads_per_row));
      const auto wanted = [&](int turn) {
        return __shfl_sync(kAll, static_cast<int>(y.counts), turn < threads_per_row ? turn : 0, threads_per_row) != 0 &&
               turn < turns;
      };
      Vector<T> ahead[kAhead ? kVectors : 1];
      bool wanted_ahead = false;
      if (kAhead) {
        wanted_ahead = wanted(0);
        load(ahead, first + group, wanted_ahead);
      }
      for (int turn = 0; turn < turns; ++turn) {
        const int64_t row = first + turn * rows_at_once + group;
        Vector<T> values[kVectors];
        if (kAhead) {
#pragma unroll
          for (int j = 0; j < kVectors; ++j) values[j] = ahead[kAhead ? j : 0];
          wanted_ahead = wanted(turn + 1);
          load(ahead, row + rows_at_once, wanted_ahead);
        } else {
          load(values, row, wanted(turn));
        }
        RowState<acc> of_row = RowState<acc>::empty();
        Vector<T> largest = values[0];
#pragma unroll
        for (int j = 1; j < kVectors; ++j) largest = larger(largest, values[j]);
        of_row.max = max_in_warp(larger(of_row.max, largest_of(largest)), threads_per_row);
        const acc m = finite_max(of_row.max);
        const Exponentials<T> exponentials(m);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          acc part = 0;
#pragma unroll
          for (int i = 0; i < kSize; ++i) part += exponentials(values[j][i]);  // 0 beyond the row
          of_row.sum += part;
        }
        of_row.sum = exponentials.normalized(sum_in_warp(of_row.sum, threads_per_row), m);
        const bool counts = kTerms || kGrad ? wanted(turn) : false;
        int64_t outer = 0, inner = 0;
        if (kTerms || kGrad) split_row(p.extent, counts ? row : int64_t(0), outer, inner);
        const int past = kTerms || kGrad ? elements_past_boundary(row_of(counts ? row : int64_t(0))) : 0;
        if (kTerms) {
          if (counts) {
            const ClassTerms<T> a(p.targets, classes, outer, inner);
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
#pragma unroll
              for (int i = 0; i < kSize; ++i) {
                const int c = (lane + j * threads_per_row) * kSize - past + i;
                if (c < 0 || c >= classes) continue;
                const acc term = a(c);
                of_row.dot += weighted(term, values[j][i] - m);
                of_row.mass += term;
              }
            }
          }
          of_row.dot = sum_in_warp(of_row.dot, threads_per_row);
          of_row.mass = sum_in_warp(of_row.mass, threads_per_row);
        }
        if (lane == turn) s = of_row;
        if (kGrad) {
          // A row that does not count gets zeros.
          IndexTarget<acc> target;
          target.index = __shfl_sync(kAll, static_cast<int>(y.index), turn, threads_per_row);
          target.weight = __shfl_sync(kAll, y.weight, turn, threads_per_row);
          target.counts = counts;
          target.bad = false;
          if (row < end) {
            split_row(p.extent, row, outer, inner);
            const int from = elements_past_boundary(row_of(row));
            T* grad = static_cast<T*>(b.grad_logits) + outer * b.grad_strides.outer + inner * b.grad_strides.inner;
            const bool aligned = from == elements_past_boundary(grad);
            const RowGradient<T> gradient = row_gradient<T>(p, b, row, outer, inner, target, of_row, kTerms);
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
              const int c = (lane + j * threads_per_row) * kSize - from;
              if (c < classes) store_vector(grad, c, classes, gradient.partly(values[j], c, classes), aligned);
            }
          }
        }
      }
      if (mine < end) finish_row<T, kTerms>(p, mine, s, y, target_logit, bad, sum);
    }
    add_chunk<T>(r, p.targets, chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

// The vectors of a batch of state_of_row.
template <typename T, bool kTerms>
constexpr int kStateVectors = state_vectors(sizeof(T), kTerms);

// The state of the classes [0, classes) of `x`, of those that a thread of the block (whole warps) takes; `a` of class c
// is a(offset + c). `read`: a Stream or a Keep.
template <typename T, bool kTerms, typename Read>
__device__ __forceinline__ RowState<typename AccOf<T>::type> state_of_row(const T* x, int64_t classes, int64_t offset,
                                                                          const ClassTerms<T>& a, const Read& read) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize, kCount = kStateVectors<T, kTerms>;
  RowState<acc> s = RowState<acc>::empty();
  Exponentials<T> exponentials(0);
  const auto raise_max = [&](acc m) {
    if (!(m > s.max)) return;  // as RowState::raise_max
    const Exponentials<T> next(m);
    if (!is_minus_infinity(s.max)) {
      s.sum *= exponentials.factor(next);
      if (kTerms) s.dot += s.mass * (s.max - m);
    }
    s.max = m;
    exponentials = next;
  };
  read(
      x, classes, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
      [&](int64_t c, T element) {
        const acc value = to_acc(element);
        raise_max(value);
        s.sum += exponentials(value);
        if (kTerms) {
          const acc term = a(offset + c);
          s.dot += weighted(term, value - finite_max(s.max));
          s.mass += term;
        }
      },
      [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
        Vector<T> largest = vectors[0];
#pragma unroll
        for (int j = 1; j < kCount; ++j) largest = larger(largest, vectors[j]);
        raise_max(largest_of(largest));
        const acc m = finite_max(s.max);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          acc part = 0, dot = 0, mass = 0;  // of a vector first: fewer additions to a large sum
          const bool exists = c + j * step < tail;
#pragma unroll
          for (int i = 0; i < kSize; ++i) part += exponentials(vectors[j][i]);  // 0 beyond the row
          if (kTerms && exists) {
            if (a.are_equal()) {
#pragma unroll
              for (int i = 0; i < kSize; ++i) dot += vectors[j][i] - m;
              dot *= a.uniform;
              mass = a.uniform * kSize;
            } else {
              acc terms[kSize];
              a.load(offset + c + j * step, terms);
#pragma unroll
              for (int i = 0; i < kSize; ++i) {
                dot += weighted(terms[i], vectors[j][i] - m);
                mass += terms[i];
              }
            }
          }
          s.sum += part;
          if (kTerms) {
            s.dot += dot;
            s.mass += mass;
          }
        }
      });
  s.sum = exponentials.normalized(s.sum, finite_max(s.max));
  return s;
}

// The classes of a row that one of `splits` blocks takes.
struct ClassRange {
  int64_t begin, end;
  explicit __device__ __forceinline__ ClassRange(int64_t classes) : begin(0), end(classes) {}  // all of them
  __device__ __forceinline__ ClassRange(int64_t classes, int splits, int part, int granule) {
    const int64_t size = (classes + splits - 1) / splits, rounded = (size + granule - 1) / granule * granule;
    begin = part * rounded < classes ? part * rounded : classes;
    end = begin + rounded < classes ? begin + rounded : classes;
  }
};

// Unit of work: a row by a block; or a part of one by each of `splits` blocks, the last of which to finish merges them;
// or by each block of a cluster, whose first one merges them. Reads each logit once, 16 bytes at a time at any
// alignment, with several loads of a thread in flight: in dynamic shared memory, `ahead` batches ahead of the
// arithmetic, where reads_ahead(). Preconditions: class stride 1, whole clusters in the grid, and splits of 1 where
// there are clusters. Plan: CudaFamily::kBlockRows.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(256, kTerms ? resident<T>(2, 2, 1) : resident<T>(kHalfBlocks, kSingleBlocks, 1))
    cross_entropy_block_rows_kernel(CrossEntropyForward p, LossReduction r, int splits, int ahead,
                                    int64_t rows_per_chunk, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  DYNAMIC_SHARED(memory);
  const Stream<T, kStateVectors<T, kTerms>, reads_ahead(sizeof(T), kTerms)> read{reinterpret_cast<Vector<T>*>(memory),
                                                                                 ahead};
  SHARED_ARRAY(RowState<acc>, states, 32);
  SHARED_ARRAY(RowState<acc>, slots, 2 * kMostClusterBlocks);
  SHARED_ARRAY(double, scratch, 32);
  ClusterParts<RowState<acc>> cluster(slots);
  const int64_t rows = p.extent.rows(), classes = p.extent.classes;
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  const int parts = splits * cluster.blocks;
  unsigned done = 0;
  for (int64_t unit = blockIdx.x; unit < chunks * parts; unit += gridDim.x) {
    const int64_t chunk = unit / parts;
    const int part = static_cast<int>(unit - chunk * parts);  // in a cluster the block's rank
    const int64_t begin = chunk * rows_per_chunk, end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    int64_t next = row_index(p, begin);
    LossTerms sum;
    bool finishes = true;
    for (int64_t row = begin; row < end; ++row) {
      const IndexTarget<acc> y = row_target_of<T>(p, next);
      if (row + 1 < end) next = row_index(p, row + 1);  // otherwise that row would wait for it
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      RowState<acc> s = RowState<acc>::empty();
      acc target_logit = 0;
      if (y.counts) {  // the same for all threads of the block
        if (p.targets.index && threadIdx.x == 0) target_logit = to_acc(x[y.index]);
        const ClassTerms<T> a(p.targets, classes, outer, inner);
        const ClassRange mine(classes, parts, part, Vector<T>::kSize);
        s = state_of_row<T, kTerms>(x + mine.begin, mine.end - mine.begin, mine.begin, a, read);
        merge_in_block(s, states);
      }
      if (cluster.blocks > 1) {
        s = merge_parts(cluster.exchange(s), cluster.blocks);
        finishes = part == 0;
        if (!finishes) continue;
      }
      if (splits > 1) {  // rows_per_chunk is 1
        RowState<acc>* saved = static_cast<RowState<acc>*>(r.row_parts) + row * splits;
        if (threadIdx.x == 0) saved[part] = s;
        finishes = completes(r.counters + 1 + row, 1, static_cast<unsigned>(splits));
        if (!finishes) break;
        s = RowState<acc>::empty();
        for (int i = threadIdx.x % 32; i < splits; i += 32) {
          s.merge({__ldcg(&saved[i].max), __ldcg(&saved[i].sum), __ldcg(&saved[i].dot), __ldcg(&saved[i].mass)});
        }
        merge_in_warp(s, 32);
      }
      if (threadIdx.x == 0) finish_row<T, kTerms>(p, row, s, y, target_logit, bad, sum);
    }
    if (!finishes) continue;
    if (threadIdx.x == 0) store_chunk<T>(r, p.targets, chunk, chunks, sum);  // no other thread has finished rows
    ++done;
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

// Unit of work: a row by a block, or by the blocks of a cluster, each a part, and its gradient. The first `kept`
// vectors of the part stay in dynamic shared memory; the rest is read again, soon enough that it is in the second-level
// cache. The loads run ahead of the arithmetic. Preconditions: class stride 1, and whole clusters in the grid. Plan:
// CudaFamily::kBlockRows of CudaOp::kValueAndGrad.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(256, kTerms ? resident<T>(2, 2, 1) : resident<T>(3, 3, 1))
    cross_entropy_value_and_grad_block_rows_kernel(CrossEntropyForward p, CrossEntropyBackward b, LossReduction r,
                                                   int kept, int ahead, int64_t rows_per_chunk, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  DYNAMIC_SHARED(memory);
  const Keep<T, kStateVectors<T, kTerms>> read{reinterpret_cast<Vector<T>*>(memory), kept, ahead};
  SHARED_ARRAY(RowState<acc>, states, 32);
  SHARED_ARRAY(RowState<acc>, slots, 2 * kMostClusterBlocks);
  SHARED_ARRAY(double, scratch, 32);
  ClusterParts<RowState<acc>> cluster(slots);
  const bool first_block = cluster.rank == 0;
  const int64_t rows = p.extent.rows(), classes = p.extent.classes;
  const int64_t chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x / cluster.blocks; chunk < chunks; chunk += gridDim.x / cluster.blocks) {
    const int64_t begin = chunk * rows_per_chunk, end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    LossTerms sum;
    for (int64_t row = begin; row < end; ++row) {
      const IndexTarget<acc> y = row_target<T>(p, row);
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      T* grad = static_cast<T*>(b.grad_logits) + outer * b.grad_strides.outer + inner * b.grad_strides.inner;
      acc target_logit = 0;
      // Before a barrier: the gradient may overwrite it.
      if (p.targets.index && y.counts && first_block && threadIdx.x == 0) target_logit = to_acc(x[y.index]);
      const ClassRange mine(classes, cluster.blocks, cluster.rank, kSize);
      const int64_t n = mine.end - mine.begin;
      x += mine.begin;
      grad += mine.begin;
      const RowVectors<T> part(x, n);
      RowState<acc> s = RowState<acc>::empty();
      if (y.counts) {  // the same for all threads of the block
        const ClassTerms<T> a(p.targets, classes, outer, inner);
        s = state_of_row<T, kTerms>(x, n, mine.begin, a, read);
        merge_in_block(s, states);
      }
      if (cluster.blocks > 1) s = merge_parts(cluster.exchange(s), cluster.blocks);
      if (first_block && threadIdx.x == 0) finish_row<T, kTerms>(p, row, s, y, target_logit, bad, sum);
      const RowGradient<T> gradient = row_gradient<T>(p, b, row, outer, inner, y, s, kTerms);
      const bool aligned = elements_past_boundary(x) == elements_past_boundary(grad);
      for_kept(part, read, y.counts, x, [&](int64_t c, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
        for (int j = 0; j < kStateVectors<T, kTerms>; ++j) {
          const int64_t at = c + j * 32 * kSize;
          if (at < tail) store_whole_vector(grad + at, gradient(vectors[j], mine.begin + at), aligned);
        }
      });
      const auto single = [&](int64_t c) { grad[c] = from_acc<T>(gradient(to_acc(x[c]), mine.begin + c)); };
      const int threads = blockDim.x;
      for (int64_t c = threadIdx.x; c < part.head; c += threads) single(c);
      for (int64_t c = part.tail + threadIdx.x; c < n; c += threads) single(c);
    }
    if (!first_block) continue;
    if (threadIdx.x == 0) store_chunk<T>(r, p.targets, chunk, chunks, sum);  // no other thread has finished rows
    ++done;
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

// The divisor of the mean before the losses are known: the sum of the targets' weights, or the number of rows of
// probabilities. Unit of work: kDivisorRowsPerChunk rows by a block.
constexpr int64_t kDivisorRowsPerChunk = 4096;
template <typename T>
__global__ void __launch_bounds__(512, 1) cross_entropy_divisor_kernel(CrossEntropyForward p, LossReduction r) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(double, scratch, 32);
  const int64_t rows = p.extent.rows(), chunks = (rows + kDivisorRowsPerChunk - 1) / kDivisorRowsPerChunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * kDivisorRowsPerChunk;
    const int64_t end = begin + kDivisorRowsPerChunk < rows ? begin + kDivisorRowsPerChunk : rows;
    LossTerms sum;
    for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) sum.add(acc(0), row_target<T>(p, row).weight);
    add_chunk<T>(r, p.targets, chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

}  // namespace nllx
