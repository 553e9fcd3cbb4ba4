// first_not_finite: one read of every tensor, as fast as memory gives it.
#include "../common.h"
#include "../ops.h"
#include "products.h"

#include <atomic>

namespace flora {
namespace {

constexpr const char* kOp = "first_not_finite";
// Elements of a piece of work: long enough to wake a thread for, short enough to share among many.
constexpr int64_t kPieceElements = 1 << 17;

struct Dim {
  int64_t size, stride;
};

// A tensor as `lines` lines of `length` elements. Dimensions that follow each other in memory are one line together, and
// one of stride 0, whose elements are the same ones, is gone.
struct Lines {
  const char* data;
  ScalarType dtype;
  int64_t itemsize, length, stride, total;
  std::vector<Dim> outer;

  explicit Lines(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())), dtype(t.scalar_type()),
        itemsize(static_cast<int64_t>(t.element_size())), length(1), stride(1), total(t.numel() > 0) {
    if (total == 0) return;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) > 1 && t.stride(d) != 0) outer.push_back({t.size(d), t.stride(d)});
    }
    std::sort(outer.begin(), outer.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
    for (const Dim& d : outer) total *= d.size;
    if (!outer.empty()) {
      length = outer.back().size, stride = outer.back().stride;
      outer.pop_back();
    }
    while (!outer.empty() && outer.back().stride == length * stride) {
      length *= outer.back().size;
      outer.pop_back();
    }
  }

  const char* line(int64_t index) const {
    int64_t offset = 0;
    for (auto d = outer.rbegin(); d != outer.rend(); ++d) {
      offset += index % d->size * d->stride;
      index /= d->size;
    }
    return data + offset * itemsize;
  }

  bool not_finite(int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t from = begin % length, n = std::min(length - from, end - begin);
      if (merge_kit<float>().not_finite(dtype, line(begin / length) + from * stride * itemsize, stride, n)) return true;
      begin += n;
    }
    return false;
  }
};

}  // namespace

int64_t first_not_finite_cpu(std::vector<Tensor> tensors) {
  const int64_t none = tensors.size();
  std::vector<Lines> all;
  all.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    if (!t.is_cpu() || !is_float(t.scalar_type())) {
      check_cpu_float(t, t.dim(), kOp, "tensors[" + std::to_string(all.size()) + "]");
    }
    all.emplace_back(t);
  }
  // Small tensors join in one piece of work, large ones are several.
  std::vector<int64_t> first{0};
  for (const Lines& one : all) first.push_back(first.back() + one.total);
  const int64_t total = first.back(), pieces = ceil_div(total, kPieceElements);
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0}, found{none};
  torch::stable::parallel_for(0, std::min(threads, pieces), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < pieces; i = next++) {
      const int64_t begin = i * kPieceElements, end = std::min(total, begin + kPieceElements);
      int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (; t < none && first[t] < end; ++t) {
        if (t >= found) return;  // pieces are taken in order: those to come are later still
        if (!all[t].not_finite(std::max(begin, first[t]) - first[t], std::min(end, first[t + 1]) - first[t])) continue;
        int64_t known = found;
        while (t < known && !found.compare_exchange_weak(known, t)) {
        }
        return;
      }
    }
  });
  return found == none ? -1 : found.load();
}

}  // namespace flora
