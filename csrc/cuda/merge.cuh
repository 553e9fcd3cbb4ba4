// merge_ on the device: what the host tells the kernels, and how a sum meets its element of the weight.
#pragma once

#include "common.cuh"

namespace flora::cuda {

// One weight, as rows and columns of which the columns lie closer in memory: a weight stored by columns is its transpose,
// and `transposed` says so, since the noise belongs to (out, in). Strides are in bytes.
struct Layer {
  char* weight;
  char* residual;  // or null
  int64_t weight_row, weight_col, residual_row, residual_col;
  int64_t begin;         // the first item (block) of this layer
  int64_t rank_begin;    // in the table of ranks
  int32_t rows, cols;
  int32_t steps;         // of 16 ranks
  int32_t row_tiles, col_tiles, span;  // span: tiles, one below the other, of an item
  int32_t weight_kind, residual_kind, noisy, transposed;
  int32_t wide;  // weight and residual can be moved 16 bytes at a time
  uint32_t seed_low, seed_high;
};

// One client's factors: left (rows, count) has the scale, right (count, cols). Strides are in bytes.
struct Client {
  const char* left;
  const char* right;
  const char* scale;
  int64_t left_row, left_col, right_row, right_col, scale_step, cols;
  int64_t begin;  // its first entry in the table of ranks
  int32_t count, left_kind, right_kind;
  int32_t scaled;  // whether its factors meet the matrix instruction in fp16, by powers of two
};

// One rank, made on the device by `list_ranks`. Every layer has a multiple of 16; those beyond its own have no `left`.
struct alignas(16) Rank {
  const char* left;
  const char* right;
  int64_t left_row, right_col;
  float left_factor, right_factor, scale;
  uint8_t left_kind, right_kind;
  uint8_t left_quads;   // this rank and the next three are neighbours, aligned, in every row
  uint8_t right_quads;  // four columns from a multiple of four on can be read at once
};

constexpr int kStep = 16;  // ranks of one matrix instruction

// ---- rounding -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t mix32(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x85EBCA6Bu;
  z = (z ^ (z >> 13)) * 0xC2B2AE35u;
  return z ^ (z >> 16);
}

// The part of an element's 32 random bits that row i of the logical weight settles.
__device__ __forceinline__ uint32_t draw_row(const Layer& l, uint32_t i) {
  return mix32((i * 0x9E3779B1u) ^ l.seed_low) ^ l.seed_high;
}

// x rounded up or down to `kind` with the odds that its distances to both give; a number of that kind.
template <typename T>
__device__ __forceinline__ T round_by_chance(T value, int kind, uint32_t bits) {
  const float x = static_cast<float>(value);
  if (kind == kFloat || kind == kDouble || !isfinite(x)) return value;
  const uint32_t held = __float_as_uint(x);
  if (kind == kBFloat16) return __uint_as_float((held + (bits & 0xFFFFu)) & 0xFFFF0000u);
  if (fabsf(x) >= 6.103515625e-05f) return __uint_as_float((held + (bits & 0x1FFFu)) & 0xFFFFE000u);
  const float y = fabsf(x) * 16777216.0f, whole = floorf(y);  // in steps of fp16's smallest number
  const float up = y - whole > static_cast<float>(bits >> 8) * 5.9604644775390625e-08f ? 1.0f : 0.0f;
  return copysignf((whole + up) * 5.9604644775390625e-08f, x);
}

// v to nearest even in `kind`, as T again.
template <typename T>
__device__ __forceinline__ T round_to_nearest(T v, int kind) {
  T result = v;
  with_kind(kind, [&](auto s) { result = static_cast<T>(widen(narrow<decltype(s)>(v))); });
  return result;
}

// Nothing here may be contracted into a fused multiply-add or reordered: the lost bits are the point.
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double minus(double a, double b) { return __dsub_rn(a, b); }

// weight[row, col + e] += sum[e] with all that the call asks for: the residual, the noise. N = 1, or 4 where l.wide.
template <int N, typename T>
__device__ __forceinline__ void meet(const Layer& l, int row, int col, const T (&sum)[N]) {
  char* const weight = l.weight + row * l.weight_row + col * l.weight_col;
  T w[N];
  load<N>(weight, l.weight_kind, w);
  const auto bits = [&](int e) {
    const uint32_t i = static_cast<uint32_t>(l.transposed ? col + e : row), j = static_cast<uint32_t>(l.transposed ? row : col + e);
    return mix32((j * 0x9E3779B1u) ^ draw_row(l, i));
  };
  if (l.residual) {
    char* const residual = l.residual + row * l.residual_row + col * l.residual_col;
    T rest[N];
    load<N>(residual, l.residual_kind, rest);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const T t = plus(sum[e], rest[e]), v = round_to_nearest(plus(w[e], t), l.weight_kind), added = minus(v, w[e]);
      rest[e] = plus(minus(w[e], minus(v, added)), minus(t, added));
      if (l.noisy) rest[e] = round_by_chance(rest[e], l.residual_kind, bits(e));
      w[e] = v;
    }
    store<N>(residual, l.residual_kind, rest);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      w[e] = plus(w[e], sum[e]);
      if (l.noisy) w[e] = round_by_chance(w[e], l.weight_kind, bits(e));
    }
  }
  store<N>(weight, l.weight_kind, w);
}

}  // namespace flora::cuda
