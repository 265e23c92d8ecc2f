#include <torch/library.h>

namespace nllx {

TORCH_LIBRARY_FRAGMENT(nllx, m) {
  // For the definitions: the classes of `target` as int64, 0 where it is ignore_index; IndexError where it is neither.
  // A check that Python made would be removed by torch.compile.
  m.def("_checked_target(Tensor target, SymInt classes, SymInt ignore_index, str op) -> Tensor");
}

}  // namespace nllx
