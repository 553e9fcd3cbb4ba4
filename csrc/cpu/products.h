// The three products that the LoRA operators are made of, cut into tiles and shared among threads.
//
//   shrink:  h = (left right) * scale             few columns: right is A transposed, or B
//   expand:  out = sum over terms of left right   the base product and every low-rank one in a single pass over out
//   reduce:  out = left^T right                   the depth is the rows: dA and dB
//
// Rows that use ranks of their own are segments, and a tile never mixes the ranks of two. Every element is summed in one
// order, whichever thread computes it: same bits for any number of threads.
#pragma once

#include "kit.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace flora {

// Rows [row, row_end) use the ranks [rank, rank_end).
struct Segment {
  int64_t row, row_end, rank, rank_end;
  int64_t rows() const { return row_end - row; }
  int64_t ranks() const { return rank_end - rank; }
};

constexpr int64_t kChunkRows = 96;   // rows that stay in the L2 cache beside a panel
constexpr int64_t kDepth = 1536;     // depth of a panel that does
constexpr int64_t kGroupBytes = 384 << 10;  // panels that are packed together
constexpr int64_t kSlice = 64;         // rows that reduce packs at a time
constexpr int64_t kWide = 8;           // panels that it packs side by side
constexpr int64_t kSumsBytes = 128 << 10;  // sums that it keeps meanwhile
constexpr int64_t kGrain = 1 << 18;  // multiply-adds for which a thread is worth waking

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)); }

template <typename E>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtype<BFloat16> = ScalarType::BFloat16;

// Rows in E, an even number of them for pairs: the tensor itself where it will do, else a copy.
template <typename E>
struct Left {
  const E* data = nullptr;
  int64_t ld = 0;
  Buffer<E> own;
};

template <typename E, typename T>
Left<E> left_of(const View& v) {
  if (v.dtype == kDtype<E> && (v.col_stride == 1 || v.cols == 1) && v.cols % kPair<E> == 0) {
    return {static_cast<const E*>(v.data), v.row_stride, nullptr};
  }
  Left<E> left{nullptr, round_up(v.cols, kPair<E>), nullptr};
  left.own = buffer<E>(v.rows * left.ld);
  left.data = left.own.get();
  torch::stable::parallel_for(0, v.rows, grain(16 * v.cols), [&](int64_t begin, int64_t end) {
    kit<E, T>().copy_rows(v, begin, end, nullptr, left.own.get() + begin * left.ld, left.ld);
  });
  return left;
}

// One tile's worth of pointers: rows beyond the last repeat it, and their sums are not used.
template <typename E>
struct Lines {
  const E* row[16];
  Lines(const E* data, int64_t ld, int64_t first, int64_t end, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row[i] = data + std::min(first + i, end - 1) * ld;
  }
};

template <typename E, typename T>
struct ShrinkJob {
  View right;  // (depth, all ranks)
  std::vector<Segment> segments;
  const float* scale;
  const Mask* mask;  // on the left factor
  char* h;           // where h is kept, in dtype, or null
  E* copy;           // h in E: (M, copy_ld), from column 0
  int64_t width, copy_ld;
};

