// Loss and statistics where neighbouring rows are adjacent in memory, in one read of the logits.
#pragma once

#include "cross_entropy_rows.cuh"

namespace nllx {

// kRows neighbouring elements of one class: one, or 8 bytes of them, which take half of the registers that 16 bytes
// take and leave the multiprocessor twice the threads.
template <typename T>
constexpr int kNeighbours = kPlaneVectorBytes / static_cast<int>(sizeof(T));
template <typename T, int kRows>
struct Neighbours {
  using acc = typename AccOf<T>::type;
  Vector<T> bits;  // the first 8 bytes, or one element
  static __device__ __forceinline__ Neighbours of(const uint2& words) {
    Neighbours v;
    v.bits.words[0] = words.x;
    v.bits.words[1] = words.y;
    return v;
  }
  static __device__ __forceinline__ Neighbours load(const T* p) {
    Neighbours v;
    if (kRows > 1) {
      v = of(*reinterpret_cast<const uint2*>(p));
    } else {
      v.bits.words[0] = v.bits.words[1] = 0;
      v.bits.set_element(0, *p);
    }
    return v;
  }
  static __device__ __forceinline__ Neighbours masked() { return {Vector<T>::minus_infinities()}; }
  __device__ __forceinline__ acc operator[](int i) const { return bits[i]; }
};

// values(0), values(1), ... for kRows neighbouring elements, 8 bytes or one.
template <typename T, int kRows, typename Value>
__device__ __forceinline__ void store_neighbours(T* p, Value value) {
  if (kRows > 1) {
    const Vector<T> v = Vector<T>::of([&](int i) { return i < kRows ? value(i) : typename AccOf<T>::type(0); });
    store_bytes(p, uint2{v.words[0], v.words[1]});
  } else {
    *p = from_acc<T>(value(0));
  }
}

// How the loads of kRows > 1 rows run ahead of the arithmetic: `ahead` batches of classes, in a ring of one slot more
// in shared memory.
struct PlaneRing {
  uint2* memory = nullptr;
  int ahead = 0;
  __device__ __forceinline__ uint2* first(int slot) const {
    return memory + slot * (kPlaneClassesAtOnce * kPlaneThreads) + threadIdx.x;
  }
};

// The states of kRows neighbouring rows, of the classes `part`, part + parts, ...; several loads of a thread in flight.
template <typename T, int kRows, bool kTerms>
__device__ __forceinline__ void states_of_columns(const T* x, int64_t stride, int64_t classes, int part, int parts,
                                                  const ClassTerms<T>& a, RowState<typename AccOf<T>::type>* states,
                                                  const PlaneRing& ring = PlaneRing()) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = kPlaneClassesAtOnce;
  constexpr int kBatchesPerBlock = 64 / kAtOnce;  // blocks are added first: fewer additions to a large sum
  acc max[kRows], sum[kRows], block[kRows];
  acc dot = 0, mass = 0, block_dot = 0, block_mass = 0;  // kTerms has one row
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    minus_infinity(max[i]);
    sum[i] = block[i] = 0;
  }
  int batches = 0;
  const auto add = [&](const Neighbours<T, kRows>* v, int64_t c, int n) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      acc m = v[0][i];
#pragma unroll
      for (int j = 1; j < kAtOnce; ++j) m = larger(m, v[j][i]);
      if (m > max[i]) {
        if (!is_minus_infinity(max[i])) {
          const acc factor = exp_acc(max[i] - m);
          sum[i] *= factor;
          block[i] *= factor;
          if (kTerms) {
            dot += mass * (max[i] - m);
            block_dot += block_mass * (max[i] - m);
          }
        }
        max[i] = m;
      }
      const acc finite = finite_max(max[i]);
      acc batch = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const acc shifted = v[j][i] - finite;
        batch += exp_of_many(shifted);
        if (kTerms && j < n) {
          const acc term = a(c + static_cast<int64_t>(j) * parts);
          block_dot += weighted(term, shifted);
          block_mass += term;
        }
      }
      block[i] += batch;
    }
    if (++batches % kBatchesPerBlock == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sum[i] += block[i];
        block[i] = 0;
      }
      dot += block_dot;
      mass += block_mass;
      block_dot = block_mass = 0;
    }
  };
  const int64_t step = static_cast<int64_t>(kAtOnce) * parts;
  int64_t c = part;
  if (kRows > 1 && copies_are_async(ring.ahead)) {  // parts is 1
    int64_t next = 0;
    int to = 0, from = 0;
    const T* source = x;
    const auto copy = [&] {
      uint2* const first = ring.first(to);
      if (next + kAtOnce <= classes) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j, source += stride) copy_async_8(first + j * kPlaneThreads, source);
      } else if (next < classes) {
        const int n = static_cast<int>(classes - next);
#pragma unroll 1
        for (int j = 0; j < n; ++j, source += stride) copy_async_8(first + j * kPlaneThreads, source);
      }
      commit_copies();  // of no class too: groups are counted
      next += kAtOnce;
      to = to == ring.ahead ? 0 : to + 1;
    };
    for (int i = 0; i < ring.ahead; ++i) copy();
    for (; c < classes; c += kAtOnce) {
      wait_for_copies(ring.ahead - 1);  // the oldest group is this batch
      copy();                           // where the batch before was
      const uint2* const first = ring.first(from);
      Neighbours<T, kRows> v[kAtOnce];
      if (c + kAtOnce <= classes) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) v[j] = Neighbours<T, kRows>::of(first[j * kPlaneThreads]);
      } else {
        const int n = static_cast<int>(classes - c);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          v[j] = j < n ? Neighbours<T, kRows>::of(first[j * kPlaneThreads]) : Neighbours<T, kRows>::masked();
      }
      from = from == ring.ahead ? 0 : from + 1;
      add(v, c, kAtOnce);  // the number of classes is for coefficients, of which there are none
    }
  }
  for (; c + step - parts < classes; c += step) {
    Neighbours<T, kRows> v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      v[j] = Neighbours<T, kRows>::load(x + (c + static_cast<int64_t>(j) * parts) * stride);
    add(v, c, kAtOnce);
  }
  if (c < classes) {
    Neighbours<T, kRows> v[kAtOnce];
    int n = 0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t at = c + static_cast<int64_t>(j) * parts;
      v[j] = at < classes ? Neighbours<T, kRows>::load(x + at * stride) : Neighbours<T, kRows>::masked();
      n += at < classes;
    }
    add(v, c, n);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) states[i] = {max[i], sum[i] + block[i], dot + block_dot, mass + block_mass};
}

