#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nllx {

namespace {

// The partial sums of the loss are added by the last block to finish: so few that this costs no time.
constexpr int64_t kMostChunks = 4096;

// Where a row goes through shared memory, several blocks of 256 threads share a multiprocessor's: one loads while
// another works. As many as the registers allow, so that none of it is left over.
int resident_blocks(int element_bytes, bool has_terms) {
  if (has_terms) return element_bytes == 8 ? 1 : 2;
  return element_bytes == 8 ? 2 : 3;
}
constexpr int kBlockThreads = 256;  // and of the streaming backward

// Long rows: enough threads that each has several loads, and blocks so small that three or more share a multiprocessor:
// some load while others reduce.
struct BlockRow {
  int64_t vectors;  // of a row, up to and including
  int threads;
  const char* reason;
};
constexpr BlockRow kBlockRows[] = {
    {1024, 128, "two batches of four vectors a thread, and many rows at once on a multiprocessor"},
    {INT64_MAX, kBlockThreads, "a long row: the reduction at its end is short beside it"},
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Chunks of whole groups of rows, as many as the last block can add at no cost. For rows a function of the problem
// alone, so that the sum is the same on every device; for planes the groups depend on the number of multiprocessors.
void cut(CudaPlan& plan, int64_t rows) {
  const int64_t groups = divide_up(std::max<int64_t>(rows, 1), plan.rows_at_once);
  plan.rows_per_chunk = plan.rows_at_once * divide_up(groups, kMostChunks);
  plan.chunks = divide_up(std::max<int64_t>(rows, 1), plan.rows_per_chunk);
}

// As many blocks for each row as fill the chip twice, while each has work for all of its threads.
int splits_of_row(const CudaProblem& p, int64_t vectors, int threads, const CudaDevice& device) {
  const int64_t rows = p.extent.rows(), wanted = 2 * static_cast<int64_t>(device.multiprocessors);
  if (rows >= wanted || rows > kMostSplitRows || rows < 1) return 1;
  const int64_t most = vectors / (threads * kVectorsAtOnce / 2);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted / rows, most), 1, kMostSplits));
}

// How many batches of a block's loads, of so many bytes, are on their way while it works on one: two, if `resident`
// blocks with as much share a multiprocessor; otherwise one; and no more than it has to load beside the first.
int batches_ahead(int bytes, int64_t batches, int resident, const CudaDevice& device) {
  if (!device.async_copies) return 0;
  const bool two = 3 * bytes <= device.shared_bytes / resident - kReservedSharedBytes;
  return two && batches > 2 ? 2 : 1;
}

CudaPlan planes(CudaOp op, const CudaProblem& p, const CudaDevice& device) {
  CudaPlan plan;
  plan.family = CudaFamily::kPlanes;
  plan.threads = plan.threads_per_row = kPlaneThreads;
  const int vector = kPlaneVectorBytes / p.element_bytes;
  const int64_t threads = static_cast<int64_t>(device.multiprocessors) * 512;
  // With coefficients the state of a row takes twice the registers: a row per thread.
  if (vector > 1 && p.aligned && !p.has_terms && op != CudaOp::kLogSoftmax && p.extent.rows() / vector >= threads) {
    plan.vector_elements = vector;
    plan.reason = "wide planes: 8-byte loads of neighbouring rows fill the chip";
    if (op == CudaOp::kForward || op == CudaOp::kValueAndGrad) {
      const int batch = kPlaneThreads * kPlaneClassesAtOnce * kPlaneVectorBytes;
      plan.ahead = batches_ahead(batch, divide_up(p.extent.classes, kPlaneClassesAtOnce), 3, device);
      if (plan.ahead > 0) plan.shared_bytes = (plan.ahead + 1) * batch;
    }
  } else {
    plan.reason = "a thread per row";
    // Small planes: fewer threads side by side, the others take a part of the classes each.
    while (plan.threads_per_row > 32 && (p.extent.inner <= plan.threads_per_row / 2 ||
                                         p.extent.rows() * (kPlaneThreads / plan.threads_per_row) < threads / 4)) {
      plan.threads_per_row /= 2;
      plan.reason = "small planes: the threads of a block share the classes";
    }
  }
  plan.rows_at_once = plan.threads_per_row * plan.vector_elements;
  const int64_t tiles = p.extent.outer * divide_up(p.extent.inner, plan.rows_at_once);
  plan.rows_per_chunk = divide_up(std::max<int64_t>(tiles, 1), kMostChunks);  // here: tiles of rows_at_once
  plan.chunks = divide_up(std::max<int64_t>(tiles, 1), plan.rows_per_chunk);
  return plan;
}

// Whether the rows of a problem lie one behind the other.
bool is_dense(const Extent& e, const Strides& s) {
  return (e.inner == 1 || s.inner == e.classes) && (e.outer == 1 || s.outer == e.inner * e.classes);
}

