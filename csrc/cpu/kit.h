// What products are made of: the leaves of the best instruction set at hand, behind function pointers. See product.h
// and rounding.h.
#pragma once

#include "dtypes.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <new>
#include <type_traits>

namespace flora {

// Dropout as flora/kernels/reference.py defines it. value: 1 / (1 - dropout), rounded to the dtype of the products.
struct Mask {
  const int64_t* keys;
  int64_t stride;
  uint32_t threshold;
  double value;
};

// A matrix that is written, with any strides; `add`: to what it holds.
struct Out {
  void* data;
  ScalarType dtype;
  int64_t row_stride, col_stride;
  bool add;
};

// One product of a tile: pointers to its rows of the left factor, the panel, and how deep both are.
template <typename E>
struct Piece {
  const E* row[8];
  const E* right;
  int64_t depth;

  // Rows beyond `end` repeat the last: their sums are not used.
  Piece(const E* left, int64_t ld, int64_t first, int64_t end, const E* right, int64_t depth)
      : right(right), depth(depth) {
    for (int64_t i = 0; i < 8; ++i) row[i] = left + std::min(first + i, end - 1) * ld;
  }
};

// Elements along the depth that one instruction multiplies and sums.
template <typename E>
constexpr int64_t kPair = std::is_same_v<E, BFloat16> ? 2 : 1;
// Columns whose mask is drawn at a time.
constexpr int64_t kStrip = 256;

// What becomes of a weight, a matrix as merge_ cuts it: with its rows and columns exchanged where `turned`. Without residual
// data there is none; `seed` counts where `seeded`.
struct Rounding {
  Out weight, residual;
  bool turned, seeded;
  uint64_t seed;
};

// Rows of the left factor that merge_ packs at a time.
constexpr int64_t kBlockRows = 64;

constexpr uint32_t kGolden = 0x9E3779B1u;
// The finaliser of MurmurHash3.
inline uint32_t mix32(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x85EBCA6Bu;
  z = (z ^ (z >> 13)) * 0xC2B2AE35u;
  return z ^ (z >> 16);
}

// x rounded stochastically to a number that D holds, as flora/kernels/reference.py defines it; x itself where it is not
// finite. Selects, not branches, so that the loops around this vectorise.
template <typename D>
inline float dithered(float x, uint32_t draw);
template <>
inline float dithered<BFloat16>(float x, uint32_t draw) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), moved = (bits + (draw & 0xffffu)) & 0xffff0000u;
  return std::bit_cast<float>((bits & 0x7f800000u) == 0x7f800000u ? bits : moved);
}
template <>
inline float dithered<Half>(float x, uint32_t draw) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t moved = (bits + (draw & 0x1fffu)) & ~0x1fffu;
  // Below 2^-14 the grid is even, 2^-24 apart.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p24f, steps = scaled < 1024.0f ? scaled : 1024.0f;
  const int32_t whole = static_cast<int32_t>(steps);
  const float chance = static_cast<float>(static_cast<int32_t>(draw >> 8)) * 0x1p-24f;
  const int32_t up = steps - static_cast<float>(whole) > chance ? 1 : 0;
  const uint32_t small = std::bit_cast<uint32_t>(static_cast<float>(whole + up) * 0x1p-24f) | (bits ^ magnitude);
  const uint32_t finite = magnitude >= 0x38800000u ? moved : small;
  return std::bit_cast<float>(magnitude >= 0x7f800000u ? bits : finite);
}

template <typename Null>
using Storage = std::remove_pointer_t<Null>;

// The leaves for factors in E and sums in T. A tile has `rows` rows and 1 to cols / lanes vectors of columns.
template <typename E, typename T>
struct Kit {
  int64_t rows, cols, lanes;
  void (*multiply[4])(const Piece<E>*, int64_t, bool, T*);
  void (*add_lines)(const T*, int64_t, int64_t, const Mask*, int64_t, int64_t, T*);
  void (*copy_rows)(const View&, int64_t, int64_t, const Mask*, E*, int64_t);
  void (*pack)(const View&, int64_t, int64_t, int64_t, int64_t, const Mask*, E*, int64_t, int64_t);
  void (*fetch_lines)(const Out&, int64_t, int64_t, int64_t, int64_t);
  void (*write_lines)(const Out&, int64_t, int64_t, int64_t, int64_t, const T*, T*);
  void (*write_scaled)(const T*, int64_t, int64_t, const float*, ScalarType, void*, int64_t, E*, int64_t);
};

// For <float, float>, <double, double> and, where multiplies_bf16(), <BFloat16, float>.
template <typename E, typename T>
const Kit<E, T>& kit();

bool multiplies_bf16();

// The leaves of merge_ for sums in T, and of first_not_finite. Dtypes are those of the arguments.
template <typename T>
struct MergeKit {
  void (*scale_rows)(const View&, int64_t, int64_t, int64_t, int64_t, const T*, T*, int64_t);
  void (*round_lines)(const Rounding&, int64_t, int64_t, int64_t, int64_t, const T*);
  bool (*not_finite)(ScalarType, const void*, int64_t, int64_t);
};

// For float and double.
template <typename T>
const MergeKit<T>& merge_kit();

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeAligned>;
template <typename T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

}  // namespace flora
