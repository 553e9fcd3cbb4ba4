// stack_: concatenate the ranks of several adapters on the CPU.
//
// Rows of the outputs are written from left to right, each once: row j of out_A comes from the adapter that owns rank
// j, row n of out_B takes r_k elements of every adapter in turn. Equal dtypes are moved, not converted.
#include "../common.h"
#include "../ops.h"
#include "dtypes.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace flora {
namespace {

using CopyLine = void (*)(const void*, int64_t, void*, int64_t, int64_t);

// to[i * to_stride] = from[i * stride]
template <typename S, typename D>
void copy_line(const void* from, int64_t stride, void* to, int64_t to_stride, int64_t n) {
  const S* s = static_cast<const S*>(from);
  D* d = static_cast<D*>(to);
  if constexpr (std::is_same_v<S, D>) {
    // Never through arithmetic: a signalling NaN keeps its bits.
    if (stride == 1 && to_stride == 1) {
      std::memcpy(d, s, n * sizeof(D));
    } else {
      for (int64_t i = 0; i < n; ++i) std::memcpy(d + i * to_stride, s + i * stride, sizeof(D));
    }
  } else if (stride == 1 && to_stride == 1) {
    for (int64_t i = 0; i < n; ++i) d[i] = narrow<D>(widen(s[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) d[i * to_stride] = narrow<D>(widen(s[i * stride]));
  }
}

CopyLine choose_copy(ScalarType from, ScalarType to) {
  CopyLine copy = nullptr;
  with_type(from, [&](auto* s) {
    with_type(to, [&](auto* d) {
      copy = &copy_line<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(d)>>;
    });
  });
  return copy;
}

// One adapter's factor, at the rank where it starts in the stack.
struct Part {
  const char* data;
  int64_t row_stride, col_stride, row_bytes, begin, count;
  CopyLine copy;
};

struct Target {
  char* data;
  int64_t row_stride, col_stride, itemsize;
  char* at(int64_t row, int64_t col) const { return data + (row * row_stride + col * col_stride) * itemsize; }
};

Part part(const Tensor& t, ScalarType target, int64_t begin, int64_t count) {
  const int64_t rows = t.stride(0), cols = t.dim() == 2 ? t.stride(1) : 1;
  return {static_cast<const char*>(t.const_data_ptr()), rows, cols, rows * static_cast<int64_t>(t.element_size()),
          begin, count, choose_copy(t.scalar_type(), target)};
}

Target target(const Tensor& t) {
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0), t.dim() == 2 ? t.stride(1) : 1,
          static_cast<int64_t>(t.element_size())};
}

// Elements a thread copies at least: below this, waking it costs more.
constexpr int64_t kGrain = 1 << 15;
int64_t grain(int64_t line) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, line)); }

// out (R, n): rank j is row j - begin of the part that owns it.
void stack_rows(const Target& out, const std::vector<Part>& parts, int64_t rank, int64_t n) {
  auto lines = [&](int64_t begin, int64_t end) {
    auto owner = std::upper_bound(parts.begin(), parts.end(), begin, [](int64_t j, const Part& p) {
      return j < p.begin + p.count;
    });
    for (int64_t j = begin; j < end; ++j) {
      while (j >= owner->begin + owner->count) ++owner;
      owner->copy(owner->data + (j - owner->begin) * owner->row_bytes, owner->col_stride, out.at(j, 0), out.col_stride,
                  n);
    }
  };
  torch::stable::parallel_for(0, rank, grain(n), lines);
}

// out (n, R): row i takes row i of every part in turn.
void stack_columns(const Target& out, const std::vector<Part>& parts, int64_t rank, int64_t n) {
  auto lines = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const Part& p : parts) {
        p.copy(p.data + i * p.row_bytes, p.col_stride, out.at(i, p.begin), out.col_stride, p.count);
      }
    }
  };
  torch::stable::parallel_for(0, n, grain(rank), lines);
}

}  // namespace

void stack_cpu_(Tensor out_A, Tensor out_B, Tensor out_scale, const std::vector<Tensor>& As,
                const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales) {
  check_cpu_float(out_A, 2, "stack_", "out_A (R, in)");
  check_cpu_float(out_B, 2, "stack_", "out_B (out, R)");
  check_cpu_float(out_scale, 1, "stack_", "out_scale (R,)");
  check(out_scale.scalar_type() == ScalarType::Float, "stack_: expected out_scale in float32, got ",
        name(out_scale.scalar_type()));
  check_writable(out_A, "stack_", "out_A");
  check_writable(out_B, "stack_", "out_B");
  check_writable(out_scale, "stack_", "out_scale");
  check(As.size() == Bs.size() && As.size() == scales.size(),
        "stack_: expected as many As, Bs and scales, got ", As.size(), ", ", Bs.size(), " and ", scales.size());

  const int64_t rank = out_A.size(0), in = out_A.size(1), out = out_B.size(0);
  std::vector<Part> A_parts, B_parts, scale_parts;
  int64_t begin = 0;
  for (size_t k = 0; k < As.size(); ++k) {
    const std::string index = "[" + std::to_string(k) + "]";
    check_cpu_float(As[k], 2, "stack_", "As" + index + " (r, in)");
    check_cpu_float(Bs[k], 2, "stack_", "Bs" + index + " (out, r)");
    check_cpu_float(scales[k], 1, "stack_", "scales" + index + " (r,)");
    const int64_t r = As[k].size(0);
    check(As[k].size(1) == in && Bs[k].size(0) == out && Bs[k].size(1) == r && scales[k].size(0) == r,
          "stack_: expected As", index, " (r, ", in, "), Bs", index, " (", out, ", r) and scales", index,
          " (r,), got ", shape(As[k]), ", ", shape(Bs[k]), " and ", shape(scales[k]));
    if (r > 0) {
      A_parts.push_back(part(As[k], out_A.scalar_type(), begin, r));
      B_parts.push_back(part(Bs[k], out_B.scalar_type(), begin, r));
      scale_parts.push_back(part(scales[k], ScalarType::Float, begin, r));
    }
    begin += r;
  }
  check(begin == rank && out_B.size(1) == rank && out_scale.size(0) == rank,
        "stack_: expected out_A (R, in), out_B (out, R) and out_scale (R,) with R = ", begin,
        ", the sum of the ranks given; got ", shape(out_A), ", ", shape(out_B), " and ", shape(out_scale));
  if (rank == 0) return;
  stack_rows(target(out_A), A_parts, rank, in);
  stack_columns(target(out_B), B_parts, rank, out);
  stack_rows(target(out_scale), scale_parts, rank, 1);
}

}  // namespace flora
