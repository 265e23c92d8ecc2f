// CPU entry of _checked_target.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <string_view>

#include "../checks.h"
#include "../layout.h"
#include "../online_softmax.h"

namespace nllx {

at::Tensor checked_target_cpu(const at::Tensor& target, int64_t classes, int64_t ignore_index, std::string_view op) {
  const IndexType type = index_type(target.scalar_type());
  check_memory("nllx", "target", target);
  const at::Tensor source = aligned(target.contiguous());
  at::Tensor result = at::empty(target.sizes(), target.options().dtype(at::kLong));
  const void* index = source.const_data_ptr();
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < target.numel(); ++row) {
    const int64_t y = load_index(index, type, row);
    if (y != ignore_index && !is_class(y, classes)) {
      raise_bad_target(std::string(op).c_str(), target.sizes(), row, y, classes, ignore_index);
    }
    out[row] = y == ignore_index ? 0 : y;
  }
  return result;
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) { m.impl("_checked_target", &checked_target_cpu); }

}  // namespace nllx
