// The leaves of merge_ and first_not_finite, compiled once per instruction set: included after product.h, inside the same
// namespaces.

// to[i][k] = left[row + i][rank + k] * scale[k] for `rows` rows, at most kBlockRows, and `depth` ranks; lines ld apart.
template <typename S, typename T>
FLORA_TARGET void scale_rows(const View& left, int64_t row, int64_t rows, int64_t rank, int64_t depth, const T* scale,
                             T* to, int64_t ld) {
  if (left.col_stride == 1 && !std::is_same_v<S, Half>) {
    for (int64_t i = 0; i < rows; ++i, to += ld) {
      const S* from = left.at<S>(row + i, rank);
      for (int64_t k = 0; k < depth; ++k) to[k] = static_cast<T>(widen(from[k])) * scale[k];
    }
  } else if (left.row_stride < left.col_stride) {
    T column[kBlockRows];
    for (int64_t k = 0; k < depth; ++k) {
      Rows<S, T>::widen_to(left.at<S>(row, rank + k), left.row_stride, rows, column, 1);
      for (int64_t i = 0; i < rows; ++i) to[i * ld + k] = column[i] * scale[k];
    }
  } else {
    for (int64_t i = 0; i < rows; ++i, to += ld) {
      Rows<S, T>::widen_to(left.at<S>(row + i, rank), left.col_stride, depth, to, 1);
      for (int64_t k = 0; k < depth; ++k) to[k] *= scale[k];
    }
  }
}

// to[j] = the draw for the element of the weight at line `row`, place col + j of where the sums are: its logical row and
// column, or where `turned` its column and row.
template <typename T>
FLORA_TARGET void draw_line(const Rounding& rule, int64_t row, int64_t col, uint32_t* to) {
  const uint32_t low = static_cast<uint32_t>(rule.seed), high = static_cast<uint32_t>(rule.seed >> 32);
  const uint32_t line = static_cast<uint32_t>(row) * kGolden;
  if (rule.turned) {
    for (int64_t j = 0; j < kCols<T>; ++j) {
      to[j] = mix32(line ^ mix32((static_cast<uint32_t>(col + j) * kGolden) ^ low) ^ high);
    }
  } else {
    const uint32_t key = mix32(line ^ low) ^ high;
    for (int64_t j = 0; j < kCols<T>; ++j) to[j] = mix32((static_cast<uint32_t>(col + j) * kGolden) ^ key);
  }
}

// A whole line that lies together: kCols numbers in S.
template <typename S, typename T>
struct Whole {
  FLORA_TARGET static void read(const S* from, T* to) { Rows<S, T>::widen_to(from, 1, kCols<T>, to, 1); }
  FLORA_TARGET static void write(const T* value, S* to) { round_line<S, T>(value, kCols<T>, to); }

  // What reading gives after writing.
  FLORA_TARGET static void settle(T* value) {
    if constexpr (std::is_same_v<S, Half>) {
      S rounded[kCols<T>];
      write(value, rounded);
      read(rounded, value);
    } else {
      for (int64_t j = 0; j < kCols<T>; ++j) value[j] = static_cast<T>(widen(narrow<S>(value[j])));
    }
  }
};

// Vector by vector: loops take one of 16-bit numbers at a time, two of sums, and what is then read together was stored apart.
template <>
struct Whole<BFloat16, float> {
  typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));

  FLORA_TARGET static void read(const BFloat16* from, float* to) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Halves bits = *reinterpret_cast<const Halves*>(from + v * kLanes<float>);
      *reinterpret_cast<Words*>(to + v * kLanes<float>) = __builtin_convertvector(bits, Words) << 16;
    }
  }
  FLORA_TARGET static void write(const float* value, BFloat16* to) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Words bits = rounded(*reinterpret_cast<const Words*>(value + v * kLanes<float>)) >> 16;
      *reinterpret_cast<Halves*>(to + v * kLanes<float>) = __builtin_convertvector(bits, Halves);
    }
  }
  FLORA_TARGET static void settle(float* value) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      Words& bits = *reinterpret_cast<Words*>(value + v * kLanes<float>);
      bits = rounded(bits) & 0xffff0000u;
    }
  }

 private:
  // The high halves of what narrow<BFloat16> returns.
  FLORA_TARGET __attribute__((always_inline)) static inline Words rounded(Words bits) {
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u), nan = bits * 0u + 0x7fc00000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest;
  }
};

// Numbers that D holds, which rounding to nearest then keeps.
template <typename D, typename T>
FLORA_TARGET void dither(T* value, const uint32_t* draws) {
  if constexpr (sizeof(D) == 2) {
    for (int64_t j = 0; j < kCols<T>; ++j) value[j] = dithered<D>(static_cast<float>(value[j]), draws[j]);
  }
}

