// Schemas and registration, against the LibTorch stable ABI: one binary serves every torch from TORCH_TARGET_VERSION.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flora_native, m) {
  m.def("merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()");
  m.def(
      "stack_(Tensor(a!) out_A, Tensor(b!) out_B, Tensor(c!) out_scale, Tensor[] As, Tensor[] Bs, Tensor[] scales)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_native, CPU, m) {
  m.impl("merge_", TORCH_BOX(&flora::merge_cpu_));
  m.impl("stack_", TORCH_BOX(&flora::stack_cpu_));
}