// For each job, row and rank of the row's segment: h = round((left right) * scale); other columns are zero. View `source`
// is what `left` was made from; h of all jobs has rows h_ld apart.
template <typename E, typename T>
void shrink(const View& source, const Left<E>& left, const std::vector<ShrinkJob<E, T>>& jobs, ScalarType dtype,
            int64_t h_ld) {
  const Kit<E, T>& k = kit<E, T>();
  const int64_t M = source.rows, depth = source.cols, padded = round_up(depth, kPair<E>);
  struct Panel {
    const ShrinkJob<E, T>* job;
    int64_t col, n, width, offset;
  };
  std::vector<Panel> panels;
  std::vector<int64_t> first;  // of each job and segment
  int64_t size = 0, ranks = 0, itemsize = 0;
  with_type(dtype, [&](auto* d) { itemsize = sizeof(*d); });
  for (const auto& job : jobs) {
    for (const Segment& s : job.segments) {
      first.push_back(panels.size());
      for (int64_t c = s.rank; c < s.rank_end; c += k.cols) {
        const int64_t n = std::min(k.cols, s.rank_end - c), width = round_up(n, k.lanes);
        panels.push_back({&job, c, n, width, size});
        size += padded * width;
        ranks += n;
      }
    }
  }
  first.push_back(panels.size());
  const Buffer<E> packed = buffer<E>(size);
  torch::stable::parallel_for(0, panels.size(), grain(padded * k.cols * 8), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& one = panels[p];
      k.pack(one.job->right, 0, depth, one.col, one.n, nullptr, packed.get() + one.offset, 0, 0);
    }
  });
  const int64_t step = std::max(k.rows, std::min(kChunkRows, round_up(ceil_div(M, 8), k.rows)));
  torch::stable::parallel_for(0, ceil_div(M, step), grain(step * ranks * depth), [&](int64_t begin, int64_t end) {
    const Buffer<T> tile = buffer<T>(2 * k.rows * k.cols);
    Buffer<E> dropped;
    for (int64_t r = begin * step; r < std::min(M, end * step); r += step) {
      const int64_t stop = std::min(M, r + step);
      size_t index = 0;
      for (const auto& job : jobs) {
        const E* data = left.data;
        int64_t ld = left.ld;
        if (job.mask) {
          if (!dropped) dropped = buffer<E>(step * padded);
          k.copy_rows(source, r, stop, job.mask, dropped.get(), padded);
          data = dropped.get() - r * padded;
          ld = padded;
        }
        std::memset(static_cast<void*>(job.copy + r * job.copy_ld), 0, (stop - r) * job.copy_ld * sizeof(E));
        for (int64_t i = r; job.h && i < stop; ++i) std::memset(job.h + i * h_ld * itemsize, 0, job.width * itemsize);
        for (const Segment& s : job.segments) {
          const int64_t from = first[index], to = first[index + 1];
          ++index;
          const int64_t last = std::min(stop, s.row_end);
          for (int64_t row = std::max(r, s.row); row < last; row += k.rows) {
            const int64_t height = std::min(k.rows, last - row);
            for (int64_t p = from; p < to; ++p) {
              const Panel& one = panels[p];
              const auto multiply = k.multiply[one.width / k.lanes];
              for (int64_t d = 0; d == 0 || d < depth; d += kDepth) {
                const Lines<E> lines(data + d, ld, row, last, k.rows);
                T* sums = tile.get() + (d ? k.rows * k.cols : 0);
                multiply(std::min(kDepth, depth - d), lines.row, packed.get() + one.offset + d * one.width, sums);
                if (d) k.add_lines(sums, height, one.n, nullptr, 0, 0, tile.get());
              }
              const int64_t col = one.col - s.rank;
              k.write_scaled(tile.get(), height, one.n, job.scale + one.col, dtype,
                             job.h ? job.h + (row * h_ld + col) * itemsize : nullptr, h_ld,
                             job.copy + row * job.copy_ld + col, job.copy_ld);
            }
          }
        }
      }
    }
  });
}

// left (M, from column 0) right[rank : rank_end] for the rows of each segment, times the mask where there is one.
template <typename E>
struct Term {
  const E* left;
  int64_t ld;
  View right;
  std::vector<Segment> segments;
  const Mask* mask;
};