bool is_aligned(const Extent& e, Layout layout, const Strides& s, const void* p, int element_bytes) {
  const int64_t vector = 16 / element_bytes;
  const bool rows = layout == Layout::kRows;
  const bool inner = rows ? e.inner == 1 || s.inner % vector == 0 : e.inner % vector == 0;
  const bool classes = rows || e.classes == 1 || s.classes % vector == 0;
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && inner && classes && (e.outer == 1 || s.outer % vector == 0);
}

CudaProblem problem_of(const Extent& extent, Layout layout, const Targets& t, FloatType type) {
  CudaProblem problem;
  problem.extent = extent;
  problem.layout = layout;
  problem.has_terms = t.probabilities != nullptr || t.label_smoothing > 0;
  problem.element_bytes = element_bytes(type);
  return problem;
}

// The elements of a 16-byte load, and those loads of a row.
int vector_elements(const CudaProblem& p) { return 16 / p.element_bytes; }
int64_t vectors_of_row(const CudaProblem& p) { return divide_up(p.extent.classes, vector_elements(p)) + !p.aligned; }

CudaPlan tile_rows(const CudaProblem& p, const CudaDevice& device) {
  CudaPlan plan;
  plan.family = CudaFamily::kTileRows;
  plan.reason = "few classes: no exchange between threads";
  plan.threads = plan.rows_at_once = kTileThreads;
  plan.vector_elements = vector_elements(p);
  cut(plan, p.extent.rows());
  // No more than the tiles that a block has, beside the first.
  const int tile_bytes = 16 * tile_vectors(static_cast<int>(p.extent.classes), p.element_bytes);
  const int64_t more = std::min<int64_t>(plan.rows_per_chunk / kTileThreads - 1, kMostAhead);
  const auto fits = [&](int ahead) {
    return kResidentTiles * ((ahead + 1) * tile_bytes + (1 << 10)) <= device.shared_bytes;
  };
  while (device.async_copies && plan.ahead < more && fits(plan.ahead + 1)) ++plan.ahead;
  plan.shared_bytes = (plan.ahead + 1) * tile_bytes;
  return plan;
}

// The backward of rows.
CudaPlan streamed_rows(const CudaProblem& p, const CudaDevice& device) {
  const int64_t vectors = vectors_of_row(p);
  CudaPlan plan;
  plan.family = CudaFamily::kBlockRows;
  plan.reason = "streams: four vectors a thread at a time";
  plan.threads = kBlockThreads;
  // No reduction: a thread takes four vectors at a time.
  plan.threads_per_row =
      static_cast<int>(std::min<int64_t>(power_of_two_from(divide_up(vectors, kVectorsAtOnce)), kBlockThreads));
  plan.rows_at_once = kBlockThreads / plan.threads_per_row;
  plan.vector_elements = vector_elements(p);
  if (plan.threads_per_row == kBlockThreads) plan.splits = splits_of_row(p, vectors, kBlockThreads, device);
  plan.rows_per_chunk = plan.rows_at_once;
  plan.chunks = divide_up(std::max<int64_t>(p.extent.rows(), 1), plan.rows_at_once);
  return plan;
}

// Whether the registers of a warp hold a row.
bool has_register_rows(const CudaProblem& p) { return vectors_of_row(p) <= 32 * register_vectors(p.element_bytes); }

CudaPlan register_rows(const CudaProblem& p) {
  CudaPlan plan;
  plan.family = CudaFamily::kRegisterRows;
  plan.reason = "the row fits the registers of a warp: one read, no barrier";
  plan.threads = kRegisterThreads;
  plan.threads_per_row =
      static_cast<int>(power_of_two_from(divide_up(vectors_of_row(p), register_vectors(p.element_bytes))));
  plan.rows_at_once = kRegisterThreads / plan.threads_per_row;
  plan.vector_elements = vector_elements(p);
  cut(plan, p.extent.rows());
  return plan;
}

BlockRow block_row(int64_t vectors) {
  const BlockRow* row = kBlockRows;
  while (vectors > row->vectors) ++row;
  return *row;
}