// Where a thread of a block of planes works: `side` threads side by side take kRows neighbouring rows each, the others
// of the block a part of the classes.
struct PlaneTile {
  int64_t tiles_per_plane, tiles;
  int side, part, parts;
  __device__ __forceinline__ PlaneTile(const Extent& extent, int side, int rows_per_thread)
      : tiles_per_plane((extent.inner + side * rows_per_thread - 1) / (side * rows_per_thread)),
        tiles(extent.outer * tiles_per_plane),
        side(side),
        part(static_cast<int>(threadIdx.x) / side),
        parts(static_cast<int>(blockDim.x) / side) {}
  __device__ __forceinline__ void locate(int64_t tile, int rows_per_thread, int64_t& outer, int64_t& inner) const {
    outer = tile / tiles_per_plane;
    inner = ((tile - outer * tiles_per_plane) * side + threadIdx.x % side) * rows_per_thread;
  }
};

// Unit of work: a tile of neighbouring rows of one plane, kRows to a thread; a chunk is `tiles_per_chunk` of them.
// Reads each logit once, neighbouring threads at neighbouring addresses; for kRows > 1 the loads are `ahead` batches of
// classes ahead of the arithmetic, in dynamic shared memory. Preconditions: inner stride 1; for kRows > 1
// every class of every plane begins at a 16-byte boundary, kRows divides the plane, and side is the whole block. Plan:
// CudaFamily::kPlanes.
template <typename T, int kRows, bool kTerms>
__global__ void __launch_bounds__(kPlaneThreads, kTerms ? resident<T>(2, 2, 1) : resident<T>(3, 3, 1))
    cross_entropy_planes_kernel(CrossEntropyForward p, LossReduction r, int side, int ahead, int64_t tiles_per_chunk,
                                BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  static_assert(kRows == 1 || !kTerms, "coefficients are for single rows");
  DYNAMIC_SHARED(memory);
  const PlaneRing ring{reinterpret_cast<uint2*>(memory), ahead};
  SHARED_ARRAY(RowState<acc>, parts, kRows == 1 ? kPlaneThreads : 1);
  SHARED_ARRAY(double, scratch, kPlaneThreads / 32);  // so little that three blocks share 100 KB
  const PlaneTile where(p.extent, side, kRows);
  const int64_t chunks = (where.tiles + tiles_per_chunk - 1) / tiles_per_chunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * tiles_per_chunk;
    const int64_t end = begin + tiles_per_chunk < where.tiles ? begin + tiles_per_chunk : where.tiles;
    LossTerms sum;
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t outer, inner;
      where.locate(tile, kRows, outer, inner);
      const bool exists = inner < p.extent.inner;
      const int64_t row = outer * p.extent.inner + inner;
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
      RowState<acc> states[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) states[i] = RowState<acc>::empty();
      const ClassTerms<T> a(p.targets, p.extent.classes, outer, inner);
      if (exists && where.part == 0) prefetch_index(p.targets, row);
      // Rows that do not count too: their neighbours' logits come with theirs.
      if (exists)
        states_of_columns<T, kRows, kTerms>(x, p.logits_strides.classes, p.extent.classes, where.part, where.parts, a,
                                            states, ring);
      if (kRows == 1 && where.parts > 1) {
        __syncthreads();  // the parts of the tile before may still be read
        parts[threadIdx.x] = states[0];
        __syncthreads();  // all parts are there
        if (where.part == 0) {
          for (int i = 1; i < where.parts; ++i) states[0].merge(parts[i * side + threadIdx.x]);
        }
      }
      if (!exists || where.part != 0) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const IndexTarget<acc> y = row_target<T>(p, row + i);
        // Equal coefficients, added one after another, would be rounded in one direction; their sum is known.
        if (kTerms && p.targets.index) states[i].mass = a.uniform_mass(p.targets, p.extent.classes);
        const acc target_logit =
            p.targets.index && y.counts ? to_acc(x[i + y.index * p.logits_strides.classes]) : acc(0);
        finish_row<T, kTerms>(p, row + i, states[i], y, target_logit, bad, sum);
      }
    }
    add_chunk<T>(r, p.targets, chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

}  // namespace nllx
