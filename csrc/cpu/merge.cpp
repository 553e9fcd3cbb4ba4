// merge_: weight += B diag(scale) A on the CPU.
//
// A tile of sums stays in registers over all ranks and meets the weight once, so the weight is read once, written once
// and rounded once, and no dense product exists. Both factors are packed beforehand into panels of the working type
// (fp32; fp64 for an fp64 or a very small weight), with the scale on B; their dtypes and strides end there. Every
// element adds its ranks in the same order whichever thread computes it and however the work is cut: same bits for any
// thread count.
#include "../common.h"
#include "../ops.h"
#include "kit.h"

#include <algorithm>
#include <memory>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flora {
namespace {

#if defined(__x86_64__)
#define FLORA_F16C 1
namespace avx512 {
#define FLORA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define ROWS 6
#define VECTORS 4
#include "tile.h"
#undef FLORA_TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef VECTORS
}  // namespace avx512
namespace avx2 {
#define FLORA_TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define ROWS 6
#define VECTORS 2
#include "tile.h"
#undef FLORA_TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef VECTORS
}  // namespace avx2
#undef FLORA_F16C
#endif

#define FLORA_F16C 0
namespace baseline {
#define FLORA_TARGET
#define VECTOR_BYTES 16
#define ROWS 6
#define VECTORS 2
#include "tile.h"
}  // namespace baseline

// The leaves of one instruction set for working type T, chosen once per call.
template <typename T>
struct Leaves {
  int64_t rows, cols;
  void (*multiply)(int64_t, const T*, const T*, bool, T*);
  void (*pack_left)(const View&, const float*, int64_t, int64_t, T*);
  void (*pack_right)(const View&, int64_t, int64_t, T*);
  void (*add_tile)(void*, int64_t, int64_t, int64_t, int64_t, const T*);
};

#define FLORA_LEAVES(set)                                                                                  \
  leaves.rows = set::kRows;                                                                                \
  leaves.cols = set::kCols<T>;                                                                             \
  leaves.multiply = &set::multiply<T>;                                                                     \
  with_type(left, [&](auto* s) { leaves.pack_left = &set::pack_left<Storage<decltype(s)>, T>; });          \
  with_type(right, [&](auto* s) { leaves.pack_right = &set::pack_right<Storage<decltype(s)>, T>; });       \
  with_type(weight, [&](auto* s) { leaves.add_tile = &set::add_tile<Storage<decltype(s)>, T>; });          \
  return leaves

template <typename T>
Leaves<T> choose_leaves(ScalarType left, ScalarType right, ScalarType weight) {
  Leaves<T> leaves{};
#if defined(__x86_64__)
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) {
    FLORA_LEAVES(avx512);
  }
  if (has_avx2) {
    FLORA_LEAVES(avx2);
  }
#endif
  FLORA_LEAVES(baseline);
}

int64_t panels(int64_t size, int64_t width) { return (size + width - 1) / width; }

// weight (left.rows, right.cols) with the shorter stride along its columns.
struct Product {
  char* weight;
  int64_t itemsize, row_stride, col_stride;
  View left, right;
  const float* scale;

  char* at(int64_t row, int64_t col) const { return weight + (row * row_stride + col * col_stride) * itemsize; }
};

// Enough work for a thread to be worth waking, in multiply-adds.
constexpr int64_t kGrain = 1 << 18;
// Ranks summed before the next tile's turn; more than these and the tile's sums are parked in a scratch buffer.
constexpr int64_t kDepth = 256;

// Both factors packed, and how the weight is cut: tiles (rows, cols) in registers, blocks (row_step, col_step) of them.
template <typename T>
struct Plan {
  const Product& p;
  const Leaves<T>& leaves;
  const T* left;
  const T* right;
  int64_t rank, row_panels, col_panels, row_step, col_step;

  // Reads ahead the lines of a tile of the weight, which come from memory.
  void fetch(int64_t i, int64_t j) const {
    if (j >= col_panels || p.col_stride != 1) return;
    const int64_t height = std::min(leaves.rows, p.left.rows - i * leaves.rows);
    const int64_t bytes = std::min(leaves.cols, p.right.cols - j * leaves.cols) * p.itemsize;
    for (int64_t r = 0; r < height; ++r) {
      const char* line = p.at(i * leaves.rows + r, j * leaves.cols);
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b, 1);
    }
  }

  void tile(int64_t i, int64_t j, int64_t k, T* sum) const {
    const int64_t depth = std::min(kDepth, rank - k), row = i * leaves.rows, col = j * leaves.cols;
    const bool last = k + depth == rank;
    if (last) fetch(i, j + 1);
    leaves.multiply(depth, left + (i * rank + k) * leaves.rows, right + (j * rank + k) * leaves.cols, k > 0, sum);
    if (!last) return;
    leaves.add_tile(p.at(row, col), p.row_stride, p.col_stride, std::min(leaves.rows, p.left.rows - row),
                    std::min(leaves.cols, p.right.cols - col), sum);
  }

  // One block: its share of `right` stays in the L2 cache while the panels of `left` pass.
  void block(int64_t i0, int64_t j0, T* sums) const {
    const int64_t i1 = std::min(row_panels, i0 + row_step), j1 = std::min(col_panels, j0 + col_step);
    const int64_t parked = rank > kDepth ? leaves.rows * leaves.cols : 0;
    for (int64_t k = 0; k < rank; k += kDepth) {
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) tile(i, j, k, sums + ((i - i0) * col_step + (j - j0)) * parked);
      }
    }
  }
};

