// stack_: concatenate the ranks of several adapters on a CUDA device, all parts in one launch.
//
// Every factor is one part: rows of units, a unit being the widest power of two bytes (16 at most) by which both sides
// can be moved, or a single element where the dtypes or the strides allow no more.
#include "../ops.h"
#include "common.cuh"

#include <algorithm>
#include <utility>

namespace flora {
namespace {

using namespace cuda;

struct Part {
  const char* from;
  char* to;
  int64_t from_row, from_col, to_row, to_col;  // bytes; columns are those of units
  int64_t units;                               // in a row
  int64_t all;                                 // in all rows
  int64_t begin;                               // the first block
  int32_t from_kind, to_kind, bytes, elements;  // bytes: of a unit that is moved; 0: `elements` are converted
};

constexpr int kThreads = 256;
constexpr int kEach = 4;  // units that a thread has in flight

template <typename U>
__device__ __forceinline__ void move_units(const char* const (&from)[kEach], char* const (&to)[kEach], int count) {
  U held[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < count) held[i] = *reinterpret_cast<const U*>(from[i]);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < count) *reinterpret_cast<U*>(to[i]) = held[i];
  }
}

template <int N>
__device__ __forceinline__ void convert(const char* from, int from_kind, char* to, int to_kind) {
  float x[N];  // exact for every target: what is wider than fp32 is moved, or rounded to fp32 first
  load<N>(from, from_kind, x);
  store<N>(to, to_kind, x);
}

__global__ void __launch_bounds__(kThreads) stack_parts(const Part* parts, int count) {
  const Part p = parts[owner(parts, count, blockIdx.x)];
  const int64_t first = (blockIdx.x - p.begin) * (kThreads * kEach) + threadIdx.x;
  const char* from[kEach];
  char* to[kEach];
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < p.all) mine = i + 1;
    // 64-bit division costs more than the copy.
    const int64_t row = p.all >> 32 ? unit / p.units : static_cast<uint32_t>(unit) / static_cast<uint32_t>(p.units);
    const int64_t col = unit - row * p.units;
    from[i] = p.from + row * p.from_row + col * p.from_col;
    to[i] = p.to + row * p.to_row + col * p.to_col;
  }
  switch (p.bytes) {
    case 16: move_units<uint4>(from, to, mine); return;
    case 8: move_units<uint2>(from, to, mine); return;
    case 4: move_units<uint32_t>(from, to, mine); return;
    case 2: move_units<uint16_t>(from, to, mine); return;
    default: break;
  }
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    const char* a = i == 0 ? from[0] : i == 1 ? from[1] : i == 2 ? from[2] : from[3];
    char* b = i == 0 ? to[0] : i == 1 ? to[1] : i == 2 ? to[2] : to[3];
    if (i >= mine) return;
    if (p.elements == 4) {
      convert<4>(a, p.from_kind, b, p.to_kind);
    } else {
      convert<1>(a, p.from_kind, b, p.to_kind);
    }
  }
}

struct Side {
  char* data;
  int64_t row, col, rows, cols;  // strides in bytes
  int kind;

  // Along the rank (rows of A, columns of B) from `begin`.
  static Side of(const Tensor& t) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    const bool matrix = t.dim() == 2;
    return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), matrix ? t.stride(0) * size : 0,
            (matrix ? t.stride(1) : t.stride(0)) * size, matrix ? t.size(0) : 1, matrix ? t.size(1) : t.size(0), kind_of(t)};
  }
};

