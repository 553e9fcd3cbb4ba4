// What products are made of: the leaves of the best instruction set at hand, behind function pointers. See product.h.
#pragma once

#include "dtypes.h"

#include <algorithm>
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