// out (M, N) = the sum of the terms, plus bias (N) where there is one, rounded once.
template <typename E, typename T>
void expand(int64_t M, int64_t N, const std::vector<Term<E>>& terms, const Out& out, const T* bias) {
  const Kit<E, T>& k = kit<E, T>();
  int64_t depth = 0;
  for (const auto& term : terms) {
    for (const Segment& s : term.segments) depth += round_up(s.ranks(), kPair<E>);
  }
  const int64_t panel = depth * k.cols, panels = ceil_div(N, k.cols);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t group = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, panel * int64_t{sizeof(E)}));
  group = std::min(group, std::max<int64_t>(1, panels / threads));
  const int64_t chunks = ceil_div(M, kChunkRows), groups = ceil_div(panels, group);

  auto pack = [&](int64_t g, E* to) {
    const int64_t col = g * group * k.cols;
    int64_t before = 0;
    for (const auto& term : terms) {
      for (const Segment& s : term.segments) {
        k.pack(term.right, s.rank, s.ranks(), col, std::min(N - col, group * k.cols), nullptr, to, panel, before);
        before += round_up(s.ranks(), kPair<E>);
      }
    }
  };
  auto block = [&](int64_t r, int64_t col, const E* right, T* sums, T* tile) {
    const int64_t stop = std::min(M, r + kChunkRows), n = std::min(k.cols, N - col), width = round_up(n, k.lanes);
    const auto multiply = k.multiply[width / k.lanes];
    k.fetch_lines(out, r, stop - r, col, n);
    bool fresh = true;  // the first product that covers the block need not be added to anything
    for (const auto& term : terms) {
      for (const Segment& s : term.segments) {
        const int64_t begin = std::max(r, s.row), end = std::min(stop, s.row_end);
        const bool whole = fresh && begin == r && end == stop && !term.mask && s.ranks() > 0;
        if (fresh && !whole) std::memset(static_cast<void*>(sums), 0, (stop - r) * k.cols * sizeof(T));
        fresh = false;
        for (int64_t d = 0; d < s.ranks() && begin < end; d += kDepth) {
          for (int64_t row = begin; row < end; row += k.rows) {
            const Lines<E> lines(term.left + d, term.ld, row, end, k.rows);
            T* to = sums + (row - r) * k.cols;
            const bool direct = whole && d == 0;
            multiply(std::min(kDepth, s.ranks() - d), lines.row, right + d * width, direct ? to : tile);
            if (!direct) k.add_lines(tile, std::min(k.rows, end - row), n, term.mask, row, col, to);
          }
        }
        right += round_up(s.ranks(), kPair<E>) * width;
      }
    }
    if (fresh) std::memset(static_cast<void*>(sums), 0, (stop - r) * k.cols * sizeof(T));
    k.write_lines(out, r, stop - r, col, n, bias, sums);
  };
  torch::stable::parallel_for(
      0, groups * chunks, grain(std::min(M, kChunkRows) * group * panel), [&](int64_t begin, int64_t end) {
        const Buffer<E> packed = buffer<E>(group * panel);
        const Buffer<T> sums = buffer<T>((round_up(kChunkRows, k.rows) + k.rows) * k.cols);
        T* tile = sums.get() + round_up(kChunkRows, k.rows) * k.cols;
        int64_t held = -1;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t g = i / chunks;
          if (g != held) pack(g, packed.get());
          held = g;
          for (int64_t p = g * group; p < std::min(panels, (g + 1) * group); ++p) {
            block(i % chunks * kChunkRows, p * k.cols, packed.get() + (p - g * group) * panel, sums.get(), tile);
          }
        }
      });
}

template <typename E>
struct ReduceJob {
  View left;  // (M, from column 0)
  std::vector<Segment> segments;
  const Mask* mask;  // on the right factor
  Out out;           // (all ranks, N)
};

