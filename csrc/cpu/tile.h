// The leaves of merge_, compiled once per instruction set: merge.cpp includes this file inside a namespace each time.
//
// The includer defines FLORA_TARGET (the target attribute of every function here), FLORA_F16C, VECTOR_BYTES, and the
// register tile: ROWS * VECTORS vectors of sums stay in registers over the whole inner loop. There is no include guard
// on purpose. A lambda here would not inherit FLORA_TARGET and would run without the instruction set.

template <typename T>
constexpr int64_t kLanes = VECTOR_BYTES / sizeof(T);
constexpr int64_t kRows = ROWS;
template <typename T>
constexpr int64_t kCols = VECTORS * kLanes<T>;

template <typename S, typename T>
struct Rows {
  // to[i * to_stride] = from[i * stride]
  FLORA_TARGET static void widen_to(const S* from, int64_t stride, int64_t n, T* to, int64_t to_stride) {
    if (stride == 1 && to_stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * to_stride] = static_cast<T>(widen(from[i * stride]));
    }
  }

  // weight[i * stride] = round(weight[i * stride] + sum[i])
  FLORA_TARGET static void add(S* weight, int64_t stride, int64_t n, const T* sum) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) weight[i] = narrow<S>(static_cast<T>(widen(weight[i])) + sum[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        weight[i * stride] = narrow<S>(static_cast<T>(widen(weight[i * stride])) + sum[i]);
      }
    }
  }
};

#if FLORA_F16C
// The conversion instructions; the portable bit arithmetic is several times slower.
template <>
struct Rows<Half, float> {
  FLORA_TARGET static void widen_to(const Half* from, int64_t stride, int64_t n, float* to, int64_t to_stride) {
    int64_t i = 0;
    if (stride == 1 && to_stride == 1) {
      for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, load8(from + i));
    }
    for (; i < n; ++i) to[i * to_stride] = _cvtsh_ss(from[i * stride].bits);
  }

  FLORA_TARGET static void add(Half* weight, int64_t stride, int64_t n, const float* sum) {
    int64_t i = 0;
    if (stride == 1) {
      for (; i + 8 <= n; i += 8) {
        const __m256 value = _mm256_add_ps(load8(weight + i), _mm256_loadu_ps(sum + i));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(weight + i), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
      }
    }
    for (; i < n; ++i) {
      const float value = _cvtsh_ss(weight[i * stride].bits) + sum[i];
      weight[i * stride].bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    }
  }

 private:
  FLORA_TARGET static __m256 load8(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
};
#endif

// to[panel][k][i] = B[panel * kRows + i, k] * scale[k], for panels begin to end; rows beyond the matrix are zero. `to`
// is where panel 0 starts.
template <typename S, typename T>
FLORA_TARGET void pack_left(const View& B, const float* scale, int64_t begin, int64_t end, T* to) {
  constexpr int64_t kChunk = 16 * kRows;
  T line[kChunk];
  const int64_t rank = B.cols;
  if (B.row_stride < B.col_stride) {
    // Read along the rows of B, over several panels at a time: one cache line serves them all.
    for (int64_t row = begin * kRows; row < end * kRows; row += kChunk) {
      const int64_t wanted = end * kRows - row < kChunk ? end * kRows - row : kChunk;
      const int64_t n = B.rows - row < wanted ? B.rows - row : wanted;
      for (int64_t k = 0; k < rank; ++k) {
        Rows<S, T>::widen_to(B.at<S>(row, k), B.row_stride, n, line, 1);
        for (int64_t i = n; i < wanted; ++i) line[i] = 0;
        T* column = to + (row * rank + k * kRows);
        for (int64_t p = 0; p < wanted; p += kRows) {
          for (int64_t i = 0; i < kRows; ++i) column[p * rank + i] = line[p + i] * static_cast<T>(scale[k]);
        }
      }
    }
    return;
  }
  for (int64_t row = begin * kRows; row < end * kRows; ++row) {
    T* element = to + (row / kRows * rank * kRows + row % kRows);
    for (int64_t k0 = 0; k0 < rank; k0 += kChunk) {
      const int64_t n = rank - k0 < kChunk ? rank - k0 : kChunk;
      if (row >= B.rows) {
        for (int64_t k = k0; k < k0 + n; ++k) element[k * kRows] = 0;
        continue;
      }
      Rows<S, T>::widen_to(B.at<S>(row, k0), B.col_stride, n, line, 1);
      for (int64_t k = 0; k < n; ++k) element[(k0 + k) * kRows] = line[k] * static_cast<T>(scale[k0 + k]);
    }
  }
}

// to[panel][k][j] = A[k, panel * kCols + j], for panels begin to end; columns beyond the matrix are zero.
template <typename S, typename T>
FLORA_TARGET void pack_right(const View& A, int64_t begin, int64_t end, T* to) {
  constexpr int64_t width = kCols<T>;
  constexpr int64_t kChunk = 32;  // as many lines of the panel as stay in the L1 cache while columns are written
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t col = panel * width;
    const int64_t n = A.cols - col < width ? A.cols - col : width;
    T* lines = to + col * A.rows;
    if (A.col_stride <= A.row_stride) {
      for (int64_t k = 0; k < A.rows; ++k) {
        Rows<S, T>::widen_to(A.at<S>(k, col), A.col_stride, n, lines + k * width, 1);
      }
    } else {
      for (int64_t k = 0; k < A.rows; k += kChunk) {
        const int64_t depth = A.rows - k < kChunk ? A.rows - k : kChunk;
        for (int64_t j = 0; j < n; ++j) {
          Rows<S, T>::widen_to(A.at<S>(k, col + j), A.row_stride, depth, lines + k * width + j, width);
        }
      }
    }
    for (int64_t k = 0; k < A.rows; ++k) {
      for (int64_t j = n; j < width; ++j) lines[k * width + j] = 0;
    }
  }
}

// sum (kRows, kCols) = left (depth, kRows)^T right (depth, kCols), or += where `resume`. `right` and `sum` are aligned
// to VECTOR_BYTES. Ranks are added in order, so cutting the depth into pieces changes no bit.
template <typename T>
FLORA_TARGET void multiply(int64_t depth, const T* left, const T* right, bool resume, T* sum) {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector total[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      const Vector zero = {};
      total[i][v] = resume ? reinterpret_cast<const Vector*>(sum)[i * VECTORS + v] : zero;
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector* line = reinterpret_cast<const Vector*>(right + k * kCols<T>);
    const T* column = left + k * kRows;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) total[i][v] += column[i] * line[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<Vector*>(sum)[i * VECTORS + v] = total[i][v];
  }
}

// weight[i * row_stride + j * col_stride] = round(that + sum[i][j]), for i < height and j < width.
template <typename W, typename T>
FLORA_TARGET void add_tile(void* weight, int64_t row_stride, int64_t col_stride, int64_t height, int64_t width,
                           const T* sum) {
  W* line = static_cast<W*>(weight);
  const bool whole = col_stride == 1 && width == kCols<T>;
  for (int64_t i = 0; i < height; ++i, line += row_stride, sum += kCols<T>) {
    if (whole) {
      Rows<W, T>::add(line, 1, kCols<T>, sum);
    } else {
      Rows<W, T>::add(line, col_stride, width, sum);
    }
  }
}
