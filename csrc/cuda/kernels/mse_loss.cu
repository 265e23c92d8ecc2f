#include "dispatch.cuh"
#include "mse_loss.cuh"

namespace nllx {

namespace {

// A thread of the last block adds a few partial sums, one of the others a few vectors.
constexpr int64_t kElementsPerChunk = 4096, kMostChunks = 4096;
static_assert(kElementsPerChunk % ElementwiseStep<__half, true>::kElements == 0);
static_assert(kElementsPerChunk % ElementwiseStep<float, true>::kElements == 0);
static_assert(kElementsPerChunk % ElementwiseStep<double, true>::kElements == 0);
static_assert(kElementsPerChunk % ElementwiseStep<float, false>::kElements == 0);

constexpr int64_t elements_per_chunk(int64_t count) {
  const int64_t groups = (count + kElementsPerChunk - 1) / kElementsPerChunk;
  return kElementsPerChunk * ((groups + kMostChunks - 1) / kMostChunks);
}
constexpr int64_t chunks(int64_t count) { return (count + elements_per_chunk(count) - 1) / elements_per_chunk(count); }
// More elements than a 32-bit index names.
constexpr int64_t kMany = (int64_t{1} << 40) + 1;
static_assert(chunks(kMany) <= kMostChunks && chunks(kMany) * elements_per_chunk(kMany) >= kMany);
static_assert((chunks(kMany) - 1) * elements_per_chunk(kMany) < kMany);

bool in_vectors(const void* data, const ElementStrides& strides) {
  return !data || (strides.adjacent && reinterpret_cast<uintptr_t>(data) % 16 == 0);
}

// Calls body(type, whether in vectors).
template <typename Body>
void with_instance(FloatType type, bool vectors, Body body) {
  with_element_type(type, [&](auto tag) { vectors ? body(tag, std::true_type()) : body(tag, std::false_type()); });
}

}  // namespace

LossWorkspace elementwise_workspace(const Elements& elements) {
  LossWorkspace w;
  const int64_t n = chunks(elements.count);
  if (n > 1) w.partials = 2 * n;
  w.counters = n > 1;
  return w;
}

cudaError_t launch_mse_loss_forward(const ElementwiseForward& p, const LossReduction& r, FloatType type,
                                    cudaStream_t stream) {
  const bool vectors = in_vectors(p.input, p.input_strides) && in_vectors(p.target, p.target_strides) &&
                       in_vectors(p.weight, p.weight_strides) && in_vectors(p.loss, p.loss_strides);
  with_instance(type, vectors, [&](auto tag, auto in_vectors) {
    using T = typename decltype(tag)::type;
    CUDA_LAUNCH((mse_loss_forward_kernel<T, decltype(in_vectors)::value>), grid_of(chunks(p.elements.count)),
                block_of(kElementwiseThreads), 0, stream, p, r, elements_per_chunk(p.elements.count));
  });
  launch_loss_sum(r, Targets(), chunks(p.elements.count), type, kElementwiseThreads, stream);
  return cudaGetLastError();
}

cudaError_t launch_mse_loss_backward(const ElementwiseBackward& p, FloatType type, cudaStream_t stream) {
  const bool vectors = in_vectors(p.input, p.input_strides) && in_vectors(p.target, p.target_strides) &&
                       in_vectors(p.weight, p.weight_strides) && in_vectors(p.grad_input, p.grad_input_strides) &&
                       in_vectors(p.grad_target, p.grad_target_strides) &&
                       (p.one_grad_output || in_vectors(p.grad_output, p.grad_output_strides));
  with_instance(type, vectors, [&](auto tag, auto in_vectors) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kElements = ElementwiseStep<T, decltype(in_vectors)::value>::kElements;
    CUDA_LAUNCH((mse_loss_backward_kernel<T, decltype(in_vectors)::value>),
                grid_of((p.elements.count + kElements - 1) / kElements), block_of(kElementwiseThreads), 0, stream, p);
  });
  return cudaGetLastError();
}

}  // namespace nllx
