// look_over: everything that can be wrong with a merge's factors, asked in one call, since a round has thousands of them.
#pragma once

#include "common.h"
#include "ops.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

namespace flora {

// [first, behind last) address of a tensor's elements; torch has no negative strides.
inline std::pair<uintptr_t, uintptr_t> interval(const Tensor& t) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (t.numel() == 0) return {start, start};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {start, start + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(t.element_size()))};
}

inline bool fits(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale) {
  for (const Tensor* t : {&A, &B, &scale}) {
    if (!is_float(t->scalar_type()) || t->is_cpu() != weight.is_cpu() || t->get_device() != weight.get_device()) return false;
  }
  return A.dim() == 2 && B.dim() == 2 && scale.dim() == 1 && A.size(1) == weight.size(1) && B.size(0) == weight.size(0) &&
         B.size(1) == A.size(0) && scale.size(0) == A.size(0);
}

// {0, 0}: all is well; {1, i}: client i does not fit its weight; {2, i}: of the As, Bs and scales, one after another, the first
// that is not finite; {3, 0}: some factor lies where something is written. In this order; scan: first_not_finite of a device.
template <typename Scan>
std::tuple<int64_t, int64_t> look_over(const std::vector<Tensor>& weights, const std::vector<Tensor>& residuals,
                                       const std::vector<Tensor>& As, const std::vector<Tensor>& Bs,
                                       const std::vector<Tensor>& scales, const std::vector<int64_t>& counts, Scan scan) {
  int64_t given = 0;
  for (const int64_t count : counts) given += count;
  check(counts.size() == weights.size() && As.size() == static_cast<size_t>(given) && Bs.size() == As.size() &&
            scales.size() == As.size(),
        "look_over: expected a count for each weight, and as many As, Bs and scales as these add up to, got ", counts.size(),
        " counts for ", weights.size(), " weights, ", As.size(), ", ", Bs.size(), " and ", scales.size());
  for (size_t l = 0, k = 0; l < weights.size(); ++l) {
    for (const size_t end = k + static_cast<size_t>(counts[l]); k < end; ++k) {
      if (!fits(weights[l], As[k], Bs[k], scales[k])) return {1, static_cast<int64_t>(k)};
    }
  }
  std::vector<Tensor> factors(As);
  factors.insert(factors.end(), Bs.begin(), Bs.end());
  factors.insert(factors.end(), scales.begin(), scales.end());
  if (const int64_t bad = scan(factors); bad >= 0) return {2, bad};

  std::vector<std::pair<uintptr_t, uintptr_t>> written;
  for (const Tensor& t : weights) written.push_back(interval(t));
  for (const Tensor& t : residuals) written.push_back(interval(t));
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i) written[i].second = std::max(written[i].second, written[i - 1].second);
  for (const Tensor& t : factors) {
    const auto [begin, end] = interval(t);
    // Of those that begin before it ends, the farthest end behind its begin.
    auto after = std::partition_point(written.begin(), written.end(), [end = end](const auto& w) { return w.first < end; });
    if (begin < end && after != written.begin() && std::prev(after)->second > begin) return {3, 0};
  }
  return {0, 0};
}

}  // namespace flora
