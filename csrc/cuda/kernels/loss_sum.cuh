// The loss of all rows, in the launch that computes them: partial sums of chunks of rows, added by the last block to
// finish, or, without counters, by one more launch. Everything is added in an order that depends on the problem alone:
// the same bits in every run, and either way.
#pragma once

#include "targets.cuh"

namespace nllx {

// What a thread adds to the loss and to the divisor of the mean.
struct LossTerms {
  double loss = 0, weight = 0;
  template <typename acc>
  __device__ __forceinline__ void add(acc row_loss, acc row_weight) {
    loss += static_cast<double>(row_loss);
    weight += static_cast<double>(row_weight);
  }
};

template <typename T>
__device__ __forceinline__ void write_loss(const LossReduction& r, const Targets& targets, double loss, double weight) {
  using acc = typename AccOf<T>::type;
  if (targets.index) weight = index_divisor(targets, weight);
  *static_cast<acc*>(r.total_weight) = static_cast<acc>(weight);
  if (r.reduction == Reduction::kNone || r.loss == nullptr) return;
  const double value = r.reduction == Reduction::kSum ? loss : loss / weight;
  if (r.loss_is_acc) {
    *static_cast<acc*>(r.loss) = static_cast<acc>(value);
  } else {
    *static_cast<T*>(r.loss) = from_acc<T>(static_cast<acc>(value));
  }
}

// Of a whole chunk; called by one thread. A problem of one chunk ends here.
template <typename T>
__device__ __forceinline__ void store_chunk(const LossReduction& r, const Targets& targets, int64_t chunk,
                                            int64_t chunks, const LossTerms& terms) {
  if (chunks == 1) {
    write_loss<T>(r, targets, terms.loss, terms.weight);
  } else {
    r.partials[2 * chunk] = terms.loss;
    r.partials[2 * chunk + 1] = terms.weight;
  }
}

// The sum over the block's threads of what they know of a chunk; called by all threads.
template <typename T>
__device__ __forceinline__ void add_chunk(const LossReduction& r, const Targets& targets, int64_t chunk, int64_t chunks,
                                          LossTerms terms, double* scratch) {
  terms.loss = sum_in_block(terms.loss, scratch);
  terms.weight = sum_in_block(terms.weight, scratch);
  if (threadIdx.x == 0) store_chunk<T>(r, targets, chunk, chunks, terms);
}

// Whether this block completes a count: `done` of `all`. Called by all threads of the block, which are told the same.
// What the blocks before have written is visible to the one that is told true, and the counter is zero again.
__device__ __forceinline__ bool completes(unsigned* counter, unsigned done, unsigned all) {
  SHARED_ARRAY(int, complete, 1);
  __syncthreads();  // all threads have written what is counted, and have read the answer before
  if (threadIdx.x == 0) {
    __threadfence();
    complete[0] = atomicAdd(counter, done) + done == all;
    if (complete[0]) {
      *counter = 0;
      __threadfence();  // before what the others have written is read
    }
  }
  __syncthreads();  // the answer is there
  return complete[0] != 0;
}

// The partial sums of all chunks, by one block.
template <typename T>
__device__ __forceinline__ void add_chunks(const LossReduction& r, const Targets& targets, int64_t chunks,
                                           double* scratch) {
  LossTerms terms;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) {
    terms.loss += __ldcg(r.partials + 2 * i);
    terms.weight += __ldcg(r.partials + 2 * i + 1);
  }
  const double loss = sum_in_block(terms.loss, scratch), weight = sum_in_block(terms.weight, scratch);
  if (threadIdx.x == 0) write_loss<T>(r, targets, loss, weight);
}

// Called by all threads of a block when it has added `done` of the chunks.
template <typename T>
__device__ __forceinline__ void finish_loss(const LossReduction& r, const Targets& targets, int64_t chunks,
                                            unsigned done, double* scratch) {
  if (chunks == 1 || done == 0 || r.counters == nullptr) return;
  if (completes(r.counters, done, static_cast<unsigned>(chunks))) add_chunks<T>(r, targets, chunks, scratch);
}

}  // namespace nllx
