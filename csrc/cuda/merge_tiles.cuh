// The product of merge_ for fp32, fp16 and bf16 weights, on tensor cores. LEFT and RIGHT say how many 16-bit terms a factor has.
//
// <1, 1>, bf16 weights rounded to nearest: factors in bf16, as plain PyTorch casts them; but scale is in before the cast,
// which is the only one, and the sum of all ranks stays fp32 until it has met the weight.
// <2, 1> and <2, 2>, all others: fp16 pairs. x = hi + lo with hi = fp16(x), lo = fp16(x - hi) holds 22 bits, as a pair of tf32
// does, at twice the speed and half the memory. fp16 has few exponents, so every rank of the right factor is scaled by a
// power of two to a largest element in [2^14, 2^15), its inverse goes to the left one, and there 16 ranks of a row are
// scaled to the same range; powers of two lose nothing. The left factor, which has the scale, is always a pair. The right
// one is a pair where fp32 results are asked of fp32 numbers; bf16 and fp16 numbers are whole in one, and for a 16-bit
// weight one is as near as plain PyTorch's own cast of the factor, or nearer. Dropped: lo lo and what is beyond lo, each
// <= 2^-22 |left||right| a term, 2^-24 in the mean square, and 2^-38 of the largest term of a row. In norm that is
// 7e-8 of the sum for <2, 2>, 9e-8 with the low bits that tensor cores cut: under the 1e-7 of the rule at any rank, and from
// some tens of ranks on less than fp32's own sum over them loses.
// Tensor cores cut the low bits of a running sum, so there a sum of 16 ranks starts from zero, small terms first, and fp32
// registers add it to the total, rounded to nearest, in the same instruction that takes back the row's power of two.
//
// A block keeps the right factor's columns (all ranks of all clients) in shared memory and walks down the rows, so that
// the factors cross the L2 once per block of the weight's columns and once per row of tiles. Two blocks share a processor:
// while one adds its sums to the weight the other multiplies. The weight's next tile is asked into the L2 a tile ahead.
#pragma once

#include "merge.cuh"
#include "ptx.cuh"

namespace flora::cuda {

constexpr int kTileThreads = 256;

template <int LEFT, int RIGHT>
struct Shape {
  static constexpr int kRows = 64, kCols = 256 / RIGHT;            // of a tile
  static constexpr int kPieces = 8 / RIGHT;                        // 2 x kPieces sums of 16 x 8 are one warp's
  static constexpr int kLeftBytes = LEFT * kStep * 2 + 16;         // a row of 16 ranks, and a gap that spreads the banks
  static constexpr int kRightBytes = 2 * kCols + 16;               // one rank
  static constexpr int kTermBytes = kStep * kRightBytes;
  static constexpr int kSlotBytes = RIGHT * kTermBytes;            // a step of 16 ranks
  static constexpr int kLeftTile = kRows * (kLeftBytes + 4);       // with a power of two for each row
  static constexpr size_t shared(int slots) { return 2 * kLeftTile + static_cast<size_t>(slots) * kSlotBytes; }
};
// The smallest request must fit where the least shared memory is: 99 KiB, on sm_86 and sm_89.
static_assert(Shape<2, 2>::shared(2) <= 101376 && Shape<2, 1>::shared(2) <= 101376);

// Four neighbours as they lie in memory: nothing waits for them before they are used.
struct Quad {
  uint32_t bits[4];
};
// In which kind a quad that was loaded from numbers of `kind` is held, or one gathered one by one.
__device__ __forceinline__ int held_kind(bool quads, int kind) { return quads && kind != kDouble ? kind : int{kFloat}; }

__device__ __forceinline__ Quad load_quad(const char* from, int kind) {
  Quad q;
  if (kind == kFloat) {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    q.bits[0] = all.x, q.bits[1] = all.y, q.bits[2] = all.z, q.bits[3] = all.w;
  } else if (kind != kDouble) {
    const uint2 all = *reinterpret_cast<const uint2*>(from);
    q.bits[0] = all.x, q.bits[1] = all.y, q.bits[2] = q.bits[3] = 0;
  } else {
    float x[4];
    load<4>(from, kDouble, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) q.bits[i] = __float_as_uint(x[i]);
  }
  return q;
}

__device__ __forceinline__ void widen_quad(const Quad& q, int kind, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t half = i % 2 ? q.bits[i / 2] >> 16 : q.bits[i / 2] & 0xFFFFu;
    x[i] = kind == kFloat      ? __uint_as_float(q.bits[i])
           : kind == kBFloat16 ? __uint_as_float(half << 16)
                               : __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  }
}

