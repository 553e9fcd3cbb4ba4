// What the leaves in product.h and rounding.h share, compiled once per instruction set: kit.cpp includes all three inside a
// namespace each time.
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