// For each job and segment: out[rank : rank_end] = left[row : row_end]^T right[row : row_end]. All jobs have the same rows.
template <typename E, typename T>
void reduce(const View& right, const std::vector<ReduceJob<E>>& jobs) {
  const Kit<E, T>& k = kit<E, T>();
  const int64_t N = right.cols, panels = ceil_div(N, k.cols);
  // The left factors, rank by rank, so that they are rows.
  std::vector<std::vector<int64_t>> offsets;
  int64_t size = 0, work = 0, height = 0;
  for (const auto& job : jobs) {
    offsets.emplace_back();
    for (const Segment& s : job.segments) {
      offsets.back().push_back(size);
      size += s.ranks() * round_up(s.rows(), kPair<E>);
      work += s.ranks() * s.rows();
      height = std::max(height, round_up(s.ranks(), k.rows));
    }
  }
  const Buffer<E> turned = buffer<E>(size);
  for (size_t j = 0; j < jobs.size(); ++j) {
    for (size_t i = 0; i < jobs[j].segments.size(); ++i) {
      const Segment& s = jobs[j].segments[i];
      const View& v = jobs[j].left;
      const int64_t ld = round_up(s.rows(), kPair<E>);
      View columns = v.transposed();
      columns.rows = s.ranks(), columns.cols = s.rows();
      with_type(v.dtype, [&](auto* p) { columns.data = v.at<Storage<decltype(p)>>(s.row, 0); });
      E* to = turned.get() + offsets[j][i];
      torch::stable::parallel_for(0, s.ranks(), grain(16 * s.rows()), [&](int64_t begin, int64_t end) {
        k.copy_rows(columns, begin, end, nullptr, to + begin * ld, ld);
      });
    }
  }
  // Panels side by side share a slice of rows, which is read as it lies in memory.
  const int64_t threads = torch::stable::get_num_threads(), jobs_height = jobs.size() * height;
  int64_t group = std::max<int64_t>(1, kSumsBytes / std::max<int64_t>(1, jobs_height * k.cols * int64_t{sizeof(T)}));
  group = std::min({group, kWide, ceil_div(panels, threads)});
  const auto slice = [&](int64_t p0, int64_t p1, size_t i, int64_t m, E* packed, T* sums, T* tile) {
    const int64_t depth = std::min(kSlice, jobs[0].segments[i].row_end - m);
    for (size_t j = 0; j < jobs.size(); ++j) {
      const Segment& s = jobs[j].segments[i];
      if (j == 0 || jobs[j].mask) {
        k.pack(right, m, depth, p0 * k.cols, std::min(N, p1 * k.cols) - p0 * k.cols, jobs[j].mask, packed,
               kSlice * k.cols, 0);
      }
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t n = std::min(k.cols, N - p * k.cols), width = round_up(n, k.lanes);
        const E* panel = packed + (p - p0) * kSlice * k.cols;
        T* to = sums + ((p - p0) * jobs_height + j * height) * k.cols;
        for (int64_t r = 0; r < s.ranks(); r += k.rows) {
          const Lines<E> lines(turned.get() + offsets[j][i] + m - s.row, round_up(s.rows(), kPair<E>), r, s.ranks(), k.rows);
          k.multiply[width / k.lanes](depth, lines.row, panel, tile);
          k.add_lines(tile, std::min(k.rows, s.ranks() - r), n, nullptr, 0, 0, to + r * k.cols);
        }
      }
    }
  };
  torch::stable::parallel_for(0, ceil_div(panels, group), grain(work * k.cols * group), [&](int64_t begin, int64_t end) {
    const Buffer<E> packed = buffer<E>(kSlice * k.cols * group);
    const Buffer<T> sums = buffer<T>(jobs_height * k.cols * group), tile = buffer<T>(k.rows * k.cols);
    for (int64_t p0 = begin * group; p0 < std::min(panels, end * group); p0 += group) {
      const int64_t p1 = std::min(panels, p0 + group);
      for (size_t i = 0; i < jobs[0].segments.size(); ++i) {
        std::memset(static_cast<void*>(sums.get()), 0, jobs_height * k.cols * group * sizeof(T));
        const Segment& rows = jobs[0].segments[i];
        for (int64_t m = rows.row; m < rows.row_end; m += kSlice) slice(p0, p1, i, m, packed.get(), sums.get(), tile.get());
        for (size_t j = 0; j < jobs.size(); ++j) {
          const Segment& s = jobs[j].segments[i];
          for (int64_t p = p0; p < p1; ++p) {
            k.write_lines(jobs[j].out, s.rank, s.ranks(), p * k.cols, std::min(k.cols, N - p * k.cols), nullptr,
                          sums.get() + ((p - p0) * jobs_height + j * height) * k.cols);
          }
        }
      }
    }
  });
}

}  // namespace flora