__device__ __forceinline__ uint32_t pack_halves(__half low, __half high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}

// x as fp16 pairs: hi to `to`, lo to `low_to` where it is not null; 8 bytes each.
__device__ __forceinline__ void store_split(const float (&x)[4], char* to, char* low_to) {
  __half hi[4], lo[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    hi[i] = __float2half_rn(x[i]);
    lo[i] = __float2half_rn(__fsub_rn(x[i], __half2float(hi[i])));
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_halves(hi[0], hi[1]), pack_halves(hi[2], hi[3]));
  if (low_to) *reinterpret_cast<uint2*>(low_to) = make_uint2(pack_halves(lo[0], lo[1]), pack_halves(lo[2], lo[3]));
}

// x in bf16, 8 bytes.
__device__ __forceinline__ void store_cast(const float (&x)[4], char* to) {
  store<4>(to, kBFloat16, x);
}

// The bits of |x|, or 0 for what has no exponent to scale by.
__device__ __forceinline__ uint32_t magnitude(float x) {
  const uint32_t bits = __float_as_uint(x) & 0x7FFFFFFFu;
  return bits < 0x7F800000u ? bits : 0;
}
// The exponent of that magnitude; numbers below 2^-98 count as such, so that all powers of two here are normal.
__device__ __forceinline__ int exponent(uint32_t bits) { return max(static_cast<int>(bits >> 23) - 127, -98); }
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(static_cast<uint32_t>(e + 127) << 23); }

// Four ranks from `rank` on of one row of the left factor; 0 beyond its rows.
__device__ __forceinline__ Quad fetch_left(const Rank* rank, int row, bool inside) {
  Quad q = {{0, 0, 0, 0}};
  if (!inside) return q;
  if (rank->left_quads) return load_quad(rank->left + row * rank->left_row, rank->left_kind);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!rank[i].left) continue;
    float x[1];
    load<1>(rank[i].left + row * rank[i].left_row, rank[i].left_kind, x);
    q.bits[i] = __float_as_uint(x[0]);
  }
  return q;
}

// Four columns from `col` on of one rank of the right factor; 0 beyond its columns.
__device__ __forceinline__ void fetch_right(const Rank& rank, int col, int cols, float (&x)[4]) {
  const bool quads = rank.right_quads && col + 4 <= cols;
  Quad q = {{0, 0, 0, 0}};
  if (quads) {
    q = load_quad(rank.right + int64_t{col} * rank.right_col, rank.right_kind);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!rank.right || col + i >= cols) continue;
      float one[1];
      load<1>(rank.right + int64_t{col + i} * rank.right_col, rank.right_kind, one);
      q.bits[i] = __float_as_uint(one[0]);
    }
  }
  widen_quad(q, held_kind(quads, rank.right_kind), x);
}

// One warp's share of the block's work; what does not change while the block lives.
template <int LEFT, int RIGHT>
struct Tiles {
  using S = Shape<LEFT, RIGHT>;
  static constexpr bool kScaled = LEFT == 2;  // by powers of two, into fp16
  // A warp's sums as the matrix instruction lays them out: a thread has 2 neighbours in a row, and 2 below, 8 rows apart.
  using Sums = float[2][S::kPieces][4];
  const Layer& layer;
  const Rank* all_ranks;
  char* shared;
  int col0;

  // Read anew: an address kept through the loop is two registers.
  __device__ const Rank* ranks_of(int step) const { return all_ranks + layer.rank_begin + step * kStep; }
  __device__ char* left(int n) const { return shared + (n & 1) * S::kLeftTile; }
  __device__ float* powers(int n) const { return reinterpret_cast<float*>(left(n) + S::kRows * S::kLeftBytes); }
  __device__ char* right(int slot) const { return shared + 2 * S::kLeftTile + slot * S::kSlotBytes; }
  // Where a warp's sums lie in the tile.
  static __device__ int row_of(int warp) { return warp % 2 * 32; }
  static __device__ int col_of(int warp) { return warp / 2 * 8 * S::kPieces; }

