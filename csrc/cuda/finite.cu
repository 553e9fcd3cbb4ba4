// first_not_finite on a CUDA device: all tensors in one launch, one number back.
//
// A tensor is lines of elements; a thread reads 16 bytes of a line where they lie together and aligned, else one element.
#include "../ops.h"
#include "common.cuh"

#include <algorithm>
#include <cfloat>
#include <climits>

namespace flora {
namespace {

using namespace cuda;

struct Lines {
  const char* data;
  int64_t row, col;   // bytes
  int64_t cols;
  int64_t units;      // in a line
  int64_t all;        // in all lines
  int64_t begin;      // the first block
  int32_t kind, each, which;  // each: elements of a unit
};

constexpr int kScanThreads = 256;
constexpr int kScanEach = 4;  // units of a thread

__device__ __forceinline__ bool is_finite(double x) { return fabs(x) <= DBL_MAX; }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

__global__ void __launch_bounds__(kScanThreads) scan(const Lines* lines, int count, int* first) {
  const Lines l = lines[owner(lines, count, blockIdx.x)];
  const int64_t begin = (blockIdx.x - l.begin) * (kScanThreads * kScanEach) + threadIdx.x;
  bool fine = true;
#pragma unroll 2
  for (int i = 0; i < kScanEach; ++i) {
    const int64_t unit = begin + i * kScanThreads;
    if (unit >= l.all) break;
    const int64_t row = l.all >> 32 ? unit / l.units : static_cast<uint32_t>(unit) / static_cast<uint32_t>(l.units);
    const int64_t col = (unit - row * l.units) * l.each;
    const char* const from = l.data + row * l.row + col * l.col;
    with_kind(l.kind, [&](auto s) {
      using S = decltype(s);
      constexpr int kWide = 16 / static_cast<int>(sizeof(S));
      if (l.each == kWide && col + kWide <= l.cols) {
        const auto pack = *reinterpret_cast<const Pack<S, kWide>*>(from);
#pragma unroll
        for (int e = 0; e < kWide; ++e) fine &= is_finite(widen(pack.at[e]));
      } else {
        for (int e = 0; e < l.each && col + e < l.cols; ++e) {
          fine &= is_finite(widen(*reinterpret_cast<const S*>(from + e * l.col)));
        }
      }
    });
  }
  if (!fine) atomicMin(first, l.which);
}

// Elements that lie without gaps in any order of dimensions are one line; what has more than two dimensions and gaps is copied.
Lines lines_of(const Tensor& t, std::vector<Tensor>& copies) {
  const int64_t size = static_cast<int64_t>(t.element_size()), dims = t.dim();
  Lines l = {static_cast<const char*>(t.const_data_ptr()), 0, size, t.numel(), 0, 0, 0, kind_of(t), 1, 0};
  if (t.is_contiguous()) return l;
  if (dims > 2) {
    copies.push_back(torch::stable::clone(t));
    l.data = static_cast<const char*>(copies.back().const_data_ptr());
    return l;
  }
  const bool down = dims == 2 && t.stride(0) < t.stride(1);  // columns whose elements lie closer are the lines
  l.cols = dims == 1 ? t.size(0) : t.size(down ? 0 : 1);
  l.col = (dims == 1 ? t.stride(0) : t.stride(down ? 0 : 1)) * size;
  l.row = dims == 1 ? 0 : t.stride(down ? 1 : 0) * size;
  return l;
}

}  // namespace

int64_t first_not_finite_cuda(std::vector<Tensor> tensors) {
  if (tensors.empty()) return -1;
  const int64_t device = tensors[0].get_device();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (is_cuda_float(tensors[i], tensors[i].dim(), device)) continue;
    check_cuda_float(tensors[i], tensors[i].dim(), device, "first_not_finite", "tensors[" + std::to_string(i) + "]");
  }
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const cudaStream_t stream = current_stream("first_not_finite", device);
  std::vector<Tensor> copies;
  std::vector<Lines> lines;
  int64_t blocks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    Lines l = lines_of(tensors[i], copies);
    const int64_t size = itemsize(l.kind), number = tensors[i].numel() / l.cols;
    const bool wide = l.col == size && (reinterpret_cast<uintptr_t>(l.data) | static_cast<uintptr_t>(l.row)) % 16 == 0;
    l.each = static_cast<int32_t>(wide ? 16 / size : 1);
    l.units = (l.cols + l.each - 1) / l.each;
    l.all = l.units * number;
    l.begin = blocks;
    l.which = static_cast<int32_t>(i);
    blocks += (l.all + kScanThreads * kScanEach - 1) / (kScanThreads * kScanEach);
    lines.push_back(l);
  }
  if (lines.empty()) return -1;
  std::vector<char> table;
  append(table, lines);
  int first = INT_MAX;
  const size_t first_at = append(table, std::vector<int>{first});
  const Tensor on_device = upload("first_not_finite", tensors[0], table, stream);
  char* const base = static_cast<char*>(on_device.mutable_data_ptr());
  launch("first_not_finite", scan, blocks, kScanThreads, 0, stream, reinterpret_cast<const Lines*>(base),
         static_cast<int>(lines.size()), reinterpret_cast<int*>(base + first_at));
  check_cuda("first_not_finite", "the answer's copy",
             cudaMemcpyAsync(&first, base + first_at, sizeof(first), cudaMemcpyDeviceToHost, stream));
  check_cuda("first_not_finite", "the scan", cudaStreamSynchronize(stream));
  return first == INT_MAX ? -1 : first;
}

}  // namespace flora
