// Every native operator, one declaration each. Schemas and registration are in api.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace flora {

using torch::stable::Tensor;

// weights[l] += the sum over the layer's clients of B diag(scale) A, in place, for every layer l. Sums over all ranks are
// fp32 (fp64 for an fp64 weight, and for one of at most 4096 elements), added once and rounded once; same bits for any
// number of threads. flora/kernels/reference.py defines the roundings; a thread's scratch is under 1 MB.
//   weights[l] (out, in); residuals: none, or one for each weight, of its shape; counts[l]: clients of layer l, whose As
//   (r, in), Bs (out, r) and scales (r,) follow those of the layers before; seeds: none (round to nearest even), or one for
//   each weight. Any mix of the four dtypes, any strides; scales float32. No two of what is written may share memory.
void merge_cpu_(std::vector<Tensor> weights, std::vector<Tensor> residuals, std::vector<Tensor> As, std::vector<Tensor> Bs,
                std::vector<Tensor> scales, std::vector<int64_t> counts, std::vector<int64_t> seeds);

// The index of the first tensor that holds a NaN or an infinity, -1 if none does. Any of the four dtypes, shapes, strides.
int64_t first_not_finite_cpu(std::vector<Tensor> tensors);

// merge_ where nothing is wrong with its factors and `write` is set; says what is wrong (look_over.h), {0, 0} for nothing.
std::tuple<int64_t, int64_t> checked_merge_cpu_(std::vector<Tensor> weights, std::vector<Tensor> residuals,
                                                std::vector<Tensor> As, std::vector<Tensor> Bs, std::vector<Tensor> scales,
                                                std::vector<int64_t> counts, std::vector<int64_t> seeds, bool write);

// out_A, out_B, out_scale = the ranks of all adapters, one after another. Equal dtypes copy bit for bit.
//   out_A (R, in), out_B (out, R), out_scale (R,), and for each k: As[k] (r_k, in), Bs[k] (out, r_k), scales[k] (r_k,);
//   R = r_0 + r_1 + ...; any mix of the four dtypes (out_scale is float32), any strides.
void stack_cpu_(Tensor out_A, Tensor out_B, Tensor out_scale, const std::vector<Tensor>& As,
                const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales);

// y_l = x W_l^T + bias_l + h_l B_l^T for every layer l, and h_l = (dropout(x) A_l^T) * scale_l, all in x's dtype. Sums are
// fp32 (fp64 for fp64) and rounded once. Same bits for any number of threads. Lists are over layers.
//   x (M, in); weights[l] (out_l, in); biases[l] (out_l,) or none; As[l] (R_l, in), Bs[l] (out_l, R_l), scales[l] (R_l,);
//   frozen: none, or A (F, in), B (out_l, F), scale (F,) of each layer; any mix of the four dtypes, any strides, scales
//   fp32. row_offsets, rank_offsets (clients + 1,), frozen_ranges (clients, 2): int64 or none. widths[l]: columns of h_l.
//   keys: none, or int64 (M,) of each layer. Returns ys[l] (M, out_l), h (M, sum of widths).
std::tuple<std::vector<Tensor>, Tensor> lora_linear_cpu(
    const Tensor& x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases, std::vector<Tensor> As,
    std::vector<Tensor> Bs, std::vector<Tensor> scales, std::vector<Tensor> frozen, std::optional<Tensor> row_offsets,
    std::optional<Tensor> rank_offsets, std::optional<Tensor> frozen_ranges, std::vector<int64_t> widths, double dropout,
    std::vector<Tensor> keys);

// The gradients that `needs` asks for: dx, every dA, every dB; an empty tensor for another.
//   dys[l] (M, out_l) of one dtype; x (M, in), or none without dA; h as above; weights: none where dx is the LoRA path's
//   alone. Returns dx (M, in), dAs[l] (R_l, in), dBs[l] (out_l, R_l).
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_cpu(
    std::vector<Tensor> dys, std::optional<Tensor> x, const Tensor& h, std::vector<Tensor> weights, std::vector<Tensor> As,
    std::vector<Tensor> Bs, std::vector<Tensor> scales, std::vector<Tensor> frozen, std::optional<Tensor> row_offsets,
    std::optional<Tensor> rank_offsets, std::optional<Tensor> frozen_ranges, std::vector<int64_t> widths, double dropout,
    std::vector<Tensor> keys, std::vector<bool> needs);

// y (M, out) += h B^T in place, any dtype and strides; returns h (M, width). One layer; the rest as lora_linear_cpu.
Tensor lora_add_cpu_(Tensor y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scale,
                     std::vector<Tensor> frozen, std::optional<Tensor> row_offsets, std::optional<Tensor> rank_offsets,
                     std::optional<Tensor> frozen_ranges, int64_t width, double dropout, std::optional<Tensor> keys);

#ifdef FLORA_WITH_CUDA
// weights[l] += sum over the clients k of layer l of B_k diag(scale_k) A_k, in place, every weight read and written once.
// Sums are fp32 (fp64 for an fp64 weight).
//   weights[l] (out_l, in_l); counts[l]: clients of layer l, whose factors follow those of layer l - 1: As[k] (r_k, in_l),
//   Bs[k] (out_l, r_k): float32, float64, float16 or bfloat16 each, any strides; scales[k] (r_k,): float32.
//   residuals: none, or one of each weight's shape, added to the sum; what the rounding of the weight loses is left there.
//   seeds: none (to nearest even), or one for each layer: stochastic rounding of what is rounded last.
void merge_cuda_(std::vector<Tensor> weights, std::vector<Tensor> residuals, const std::vector<Tensor>& As,
                 const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales, std::vector<int64_t> counts,
                 std::vector<int64_t> seeds);
// As first_not_finite_cpu; waits for the answer.
int64_t first_not_finite_cuda(std::vector<Tensor> tensors);
// As checked_merge_cpu_; waits for the answer, not for the merge.
std::tuple<int64_t, int64_t> checked_merge_cuda_(std::vector<Tensor> weights, std::vector<Tensor> residuals,
                                                 std::vector<Tensor> As, std::vector<Tensor> Bs, std::vector<Tensor> scales,
                                                 std::vector<int64_t> counts, std::vector<int64_t> seeds, bool write);
// As stack_cpu_.
void stack_cuda_(Tensor out_A, Tensor out_B, Tensor out_scale, const std::vector<Tensor>& As,
                 const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales);
#endif

}  // namespace flora