  // Ranks [begin, end) of the block's columns, into the slots from `slot` on.
  template <int UNROLL>
  __device__ void pack_right(int begin, int end, int slot) const {
    constexpr int kAcross = S::kCols / 128;
#pragma unroll UNROLL
    for (int k = begin + thread_index() / 32; k < end; k += kTileThreads / 32) {
      const Rank& rank = ranks_of(0)[k];
      char* const line = right(slot + (k - begin) / kStep) + (k % kStep) * S::kRightBytes;
#pragma unroll UNROLL
      for (int a = 0; a < kAcross; ++a) {
        const int col = a * 128 + thread_index() % 32 * 4;
        float x[4];
        fetch_right(rank, col0 + col, layer.cols, x);
        if constexpr (kScaled) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] *= rank.right_factor;
          store_split(x, line + 2 * col, RIGHT == 2 ? line + S::kTermBytes + 2 * col : nullptr);
        } else {
          store_cast(x, line + 2 * col);
        }
      }
    }
  }

  // A thread's share of 16 ranks of the left factor: four of them, in one row.
  __device__ Quad fetch_step(int step, int row0) const {
    const int row = row0 + thread_index() / 4;
    return fetch_left(ranks_of(step) + thread_index() % 4 * 4, row, row < layer.rows);
  }

  // The row's 16 ranks times scale; with the right factor's powers of two, scaled together into fp16's range.
  __device__ void pack_left(int step, const Quad& held, int n) const {
    const int row = thread_index() / 4, quad = thread_index() % 4;
    const Rank* const rank = ranks_of(step) + 4 * quad;
    char* const line = left(n) + row * S::kLeftBytes + 8 * quad;
    float x[4];
    widen_quad(held, held_kind(rank->left_quads, rank->left_kind), x);
    if constexpr (!kScaled) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= rank[i].scale;
      store_cast(x, line);
    } else {
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] *= rank[i].left_factor;
        most = max(most, magnitude(x[i]));
      }
#pragma unroll
      for (int other = 1; other < 4; other *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, other));
      const int e = exponent(most);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= power_of_two(14 - e);
      store_split(x, line, line + 2 * kStep);
      if (quad == 0) powers(n)[row] = power_of_two(e - 28);
    }
  }

  // total += left right for 16 ranks.
  __device__ void multiply(int n, int slot, Sums& total) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int warp_row = row_of(warp), warp_col = col_of(warp);
    uint32_t terms[LEFT][2][4];
    // Volatile, so that they are read where they are used and hold no registers meanwhile.
    const volatile float* const line_powers = powers(n) + warp_row + lane / 4;
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      const char* line = left(n) + (warp_row + 16 * mi + lane % 16) * S::kLeftBytes + lane / 16 * 16;
#pragma unroll
      for (int t = 0; t < LEFT; ++t) load_matrices<false>(terms[t][mi], line + 2 * kStep * t);
    }
    // One load brings two 16 x 8 pieces of the right factor, or hi and lo of one.
    constexpr int kLoaded = 3 - RIGHT;
#pragma unroll
    for (int ni = 0; ni < S::kPieces; ni += kLoaded) {
      const char* line = right(slot) + lane % 16 * S::kRightBytes + 2 * (warp_col + 8 * ni);
      uint32_t b[4];
      load_matrices<true>(b, line + lane / 16 * (RIGHT == 2 ? S::kTermBytes : 16));
#pragma unroll
      for (int piece = 0; piece < kLoaded; ++piece) {
        if constexpr (kScaled) {
          // The two sums take turns, so that neither waits for its own last product.
          float sum[2][4] = {};
          if constexpr (RIGHT == 2) add_product(sum, terms[0], b[2], b[3]);
          add_product(sum, terms[1], b[2 * piece], b[2 * piece + 1]);
          add_product(sum, terms[0], b[2 * piece], b[2 * piece + 1]);
#pragma unroll
          for (int mi = 0; mi < 2; ++mi) {
            float(&to)[4] = total[mi][ni + piece];
            const float power[2] = {line_powers[16 * mi], line_powers[16 * mi + 8]};
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = fmaf(sum[mi][i], power[i / 2], to[i]);
          }
        } else {
#pragma unroll
          for (int mi = 0; mi < 2; ++mi) {
            multiply_add_bfloat16(total[mi][ni + piece], terms[0][mi], b[2 * piece], b[2 * piece + 1]);
          }
        }
      }
    }
  }
  static __device__ void add_product(float (&sum)[2][4], const uint32_t (&left)[2][4], uint32_t right0, uint32_t right1) {
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) multiply_add(sum[mi], left[mi], right0, right1);
  }

  // The lines of the tile at row0, asked into the L2.
  __device__ void prefetch_weight(int row0) const {
    if (!layer.wide) return;
    const int size = itemsize(layer.weight_kind);
    const int cols = min(S::kCols, layer.cols - col0);
    const int lines = (cols * size + 127) / 128;
    for (int i = thread_index(); i < S::kRows * lines; i += kTileThreads) {
      const int row = row0 + i / lines;
      if (row < layer.rows) prefetch(layer.weight + row * layer.weight_row + int64_t{col0} * size + i % lines * 128);
    }
  }

  // Four lanes hold pairs of columns of four 16 x 8 tiles; afterwards lane q of them has 8 columns of tile q.
  static __device__ void transpose(int lane, float (&v)[8]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &here = v[2 * i + c], &there = v[2 * (i + bit) + c];
          const float got = __shfl_xor_sync(0xFFFFFFFFu, upper ? here : there, bit);
          (upper ? here : there) = got;
        }
      }
    }
  }

  // Element e of a part of the sums: 8 rows of 32 columns, and after the transposition 8 neighbours of a row.
  static constexpr int kAcross = S::kPieces / 4, kParts = 4 * kAcross;
  static __device__ float& sum_of(Sums& total, int part, int e) {
    return total[part / 2 / kAcross][part / 2 % kAcross * 4 + e / 2][part % 2 * 2 + e % 2];
  }
  static __device__ int row_of_part(int part) { return part / 2 / kAcross * 16 + part % 2 * 8; }
  static __device__ int col_of_part(int part) { return part / 2 % kAcross * 32; }

  // The warp's sums meet the weight, by lines of whole sectors.
  template <typename W>
  __device__ void add_plainly(int row0, Sums& total) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    char* const at = layer.weight + (row0 + row_of(warp) + lane / 4) * layer.weight_row +
                     static_cast<int64_t>(sizeof(W)) * (col0 + col_of(warp) + lane % 4 * 8);
    constexpr int kFlying = sizeof(W) == 4 ? 2 : 4;  // parts whose weights are under way together