CudaPlan block_rows(CudaOp op, const CudaProblem& p, const CudaDevice& device) {
  const int64_t vectors = vectors_of_row(p);
  BlockRow row = block_row(vectors);
  CudaPlan plan;
  plan.family = CudaFamily::kBlockRows;
  plan.reason = row.reason;
  plan.threads = plan.threads_per_row = row.threads;
  plan.vector_elements = vector_elements(p);
  const bool may_split = op != CudaOp::kLogSoftmax && !device.conservative;
  const int splits = may_split ? splits_of_row(p, vectors, plan.threads, device) : 1;
  // Within a cluster nothing of device memory is waited for; more blocks than it has are worth more than that.
  const bool clustered = splits > 1 && splits <= device.cluster_blocks;
  if (op == CudaOp::kForward) {
    if (clustered) {
      while (2 * plan.cluster <= splits) plan.cluster *= 2;
      plan.reason = "few long rows: a cluster for each";
    } else if (splits > 1) {
      plan.splits = splits;
      plan.reason = "few long rows: several blocks for each";
    }
    if (reads_ahead(p.element_bytes, p.has_terms)) {
      const int at_once = plan.threads * state_vectors(p.element_bytes, p.has_terms), batch = at_once * 16;
      const int resident = resident_blocks(p.element_bytes, p.has_terms) * (kBlockThreads / plan.threads);
      plan.ahead = batches_ahead(batch, divide_up(vectors, plan.splits * plan.cluster * at_once), resident, device);
      if (plan.ahead > 0) plan.shared_bytes = (plan.ahead + 1) * batch;
    }
  } else {
    // In whole batches of a warp, forward and backward.
    const int64_t granule =
        32 * 16 * (op == CudaOp::kLogSoftmax ? kVectorsAtOnce : state_vectors(p.element_bytes, p.has_terms));
    const int resident = resident_blocks(p.element_bytes, p.has_terms);
    const int64_t most =
        std::max<int64_t>(0, device.shared_bytes / resident - kReservedSharedBytes) / granule * granule;
    const auto bytes = [&](int blocks) {
      return divide_up(divide_up(p.extent.classes, blocks) * p.element_bytes, granule) * granule;
    };
    while (2 * plan.cluster <= device.cluster_blocks &&
           (bytes(plan.cluster) > most || (clustered && 2 * plan.cluster <= splits)))
      plan.cluster *= 2;
    plan.shared_bytes = static_cast<int>(std::min(bytes(plan.cluster), most));
    plan.ahead = device.async_copies ? kMostAhead : 0;
    plan.reason = plan.cluster == 1 ? "the row stays in shared memory, what does not fit in the cache"
                                    : "the row stays in the shared memory of a cluster, what does not fit in the cache";
    row = block_row(divide_up(vectors, plan.cluster));
    plan.threads = plan.threads_per_row = row.threads;
    if (op == CudaOp::kValueAndGrad && ((splits > 1 && !clustered) || bytes(plan.cluster) > 2 * most)) {
      // Reading most of the row again from a kernel that waits in between is slower than the streaming backward, and
      // so is a kernel of few blocks.
      plan.shared_bytes = plan.ahead = 0;
      plan.cluster = 1;
      plan.reason = splits > 1 && !clustered ? "few long rows: forward, then backward"
                                             : "the row does not fit: forward, then backward";
    }
  }
  cut(plan, p.extent.rows());
  return plan;
}

bool read_plans_are_conservative() {
  const char* const value = std::getenv("NLLX_CUDA_PLAN");
  const std::string wanted = value ? value : "";
  if (wanted == "conservative") return true;
  if (wanted.empty() || wanted == "default") return false;
  throw std::runtime_error("nllx: NLLX_CUDA_PLAN is \"" + wanted + "\"; it may be \"default\" or \"conservative\"");
}

}  // namespace

bool plans_are_conservative() {
  static const bool conservative = read_plans_are_conservative();
  return conservative;
}

CudaDevice conservative(CudaDevice device) {
  device.cluster_blocks = 1;
  device.async_copies = false;
  device.conservative = true;
  return device;
}

CudaProblem cuda_problem(const CrossEntropyForward& p, const CrossEntropyBackward* gradient, FloatType type) {
  CudaProblem problem = problem_of(p.extent, p.layout, p.targets, type);
  problem.dense = is_dense(p.extent, p.logits_strides) && (!gradient || is_dense(p.extent, gradient->grad_strides));
  problem.aligned = is_aligned(p.extent, p.layout, p.logits_strides, p.logits, problem.element_bytes);
  return problem;
}

CudaProblem cuda_problem(const CrossEntropyBackward& p, FloatType type) {
  CudaProblem problem = problem_of(p.extent, p.layout, p.targets, type);
  problem.dense = is_dense(p.extent, p.logits_strides) && is_dense(p.extent, p.grad_strides);
  problem.aligned = is_aligned(p.extent, p.layout, p.logits_strides, p.logits, problem.element_bytes) &&
                    is_aligned(p.extent, p.layout, p.grad_strides, p.grad_logits, problem.element_bytes);
  return problem;
}

CudaProblem cuda_problem(const Extent& extent, Layout layout, const void* input, const Strides& strides,
                         FloatType type) {
  CudaProblem problem = problem_of(extent, layout, Targets(), type);
  problem.aligned = is_aligned(extent, layout, strides, input, problem.element_bytes);
  return problem;
}

CudaPlan cuda_plan(CudaOp op, const CudaProblem& p, const CudaDevice& device) {
  if (p.layout == Layout::kPlanes) return planes(op, p, device);
  // Tiles are copied asynchronously where the architecture can, none ahead too.
  const bool has_tiles = p.dense && p.extent.classes <= most_tile_classes(p.element_bytes) && !device.conservative;
  if (has_tiles && op != CudaOp::kLogSoftmax) return tile_rows(p, device);
  if (op == CudaOp::kBackward) return streamed_rows(p, device);
  return has_register_rows(p) ? register_rows(p) : block_rows(op, p, device);
}

}  // namespace nllx