// Adds the part that copies `from` to `to` at byte `offset`.
void add(std::vector<Part>& parts, int64_t& blocks, Side from, Side to, int64_t offset) {
  if (from.rows == 0 || from.cols == 0) return;
  to.data += offset;
  // Rows are walked along the closer elements of what is written, as far as there is a choice.
  if (to.col > to.row && from.rows > 1 && to.row > 0) {
    std::swap(to.row, to.col);
    std::swap(from.row, from.col);
    std::swap(from.rows, from.cols);
  }
  const int64_t from_size = itemsize(from.kind), to_size = itemsize(to.kind);
  const bool lines = (from.col == from_size && to.col == to_size) || from.cols == 1;
  int64_t rows = from.rows, cols = from.cols;
  // Lines that follow one another on both sides are one.
  if (lines && (rows == 1 || (from.row == cols * from_size && to.row == cols * to_size))) {
    cols *= rows;
    rows = 1;
  }
  // The power of two bytes, at most 16, that divides the address and the strides of a side.
  auto step = [&](const Side& s, int64_t size) {
    const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(s.data)) | cols * size | (rows > 1 ? s.row : 0) | 16;
    return bits & -bits;
  };
  const bool same = from.kind == to.kind;
  int64_t elements = 1;
  if (lines && same) elements = std::min(step(from, from_size), step(to, to_size)) / from_size;
  if (lines && !same && cols % 4 == 0 && step(from, from_size) % std::min<int64_t>(16, 4 * from_size) == 0 &&
      step(to, to_size) % std::min<int64_t>(16, 4 * to_size) == 0) {
    elements = 4;
  }
  const int64_t units = cols / elements, all = units * rows;
  parts.push_back({from.data, to.data, from.row, lines ? elements * from_size : from.col, to.row,
                   lines ? elements * to_size : to.col, units, all, blocks, from.kind, to.kind,
                   static_cast<int32_t>(same ? elements * from_size : 0), static_cast<int32_t>(elements)});
  blocks += (all + kThreads * kEach - 1) / (kThreads * kEach);
}

}  // namespace

void stack_cuda_(Tensor out_A, Tensor out_B, Tensor out_scale, const std::vector<Tensor>& As,
                 const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales) {
  const int64_t device = out_A.get_device();
  check_cuda_float(out_A, 2, device, "stack_", "out_A (R, in)");
  check_cuda_float(out_B, 2, device, "stack_", "out_B (out, R)");
  check_cuda_float(out_scale, 1, device, "stack_", "out_scale (R,)");
  check(out_scale.scalar_type() == ScalarType::Float, "stack_: expected out_scale in float32, got ",
        name(out_scale.scalar_type()));
  check_writable(out_A, "stack_", "out_A");
  check_writable(out_B, "stack_", "out_B");
  check_writable(out_scale, "stack_", "out_scale");
  check(As.size() == Bs.size() && As.size() == scales.size(),
        "stack_: expected as many As, Bs and scales, got ", As.size(), ", ", Bs.size(), " and ", scales.size());

  const int64_t rank = out_A.size(0), in = out_A.size(1), out = out_B.size(0);
  const Side to_A = Side::of(out_A), to_B = Side::of(out_B), to_scale = Side::of(out_scale);
  std::vector<Part> parts;
  int64_t begin = 0, blocks = 0;
  for (size_t k = 0; k < As.size(); ++k) {
    const std::string index = "[" + std::to_string(k) + "]";
    check_cuda_float(As[k], 2, device, "stack_", "As" + index + " (r, in)");
    check_cuda_float(Bs[k], 2, device, "stack_", "Bs" + index + " (out, r)");
    check_cuda_float(scales[k], 1, device, "stack_", "scales" + index + " (r,)");
    const int64_t r = As[k].size(0);
    check(As[k].size(1) == in && Bs[k].size(0) == out && Bs[k].size(1) == r && scales[k].size(0) == r,
          "stack_: expected As", index, " (r, ", in, "), Bs", index, " (", out, ", r) and scales", index,
          " (r,), got ", shape(As[k]), ", ", shape(Bs[k]), " and ", shape(scales[k]));
    add(parts, blocks, Side::of(As[k]), to_A, begin * to_A.row);
    add(parts, blocks, Side::of(Bs[k]), to_B, begin * to_B.col);
    add(parts, blocks, Side::of(scales[k]), to_scale, begin * to_scale.col);
    begin += r;
  }
  check(begin == rank && out_B.size(1) == rank && out_scale.size(0) == rank,
        "stack_: expected out_A (R, in), out_B (out, R) and out_scale (R,) with R = ", begin,
        ", the sum of the ranks given; got ", shape(out_A), ", ", shape(out_B), " and ", shape(out_scale));
  if (parts.empty()) return;

  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const cudaStream_t stream = current_stream("stack_", device);
  std::vector<char> table;
  append(table, parts);
  const Tensor on_device = upload("stack_", out_scale, table, stream);
  launch("stack_", stack_parts, blocks, kThreads, 0, stream, static_cast<const Part*>(on_device.const_data_ptr()),
         static_cast<int>(parts.size()));
}

}  // namespace flora
