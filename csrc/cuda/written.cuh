// Where what an operator writes lies in memory, and what else lies there.
#pragma once

#include "common.cuh"

#include <algorithm>
#include <utility>
#include <vector>

namespace flora::cuda {

// The bytes from the first to the last element of a tensor that has some.
struct Range {
  uintptr_t begin, end;
  static Range of(const Tensor& t) {
    Range range{reinterpret_cast<uintptr_t>(t.const_data_ptr()), 0};
    int64_t last = 1;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    range.end = range.begin + static_cast<uintptr_t>(last) * t.element_size();
    return range;
  }
  bool operator<(const Range& other) const { return begin < other.begin; }
};

// What is written, sorted; whether two of them meet, and whether a tensor meets one.
struct Written {
  std::vector<Range> ranges;  // sorted, those that meet joined into one
  bool apart = true;

  void add(const Tensor& t) {
    if (t.numel() > 0) ranges.push_back(Range::of(t));
  }
  void finish() {
    std::sort(ranges.begin(), ranges.end());
    std::vector<Range> joined;
    for (const Range& range : ranges) {
      if (!joined.empty() && range.begin < joined.back().end) {
        apart = false;
        joined.back().end = std::max(joined.back().end, range.end);
      } else {
        joined.push_back(range);
      }
    }
    ranges = std::move(joined);
  }
  bool meets(const Tensor& t) const {
    if (t.numel() == 0) return false;
    const Range range = Range::of(t);
    auto after = std::lower_bound(ranges.begin(), ranges.end(), range.end,
                                  [](const Range& r, uintptr_t end) { return r.begin < end; });
    return after != ranges.begin() && std::prev(after)->end > range.begin;
  }
};

}  // namespace flora::cuda