template <typename T>
void merge_as(const Product& p, ScalarType weight) {
  const Leaves<T> leaves = choose_leaves<T>(p.left.dtype, p.right.dtype, weight);
  const int64_t rank = p.left.cols, size = leaves.rows * leaves.cols;
  const int64_t row_panels = panels(p.left.rows, leaves.rows), col_panels = panels(p.right.cols, leaves.cols);
  const auto left = buffer<T>(row_panels * leaves.rows * rank);
  const auto right = buffer<T>(col_panels * leaves.cols * rank);
  torch::stable::parallel_for(
      0, row_panels, std::max<int64_t>(1, kGrain / 16 / (leaves.rows * rank)),
      [&](int64_t begin, int64_t end) { leaves.pack_left(p.left, p.scale, begin, end, left.get()); });
  torch::stable::parallel_for(
      0, col_panels, std::max<int64_t>(1, kGrain / 16 / (leaves.cols * rank)),
      [&](int64_t begin, int64_t end) { leaves.pack_right(p.right, begin, end, right.get()); });

  constexpr int64_t kRightBytes = 1 << 18;
  Plan<T> plan{p, leaves, left.get(), right.get(), rank, row_panels, col_panels, 16, 1};
  plan.col_step = std::max<int64_t>(1, kRightBytes / (std::min(rank, kDepth) * leaves.cols * int64_t{sizeof(T)}));
  plan.col_step = std::min(plan.col_step, col_panels);
  // Enough blocks for every thread, even of a small weight; the cut does not change the sums.
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  auto count = [&] { return panels(row_panels, plan.row_step) * panels(col_panels, plan.col_step); };
  while (plan.row_step > 2 && count() < wanted) plan.row_step /= 2;
  while (plan.col_step > 1 && count() < wanted) plan.col_step = (plan.col_step + 1) / 2;

  // Blocks of nearly one size, in an order that gives each thread a like share.
  plan.row_step = panels(row_panels, panels(row_panels, plan.row_step));
  plan.col_step = panels(col_panels, panels(col_panels, plan.col_step));
  const int64_t col_blocks = panels(col_panels, plan.col_step);
  const int64_t work = size * plan.row_step * plan.col_step * rank;
  torch::stable::parallel_for(
      0, count(), std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
        const auto sums = buffer<T>(rank > kDepth ? size * plan.row_step * plan.col_step : size);
        for (int64_t b = begin; b < end; ++b) {
          plan.block(b / col_blocks * plan.row_step, b % col_blocks * plan.col_step, sums.get());
        }
      });
}

// Up to this many elements fp64 sums cost nothing, and a sum that cancels has no neighbours to hide its error among.
constexpr int64_t kSmallWeight = 4096;

View view(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

}  // namespace

void merge_cpu_(Tensor weight, const Tensor& A, const Tensor& B, const Tensor& scale) {
  check_cpu_float(weight, 2, "merge_", "weight (out, in)");
  check_cpu_float(A, 2, "merge_", "A (r, in)");
  check_cpu_float(B, 2, "merge_", "B (out, r)");
  check_cpu_float(scale, 1, "merge_", "scale (r,)");
  check(scale.scalar_type() == ScalarType::Float, "merge_: expected scale in float32, got ",
        name(scale.scalar_type()));
  const int64_t out = weight.size(0), in = weight.size(1), rank = A.size(0);
  check(A.size(1) == in && B.size(0) == out && B.size(1) == rank && scale.size(0) == rank,
        "merge_: expected A (r, in), B (out, r) and scale (r,) for a weight (out, in) of shape ", shape(weight),
        ", got A ", shape(A), ", B ", shape(B), ", scale ", shape(scale));
  check_writable(weight, "merge_", "weight");
  if (out == 0 || in == 0 || rank == 0) return;

  std::unique_ptr<float[]> copy;
  const float* scale_data = scale.const_data_ptr<float>();
  if (rank > 1 && scale.stride(0) != 1) {
    copy.reset(new float[rank]);
    for (int64_t k = 0; k < rank; ++k) copy[k] = scale_data[k * scale.stride(0)];
    scale_data = copy.get();
  }
  Product p{static_cast<char*>(weight.mutable_data_ptr()), static_cast<int64_t>(weight.element_size()),
            weight.stride(0), weight.stride(1), view(B), view(A), scale_data};
  // Tiles are wide along the closer elements: a weight laid out by columns is merged as Wᵀ += Aᵀ diag(scale) Bᵀ.
  const bool by_columns = in == 1 || (out > 1 && p.row_stride < p.col_stride);
  if (by_columns) {
    std::swap(p.row_stride, p.col_stride);
    p.left = view(A).transposed();
    p.right = view(B).transposed();
  }
  if (weight.scalar_type() == ScalarType::Double || out * in <= kSmallWeight) {
    merge_as<double>(p, weight.scalar_type());
  } else {
    merge_as<float>(p, weight.scalar_type());
  }
}

}  // namespace flora
