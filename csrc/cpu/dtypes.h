// The four storage types and the conversions between them, bit for bit those of PyTorch.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

namespace flora {

using torch::headeronly::ScalarType;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename D>
inline D narrow(double x) {
  return static_cast<D>(x);
}
// fp64 to a 16-bit type goes through fp32, as in PyTorch.
template <>
inline Half narrow<Half>(double x) {
  return {torch::headeronly::detail::fp16_ieee_from_fp32_value(static_cast<float>(x))};
}
template <typename D>
inline D narrow(float x) {
  return static_cast<D>(x);
}
template <>
inline Half narrow<Half>(float x) {
  return {torch::headeronly::detail::fp16_ieee_from_fp32_value(x)};
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // A select, not a branch, so that the loops around this vectorise.
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
inline BFloat16 narrow<BFloat16>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}

// A read-only matrix with any strides, in elements. `at` is typed by the caller, who switched on `dtype`.
struct View {
  const void* data;
  ScalarType dtype;
  int64_t rows, cols, row_stride, col_stride;

  View transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  template <typename S>
  const S* at(int64_t row, int64_t col) const {
    return static_cast<const S*>(data) + row * row_stride + col * col_stride;
  }
};

// Calls f with a null pointer of the storage type of `dtype`, which the operator has checked to be one of the four.
template <typename F>
inline void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); break;
    case ScalarType::Double: f(static_cast<double*>(nullptr)); break;
    case ScalarType::Half: f(static_cast<Half*>(nullptr)); break;
    default: f(static_cast<BFloat16*>(nullptr)); break;
  }
}

}  // namespace flora
