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

constexpr int64_t kChunkRows = 64;      // rows that a thread takes at a time
constexpr int64_t kGroupBytes = 256 << 10;  // panels that are packed together
constexpr int64_t kSlice = 64;         // rows that reduce packs at a time
constexpr int64_t kWide = 16;          // panels that it packs side by side
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

// n panels in groups of at most `most`, as equal as can be, so that threads have equal shares; no group where there are none.
struct Groups {
  int64_t n, count, size;
  Groups(int64_t n, int64_t most)
      : n(n), count(ceil_div(n, std::max<int64_t>(1, most))), size(ceil_div(n, std::max<int64_t>(1, count))) {}
  int64_t begin(int64_t group) const { return group * n / count; }
};

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
    const Buffer<T> tile = buffer<T>(k.rows * k.cols);
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
              const Piece<E> piece(data, ld, row, last, packed.get() + one.offset, depth);
              k.multiply[one.width / k.lanes](&piece, 1, false, tile.get());
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
struct Expand {
  const Kit<E, T>& k = kit<E, T>();
  const int64_t M, N;
  const std::vector<Term<E>>& terms;
  const Out& out;
  const T* bias;
  int64_t depth = 0;

  // What a tile's rows multiply, the same for all panels: `before` is where the lines of the panel begin.
  struct Part {
    Piece<E> piece;
    int64_t before, row, rows;
    const Mask* mask;
  };

  struct Scratch {
    Buffer<T> sums;  // of a tile, and of a part of one
    std::vector<Part> whole, parts;
    std::vector<Piece<E>> pieces;
  };

  // Panels first to last, of all terms and segments: each holds the lines of one after those of another.
  void pack(int64_t first, int64_t last, E* to) const {
    int64_t before = 0;
    for (const auto& term : terms) {
      for (const Segment& s : term.segments) {
        k.pack(term.right, s.rank, s.ranks(), first * k.cols, std::min(N, last * k.cols) - first * k.cols, nullptr, to,
               depth * k.cols, before);
        before += round_up(s.ranks(), kPair<E>);
      }
    }
  }

  // Terms without a mask whose segment holds all rows are summed in registers (whole); the others (parts) add to their own
  // rows alone, so that no number of one client meets those of another.
  void gather(int64_t row, int64_t stop, std::vector<Part>& whole, std::vector<Part>& parts) const {
    whole.clear(), parts.clear();
    int64_t before = 0;
    for (const auto& term : terms) {
      for (const Segment& s : term.segments) {
        const int64_t from = std::max(row, s.row), to = std::min(stop, s.row_end);
        if (from < to && s.ranks() > 0) {
          const Piece<E> piece(term.left, term.ld, from, to, nullptr, s.ranks());
          (term.mask || to - from < stop - row ? parts : whole).push_back({piece, before, from, to - from, term.mask});
        }
        before += round_up(s.ranks(), kPair<E>);
      }
    }
  }

  // Rows `row` to `stop`, at most a tile's, of panels first to last.
  void rows(int64_t row, int64_t stop, int64_t first, int64_t last, const E* packed, Scratch& own) const {
    gather(row, stop, own.whole, own.parts);
    k.fetch_lines(out, row, stop - row, first * k.cols, std::min(N, last * k.cols) - first * k.cols);
    own.pieces.clear();
    for (const Part& part : own.whole) own.pieces.push_back(part.piece);
    T *sums = own.sums.get(), *tile = sums + k.rows * k.cols;
    for (int64_t p = first; p < last; ++p, packed += depth * k.cols) {
      const int64_t col = p * k.cols, n = std::min(k.cols, N - col), width = round_up(n, k.lanes);
      const auto multiply = k.multiply[width / k.lanes];
      for (size_t i = 0; i < own.pieces.size(); ++i) own.pieces[i].right = packed + own.whole[i].before * width;
      multiply(own.pieces.data(), own.pieces.size(), false, sums);
      for (Part& part : own.parts) {
        part.piece.right = packed + part.before * width;
        multiply(&part.piece, 1, false, tile);
        k.add_lines(tile, part.rows, n, part.mask, part.row, col, sums + (part.row - row) * k.cols);
      }
      k.write_lines(out, row, stop - row, col, n, bias, sums);
    }
  }

  void run() {
    for (const auto& term : terms) {
      for (const Segment& s : term.segments) depth += round_up(s.ranks(), kPair<E>);
    }
    const int64_t panel = depth * k.cols, panels = ceil_div(N, k.cols);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fit = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, panel * int64_t{sizeof(E)}));
    const Groups groups(panels, std::min(fit, ceil_div(panels, threads)));
    const int64_t chunks = ceil_div(M, kChunkRows);
    torch::stable::parallel_for(
        0, groups.count * chunks, grain(std::min(M, kChunkRows) * groups.size * panel), [&](int64_t begin, int64_t end) {
          const Buffer<E> packed = buffer<E>(groups.size * panel);
          Scratch own{buffer<T>(2 * k.rows * k.cols), {}, {}, {}};
          int64_t held = -1;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t first = groups.begin(i / chunks), last = groups.begin(i / chunks + 1);
            if (first != held) pack(first, last, packed.get());
            held = first;
            const int64_t stop = std::min(M, (i % chunks + 1) * kChunkRows);
            for (int64_t r = i % chunks * kChunkRows; r < stop; r += k.rows) {
              rows(r, std::min(stop, r + k.rows), first, last, packed.get(), own);
            }
          }
        });
  }
};

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
  const int64_t fit = std::max<int64_t>(1, kSumsBytes / std::max<int64_t>(1, jobs_height * k.cols * int64_t{sizeof(T)}));
  const Groups groups(panels, std::min({fit, kWide, ceil_div(panels, threads)}));
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
          const Piece<E> piece(turned.get() + offsets[j][i] + m - s.row, round_up(s.rows(), kPair<E>), r, s.ranks(), panel, depth);
          k.multiply[width / k.lanes](&piece, 1, false, tile);
          k.add_lines(tile, std::min(k.rows, s.ranks() - r), n, nullptr, 0, 0, to + r * k.cols);
        }
      }
    }
  };
  torch::stable::parallel_for(0, groups.count, grain(work * k.cols * groups.size), [&](int64_t begin, int64_t end) {
    const Buffer<E> packed = buffer<E>(kSlice * k.cols * groups.size);
    const Buffer<T> sums = buffer<T>(jobs_height * k.cols * groups.size), tile = buffer<T>(k.rows * k.cols);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t p0 = groups.begin(g), p1 = groups.begin(g + 1);
      for (size_t i = 0; i < jobs[0].segments.size(); ++i) {
        std::memset(static_cast<void*>(sums.get()), 0, jobs_height * k.cols * groups.size * sizeof(T));
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
