// What every operator shares: checks that say what was expected and what came, and the names of the dtypes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws RuntimeError in Python. STD_TORCH_CHECK would put a source path before the message.
template <typename... Args>
void check(bool condition, const Args&... args) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline std::string name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

// A floating-point CPU tensor of `dims` dimensions; `what` names the argument in the message.
inline void check_cpu_float(const Tensor& t, int64_t dims, const char* op, const std::string& what) {
  check(t.is_cpu(), op, ": expected ", what, " on the CPU, got it on another device; move all tensors to one device");
  check(t.dim() == dims, op, ": expected ", what, " with ", dims, " dimension(s), got shape ", shape(t));
  check(is_float(t.scalar_type()), op, ": expected ", what, " in float32, float64, float16 or bfloat16, got ",
        name(t.scalar_type()));
}

// A tensor that is written: no two of its elements may share memory (an expanded tensor has stride 0).
inline void check_writable(const Tensor& t, const char* op, const std::string& what) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    check(t.size(d) <= 1 || t.stride(d) != 0, op, ": expected ", what, " to own each of its elements, got stride 0 in ",
          "dimension ", d, " of shape ", shape(t), "; clone it first");
  }
}

}  // namespace flora
