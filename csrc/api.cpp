// Schemas and registration, against the LibTorch stable ABI: one binary serves every torch from TORCH_TARGET_VERSION.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#define FLORA_RANKS "Tensor[] frozen, Tensor? row_offsets, Tensor? rank_offsets, Tensor? frozen_ranges, "

STABLE_TORCH_LIBRARY(flora_native, m) {
  m.def(
      "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] As, Tensor[] Bs, Tensor[] scales, " FLORA_RANKS
      "int[] widths, float dropout, Tensor[] keys) -> (Tensor[], Tensor)");
  m.def(
      "lora_linear_backward(Tensor[] dys, Tensor? x, Tensor h, Tensor[] weights, Tensor[] As, Tensor[] Bs, "
      "Tensor[] scales, " FLORA_RANKS
      "int[] widths, float dropout, Tensor[] keys, bool[] needs) -> (Tensor, Tensor[], Tensor[])");
  m.def("lora_add_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor scale, " FLORA_RANKS
        "int width, float dropout, Tensor? keys) -> Tensor");
  m.def(
      "merge_(Tensor(a!)[] weights, Tensor(b!)[] residuals, Tensor[] As, Tensor[] Bs, Tensor[] scales, int[] counts, "
      "int[] seeds) -> ()");
  m.def("first_not_finite(Tensor[] tensors) -> int");  // a part of checked_merge_, by itself for its tests
  m.def(
      "checked_merge_(Tensor(a!)[] weights, Tensor(b!)[] residuals, Tensor[] As, Tensor[] Bs, Tensor[] scales, int[] counts, "
      "int[] seeds, bool write) -> (int, int)");
  m.def(
      "stack_(Tensor(a!) out_A, Tensor(b!) out_B, Tensor(c!) out_scale, Tensor[] As, Tensor[] Bs, Tensor[] scales)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flora_native, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&flora::lora_linear_cpu));
  m.impl("lora_linear_backward", TORCH_BOX(&flora::lora_linear_backward_cpu));
  m.impl("lora_add_", TORCH_BOX(&flora::lora_add_cpu_));
  m.impl("merge_", TORCH_BOX(&flora::merge_cpu_));
  m.impl("first_not_finite", TORCH_BOX(&flora::first_not_finite_cpu));
  m.impl("checked_merge_", TORCH_BOX(&flora::checked_merge_cpu_));
  m.impl("stack_", TORCH_BOX(&flora::stack_cpu_));
}

#ifdef FLORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(flora_native, CUDA, m) {
  m.impl("merge_", TORCH_BOX(&flora::merge_cuda_));
  m.impl("first_not_finite", TORCH_BOX(&flora::first_not_finite_cuda));
  m.impl("checked_merge_", TORCH_BOX(&flora::checked_merge_cuda_));
  m.impl("stack_", TORCH_BOX(&flora::stack_cuda_));
}
#endif
