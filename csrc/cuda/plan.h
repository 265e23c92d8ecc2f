// Which kernel solves a problem, with how many threads: a pure function of the problem, testable without a GPU.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace nllx {

enum class CudaFamily : uint8_t {
  kRegisterRows,  // a row by a warp or part of one, its logits in registers
  kBlockRows,     // a row by a block, in 16-byte loads
  kPlanes,        // a thread per row, neighbouring threads on neighbouring rows
};

struct CudaPlan {
  CudaFamily family;
  int threads;            // of a block
  int threads_per_row;    // a power of two up to 32, or all threads of the block
  int rows_per_block;     // that are worked on at once
  int values_per_thread;  // kRegisterRows: logits of a row that a thread holds
  int64_t blocks;
};

// `forward` kernels reduce over the classes of a row; the backward of the losses streams.
CudaPlan cuda_plan_reduction(const Extent& extent, Layout layout);
CudaPlan cuda_plan_streaming(const Extent& extent, Layout layout, int element_bytes);

// The row kernels without registers for a row (log_softmax, sums over probabilities): a warp or a block per row.
CudaPlan cuda_plan_rows(const Extent& extent, Layout layout);

}  // namespace nllx