// A line of kCols numbers at most; a whole one that lies together takes loops whose length the compiler knows.
template <typename T>
FLORA_TARGET void read_line(const Out& from, int64_t row, int64_t col, int64_t n, T* to) {
  with_type(from.dtype, [&](auto* s) {
    using S = Storage<decltype(s)>;
    const S* line = static_cast<const S*>(from.data) + row * from.row_stride + col * from.col_stride;
    if (n == kCols<T> && from.col_stride == 1) {
      Whole<S, T>::read(line, to);
    } else {
      Rows<S, T>::widen_to(line, from.col_stride, n, to, 1);
    }
  });
}

// value = value rounded, to nearest, or with the draws where there are some and the dtype has 16 bits.
template <typename T>
FLORA_TARGET void write_line(const Out& to, int64_t row, int64_t col, int64_t n, T* value, const uint32_t* draws) {
  with_type(to.dtype, [&](auto* d) {
    using D = Storage<decltype(d)>;
    D* line = static_cast<D*>(to.data) + row * to.row_stride + col * to.col_stride;
    if (draws) dither<D, T>(value, draws);
    if (n == kCols<T> && to.col_stride == 1) {
      Whole<D, T>::write(value, line);
    } else if (to.col_stride == 1) {
      round_line<D, T>(value, n, line);
    } else {
      for (int64_t j = 0; j < n; ++j) line[j * to.col_stride] = narrow<D>(value[j]);
    }
  });
}

// value = value rounded to the dtype.
template <typename T>
FLORA_TARGET void settle_line(ScalarType dtype, T* value) {
  with_type(dtype, [&](auto* d) { Whole<Storage<decltype(d)>, T>::settle(value); });
}

// weight += sums (+ residual), residual = what that lost, as the rule says; lines of the sums kCols apart.
template <typename T>
FLORA_TARGET void round_lines(const Rounding& rule, int64_t row, int64_t rows, int64_t col, int64_t n, const T* sums) {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector weight[VECTORS] = {}, term[VECTORS] = {}, value[VECTORS];
  alignas(64) uint32_t draws[kCols<T>];
  T *const held = reinterpret_cast<T*>(weight), *const kept = reinterpret_cast<T*>(term);
  T* const line = reinterpret_cast<T*>(value);
  for (int64_t i = row; i < row + rows; ++i, sums += kCols<T>) {
    const Vector* sum = reinterpret_cast<const Vector*>(sums);
    if (rule.seeded) draw_line<T>(rule, i, col, draws);
    read_line<T>(rule.weight, i, col, n, held);
    if (!rule.residual.data) {
      for (int v = 0; v < VECTORS; ++v) value[v] = weight[v] + sum[v];
      write_line<T>(rule.weight, i, col, n, line, rule.seeded ? draws : nullptr);
      continue;
    }
    read_line<T>(rule.residual, i, col, n, kept);
    for (int v = 0; v < VECTORS; ++v) {
      term[v] += sum[v];
      value[v] = weight[v] + term[v];
    }
    write_line<T>(rule.weight, i, col, n, line, nullptr);
    settle_line<T>(rule.weight.dtype, line);
    for (int v = 0; v < VECTORS; ++v) {
      const Vector moved = value[v] - weight[v];
      value[v] = (weight[v] - (value[v] - moved)) + (term[v] - moved);
    }
    write_line<T>(rule.residual, i, col, n, line, rule.seeded ? draws : nullptr);
  }
}

// Whether one of n numbers has an exponent of ones: adding one to it then carries into the sign's bit.
template <typename Bits, Bits Exponent>
FLORA_TARGET bool exponent_of_ones(const void* data, int64_t stride, int64_t n) {
  typedef Bits __attribute__((may_alias)) Word;
  constexpr Bits one = Exponent & -Exponent;
  const Word* from = static_cast<const Word*>(data);
  Bits any = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) any |= static_cast<Bits>((from[i] & Exponent) + one);
  } else {
    for (int64_t i = 0; i < n; ++i) any |= static_cast<Bits>((from[i * stride] & Exponent) + one);
  }
  return any >> (8 * sizeof(Bits) - 1);
}

inline bool not_finite(ScalarType dtype, const void* data, int64_t stride, int64_t n) {
  switch (dtype) {
    case ScalarType::Float: return exponent_of_ones<uint32_t, 0x7f800000u>(data, stride, n);
    case ScalarType::Double: return exponent_of_ones<uint64_t, 0x7ff0000000000000u>(data, stride, n);
    case ScalarType::Half: return exponent_of_ones<uint16_t, 0x7c00u>(data, stride, n);
    default: return exponent_of_ones<uint16_t, 0x7f80u>(data, stride, n);
  }
}

template <typename T>
MergeKit<T> make_merge_kit() {
  MergeKit<T> kit;
  kit.scale_rows = [](const View& left, int64_t row, int64_t rows, int64_t rank, int64_t depth, const T* scale, T* to,
                      int64_t ld) {
    with_type(left.dtype, [&](auto* s) { scale_rows<Storage<decltype(s)>, T>(left, row, rows, rank, depth, scale, to, ld); });
  };
  kit.round_lines = &round_lines<T>;
  kit.not_finite = &not_finite;
  return kit;
}
