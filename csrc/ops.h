// Every native operator, one declaration each. Schemas and registration are in api.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace flora {

using torch::stable::Tensor;

// weight += B diag(scale) A, in place. The sum over ranks is accumulated in fp32 (fp64 for an fp64 weight, and for one
// of at most 4096 elements), added once and rounded once, to nearest even.
//   weight (out, in), A (r, in), B (out, r): float32, float64, float16 or bfloat16 each, any strides;
//   scale (r,): float32. r = 0, out = 0 or in = 0 changes nothing.
void merge_cpu_(Tensor weight, const Tensor& A, const Tensor& B, const Tensor& scale);

// out_A, out_B, out_scale = the ranks of all adapters, one after another. Equal dtypes copy bit for bit.
//   out_A (R, in), out_B (out, R), out_scale (R,), and for each k: As[k] (r_k, in), Bs[k] (out, r_k), scales[k] (r_k,);
//   R = r_0 + r_1 + ...; any mix of the four dtypes (out_scale is float32), any strides.
void stack_cpu_(Tensor out_A, Tensor out_B, Tensor out_scale, const std::vector<Tensor>& As,
                const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales);

}  // namespace flora
