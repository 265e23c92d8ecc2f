// Every CPU kernel, compiled once per capability unit.
#include "../../online_softmax.h"
#include "kernels.h"
#include "vec.h"

namespace nllx {
namespace NLLX_CAPABILITY {
namespace {

// Each needs those before it.
// clang-format off
#include "common.inl"
#include "rows.inl"
#include "tiles.inl"
#include "planes.inl"
#include "short_rows.inl"
#include "cross_entropy.inl"
#include "softmax_statistics.inl"
#include "nll_loss.inl"
#include "log_softmax.inl"
#include "elementwise.inl"
#include "mse_loss.inl"
// clang-format on

}  // namespace

#define NLLX_PER_TYPE(kernel) {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}
const CpuKernels kernels = {
    NLLX_PER_TYPE(cross_entropy_forward),
    NLLX_PER_TYPE(cross_entropy_forward_segment),
    NLLX_PER_TYPE(cross_entropy_forward_merge),
    NLLX_PER_TYPE(cross_entropy_backward),
    NLLX_PER_TYPE(nll_loss_forward),
    NLLX_PER_TYPE(nll_loss_backward),
    NLLX_PER_TYPE(softmax_statistics_forward),
    NLLX_PER_TYPE(softmax_statistics_forward_segment),
    NLLX_PER_TYPE(softmax_statistics_forward_merge),
    NLLX_PER_TYPE(softmax_statistics_backward),
    NLLX_PER_TYPE(log_softmax_forward),
    NLLX_PER_TYPE(log_softmax_backward),
    NLLX_PER_TYPE(mse_loss_forward),
    NLLX_PER_TYPE(mse_loss_backward),
};
#undef NLLX_PER_TYPE

}  // namespace NLLX_CAPABILITY
}  // namespace nllx
