#include "plan.h"

#include <cstddef>

namespace nllx {

namespace {

// Blocks beyond this walk over the rest: the first grid dimension ends at 2^31 - 1, and launching a few waves of every
// chip costs less than launching millions of blocks.
constexpr int64_t kMostBlocks = 1 << 20;

struct Row {
  int64_t classes;  // up to and including
  int threads;
};

// Few classes: a power of two of threads that holds them with one value each.
constexpr Row kThreadsPerRegisterRow[] = {{1, 1}, {2, 2}, {4, 4}, {8, 8}, {16, 16}, {INT64_MAX, 32}};

// A block per row: at least 16 logits for a thread, so that several loads are in flight, and a reduction over few
// warps. Not 1024 threads: 64 registers a thread are too few for float64.
constexpr Row kThreadsPerBlockRow[] = {{2048, 128}, {8192, 256}, {INT64_MAX, 512}};

// Beyond 8 logits a thread the row is read by a block instead: 32 * 8.
constexpr int64_t kMostRegisterClasses = 256;

// A row's values are streamed by this many threads, each 16 bytes at a time.
constexpr int kStreamingThreads = 256;

template <size_t n>
int lookup(const Row (&table)[n], int64_t classes) {
  for (const Row& row : table) {
    if (classes <= row.classes) return row.threads;
  }
  return table[n - 1].threads;
}

int64_t blocks_for(int64_t units, int64_t per_block) {
  const int64_t blocks = (units + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks;
}

CudaPlan planes(const Extent& extent) {
  // Wide planes fill a block of 256; narrow ones lose less of a small block. A block takes a tile of one plane.
  const int threads = extent.inner > 128 ? 256 : extent.inner > 64 ? 128 : extent.inner > 32 ? 64 : 32;
  const int64_t tiles = (extent.inner + threads - 1) / threads;
  return {CudaFamily::kPlanes, threads, 1, threads, 0, blocks_for(extent.outer * tiles, 1)};
}

CudaPlan block_rows(const Extent& extent) {
  const int threads = lookup(kThreadsPerBlockRow, extent.classes);
  return {CudaFamily::kBlockRows, threads, threads, 1, 0, blocks_for(extent.rows(), 1)};
}

}  // namespace

CudaPlan cuda_plan_reduction(const Extent& extent, Layout layout) {
  if (layout == Layout::kPlanes) return planes(extent);
  if (extent.classes > kMostRegisterClasses) return block_rows(extent);
  const int threads = 128, per_row = lookup(kThreadsPerRegisterRow, extent.classes), rows = threads / per_row;
  int values = 1;
  while (static_cast<int64_t>(values) * per_row < extent.classes) values *= 2;
  return {CudaFamily::kRegisterRows, threads, per_row, rows, values, blocks_for(extent.rows(), rows)};
}

CudaPlan cuda_plan_rows(const Extent& extent, Layout layout) {
  if (layout == Layout::kPlanes) return planes(extent);
  if (extent.classes > kMostRegisterClasses) return block_rows(extent);
  const int threads = 128, per_row = lookup(kThreadsPerRegisterRow, extent.classes), rows = threads / per_row;
  return {CudaFamily::kBlockRows, threads, per_row, rows, 0, blocks_for(extent.rows(), rows)};
}

CudaPlan cuda_plan_streaming(const Extent& extent, Layout layout, int element_bytes) {
  if (layout == Layout::kPlanes) return planes(extent);
  const int64_t vectors = (extent.classes * element_bytes + 15) / 16;
  int per_row = 1;
  while (per_row < vectors && per_row < kStreamingThreads) per_row *= 2;
  const int rows = kStreamingThreads / per_row;
  return {CudaFamily::kBlockRows, kStreamingThreads, per_row, rows, 0, blocks_for(extent.rows(), rows)};
}

}  // namespace nllx