#pragma unroll
    for (int part = 0; part < kParts; part += kFlying) {
      Pack<W, 8> held[kFlying];
#pragma unroll
      for (int f = 0; f < kFlying; ++f) held[f] = *place<W>(at, part + f);
#pragma unroll
      for (int f = 0; f < kFlying; ++f) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = sum_of(total, part + f, e);
        transpose(lane, v);
#pragma unroll
        for (int e = 0; e < 8; ++e) held[f].at[e] = narrow<W>(__fadd_rn(widen(held[f].at[e]), v[e]));
        *place<W>(at, part + f) = held[f];
      }
    }
  }
  template <typename W>
  __device__ Pack<W, 8>* place(char* at, int part) const {
    return reinterpret_cast<Pack<W, 8>*>(at + row_of_part(part) * layer.weight_row + col_of_part(part) * int{sizeof(W)});
  }

  // Anything: residuals, noise, edges, strides. The sums move up a part at a time, since a loop that is not unrolled
  // cannot choose among registers, and unrolled this code would not fit the instruction cache.
  __device__ void add_carefully(int row0, Sums& total) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = sum_of(total, 0, e);
      transpose(lane, v);
#pragma unroll
      for (int p = 0; p + 1 < kParts; ++p) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum_of(total, p, e) = sum_of(total, p + 1, e);
      }
      const int row = row0 + row_of(warp) + row_of_part(part) + lane / 4;
      const int col = col0 + col_of(warp) + col_of_part(part) + lane % 4 * 8;
      if (row >= layer.rows) continue;
      const bool wide = layer.wide && col + 8 <= layer.cols;
#pragma unroll 1
      for (int c = col; c < min(col + 8, layer.cols); c += wide ? 4 : 1) {
        if (wide) {
          const float four[4] = {v[0], v[1], v[2], v[3]};
          meet<4>(layer, row, c, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = v[i + 4];
        } else {
          const float one[1] = {v[0]};
          meet<1>(layer, row, c, one);
#pragma unroll
          for (int i = 0; i < 7; ++i) v[i] = v[i + 1];
        }
      }
    }
  }

  __device__ void add_to_weight(int row0, Sums& total) const {
    const bool whole = row0 + S::kRows <= layer.rows && col0 + S::kCols <= layer.cols;
    if (!layer.wide || !whole || layer.residual || layer.noisy) {
      add_carefully(row0, total);
    } else if (layer.weight_kind == kFloat) {
      add_plainly<float>(row0, total);
    } else if (layer.weight_kind == kHalf) {
      add_plainly<__half>(row0, total);
    } else {
      add_plainly<__nv_bfloat16>(row0, total);
    }
  }
};

}  // namespace flora::cuda
