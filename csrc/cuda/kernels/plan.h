// Which kernel solves a problem, and how: a pure function of problem, dtype and device, testable without a GPU.
#pragma once

#include <cstdint>

#include "../../problem.h"

namespace nllx {

constexpr int element_bytes(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

enum class CudaOp : uint8_t { kForward, kBackward, kValueAndGrad, kLogSoftmax };

enum class CudaFamily : uint8_t {
  kTileRows,      // few classes: neighbouring rows lie in shared memory, a thread per row
  kRegisterRows,  // a row by a warp or part of one, its logits in registers
  kBlockRows,     // a row, or a part of one, by a block or by some of its warps
  kPlanes,        // neighbouring threads on neighbouring rows
};

// What a kernel needs to know of the memory beside the extent.
struct CudaProblem {
  Extent extent;
  Layout layout = Layout::kRows;
  bool dense = false;  // kRows: each row begins where the one before ends
  // Every row (kRows), or every class of every plane (kPlanes, in all tensors), begins at a 16-byte boundary.
  bool aligned = false;
  bool has_terms = false;  // label smoothing or probabilities: every class has a coefficient
  int element_bytes = 4;
};

struct CudaDevice {
  int multiprocessors = 1;
  int shared_bytes = 48 << 10;  // that a block may ask for
  int cluster_blocks = 1;       // the most of a thread-block cluster
  bool async_copies = false;    // from device to shared memory: from sm_80 on
  bool conservative = false;    // blocks exchange nothing within a launch, and nothing is copied asynchronously
};

// The way back for a GPU on which something is wrong: without clusters, asynchronous copies, rows split over blocks,
// and sums by the last block to finish.
CudaDevice conservative(CudaDevice device);
// Whether NLLX_CUDA_PLAN, read once in a process, is "conservative". Throws std::runtime_error for what it cannot be.
bool plans_are_conservative();

struct CudaPlan {
  CudaFamily family = CudaFamily::kTileRows;
  int threads = 0;          // of a block
  int threads_per_row = 1;  // kPlanes: threads side by side on neighbouring rows; the others share the classes
  int rows_at_once = 1;     // by a block
  int vector_elements = 1;  // of one load
  int splits = 1;           // blocks that share a row, through device memory
  int cluster = 1;          // blocks that share a row, as a thread-block cluster through shared memory
  int shared_bytes = 0;     // dynamic
  int ahead = 0;            // batches of loads, or tiles (kTileRows), on their way through shared memory; 0: none
  int64_t rows_per_chunk = 1;
  int64_t chunks = 0;  // units of work, each with one partial sum of the loss
  const char* reason = "";
  constexpr int64_t blocks() const { return chunks * splits * cluster; }
};

// Of dynamic shared memory in any plan: what is left beside the static, and the system's.
constexpr int kReservedSharedBytes = 3 << 10;
constexpr int most_shared_bytes(const CudaDevice& device) { return device.shared_bytes - kReservedSharedBytes; }

// What a plan needs to know of a problem. `gradient`: of value_and_grad, otherwise null.
CudaProblem cuda_problem(const CrossEntropyForward& p, const CrossEntropyBackward* gradient, FloatType type);
CudaProblem cuda_problem(const CrossEntropyBackward& p, FloatType type);
CudaProblem cuda_problem(const Extent& extent, Layout layout, const void* input, const Strides& strides,
                         FloatType type);

CudaPlan cuda_plan(CudaOp op, const CudaProblem& problem, const CudaDevice& device);

// kTileRows: the shared memory of a block holds this many rows of so many classes.
constexpr int kTileThreads = 128, kMostTileClasses = 32;
NLLX_MEMBER constexpr int most_tile_classes(int element_bytes) { return element_bytes == 8 ? 16 : kMostTileClasses; }
// …in each of several slots, a tile that begins anywhere between two 16-byte boundaries.
NLLX_MEMBER constexpr int tile_vectors(int classes, int element_bytes) {
  return kTileThreads * classes * element_bytes / 16 + 1;
}
constexpr int kResidentTiles = 6;  // blocks that are to share a multiprocessor
// kRegisterRows: 16-byte vectors of a row that a thread holds.
constexpr int kRegisterThreads = 128;
NLLX_MEMBER constexpr int register_vectors(int element_bytes) { return element_bytes == 2 ? 4 : 8; }
// kBlockRows and the streaming backward: 16-byte loads of a thread in flight.
constexpr int kVectorsAtOnce = 4;
// kPlanes: threads of a block.
constexpr int kPlaneThreads = 256;
constexpr int kPlaneVectorBytes = 8, kPlaneClassesAtOnce = 8;  // of a load, and loads of a thread in flight
// …fewer where each class has a coefficient.
NLLX_MEMBER constexpr int state_vectors(int element_bytes, bool has_terms) {
  return has_terms || element_bytes == 8 ? kVectorsAtOnce / 2 : kVectorsAtOnce;
}
// Whether the forward's loads run ahead of the arithmetic through shared memory. Of float32 without coefficients there
// are enough loads in flight without, since four blocks share a multiprocessor.
NLLX_MEMBER constexpr bool reads_ahead(int element_bytes, bool has_terms) { return has_terms || element_bytes != 4; }
constexpr int kMostAhead = 3;  // batches of loads on their way
// softmax_statistics: threads of a block, of which a row has some of a warp, or all.
constexpr int kStatisticsThreads = 256;
// Rows that are split over blocks: at most so many, each with a counter.
constexpr int kMostSplitRows = 1024, kMostSplits = 64;
constexpr int kMostClusterBlocks = 8;  // that every GPU with clusters allows

}  // namespace nllx
