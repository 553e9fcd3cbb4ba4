// The leaves of the products, compiled once per instruction set: included after tile.h, inside the same namespaces.
//
// A product is cut into tiles of kRows rows by up to kCols columns whose sums stay in registers over the whole depth. Its
// left factor is read where it lies, row by row; its right factor is packed into panels of whole vectors. `E` is the type
// of both, `T` that of the sums. bf16 is multiplied in pairs along the depth (vdpbf16ps), so its panels interleave two
// lines and an odd depth is padded with a zero on both sides.

// to[i] = from[i * stride] in E
template <typename S, typename E>
struct Line {
  FLORA_TARGET static void convert(const S* from, int64_t stride, int64_t n, E* to) {
    Rows<S, E>::widen_to(from, stride, n, to, 1);
  }
};
template <typename S>
struct Line<S, BFloat16> {
  FLORA_TARGET static void convert(const S* from, int64_t stride, int64_t n, BFloat16* to) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (stride == 1 && n == 32) {
        std::memcpy(to, from, 32 * sizeof(S));  // inlined: what pack asks for
      } else if (stride == 1) {
        std::memcpy(to, from, n * sizeof(S));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
      }
    } else if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = narrow<BFloat16>(widen(from[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = narrow<BFloat16>(widen(from[i * stride]));
    }
  }
};

// to[j] = round(sum[j])
template <typename D, typename T>
FLORA_TARGET void round_line(const T* sum, int64_t n, D* to) {
  int64_t j = 0;
#if FLORA_F16C
  if constexpr (std::is_same_v<D, Half> && std::is_same_v<T, float>) {
    for (; j + 8 <= n; j += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm256_cvtps_ph(_mm256_loadu_ps(sum + j), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; j < n; ++j) to[j] = narrow<D>(sum[j]);
}

// The mask of flora/kernels/reference.py: to[j] = 0 or mask.value, a function of the row's key and of column col + j.
template <typename T>
FLORA_TARGET void mask_line(const Mask& mask, int64_t row, int64_t col, int64_t n, T* to) {
  const uint64_t key = static_cast<uint64_t>(mask.keys[row * mask.stride]);
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  const T value = static_cast<T>(mask.value);
  for (int64_t j = 0; j < n; ++j) {
    uint32_t z = (static_cast<uint32_t>(col + j) * 0x9E3779B1u) ^ low;
    z = (z ^ (z >> 16)) * 0x85EBCA6Bu;
    z = (z ^ (z >> 13)) * 0xC2B2AE35u;
    z ^= (z >> 16) ^ high;
    z = (z ^ (z >> 16)) * 0x85EBCA6Bu;
    z = (z ^ (z >> 13)) * 0xC2B2AE35u;
    z ^= z >> 16;
    to[j] = (z >> 8) >= mask.threshold ? value : T(0);
  }
}

// line[j] *= the mask of that row and of the columns from col on
template <typename E, typename T>
FLORA_TARGET void drop_line(const Mask& mask, int64_t row, int64_t col, int64_t n, E* line) {
  T factor[kStrip];
  for (int64_t j = 0; j < n; j += kStrip) {
    const int64_t count = n - j < kStrip ? n - j : kStrip;
    mask_line<T>(mask, row, col + j, count, factor);
    for (int64_t i = 0; i < count; ++i) line[j + i] = narrow<E>(static_cast<T>(widen(line[j + i])) * factor[i]);
  }
}

// to (rows, ld) = rows begin to end of `from` in E, with the mask where there is one, zeros after its columns.
template <typename S, typename E, typename T>
FLORA_TARGET void copy_rows(const View& from, int64_t begin, int64_t end, const Mask* mask, E* to, int64_t ld) {
  for (int64_t row = begin; row < end; ++row, to += ld) {
    Line<S, E>::convert(from.at<S>(row, 0), from.col_stride, from.cols, to);
    if (mask) drop_line<E, T>(*mask, row, 0, from.cols, to);
    for (int64_t j = from.cols; j < ld; ++j) to[j] = E{};
  }
}

// to[k][j] = from[j][k] for a block of words: `depth` lines of the `cols` columns wanted.
template <typename W>
FLORA_TARGET void transpose_words(const W (&from)[16][16], int64_t depth, int64_t cols, W* to, int64_t ld) {
#if VECTOR_BYTES == 64
  if (sizeof(W) == 4 && depth == 16 && cols == 16) {
    __m512i line[16];
    for (int i = 0; i < 16; ++i) line[i] = _mm512_load_si512(from[i]);
    // Lines 1, 2, 4 and 8 apart exchange their off-diagonal blocks of that size.
#pragma GCC unroll 4
    for (int d = 1; d < 16; d *= 2) {
      const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(d));
      const __m512i low = _mm512_mask_add_epi32(index, odd, index, _mm512_set1_epi32(16 - d));
      const __m512i high = _mm512_add_epi32(index, _mm512_mask_mov_epi32(_mm512_set1_epi32(d), odd, _mm512_set1_epi32(16)));
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i & d) continue;
        const __m512i a = line[i], b = line[i + d];
        line[i] = _mm512_permutex2var_epi32(a, low, b);
        line[i + d] = _mm512_permutex2var_epi32(a, high, b);
      }
    }
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * ld, line[i]);
    return;
  }
#endif
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < cols; ++j) to[k * ld + j] = from[j][k];
  }
}

// One line of words of a panel: the elements of kPair lines of the matrix, zeros beyond n.
template <typename E>
FLORA_TARGET void interleave(const E* const* lines, int64_t n, int64_t width, E* to) {
  if constexpr (kPair<E> == 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = lines[0][j];
    for (int64_t j = n; j < width; ++j) to[j] = E{};
  } else {
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    for (int64_t j = 0; j < n; ++j) words[j] = lines[0][j].bits | static_cast<uint32_t>(lines[1][j].bits) << 16;
    for (int64_t j = n; j < width; ++j) words[j] = 0;
  }
}

// Panels p, from `to` on and `stride` apart: panel[k / pair][j][k % pair] = right[k0 + k, c0 + p * kCols + j] for k < depth
// and n columns in all, zeros beyond; each begins after `before` lines that it holds already.
template <typename S, typename E, typename T>
FLORA_TARGET void pack(const View& right, int64_t k0, int64_t depth, int64_t c0, int64_t n, const Mask* mask, E* to,
                       int64_t stride, int64_t before) {
  constexpr int64_t pair = kPair<E>, step = kCols<T>;
  using Word = std::conditional_t<pair == 2, uint32_t, E>;
  const int64_t words = (depth + pair - 1) / pair;
  if (right.row_stride != 1 || right.col_stride == 1 || mask) {
    // Line by line through all panels, as they lie in memory.
    const bool direct = std::is_same_v<S, E> && right.col_stride == 1 && !mask;
    E copies[pair][step];
    const E zeros[step] = {};
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t c = 0; c < n; c += step) {
        const int64_t count = n - c < step ? n - c : step;
        const int64_t width = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
        const E* lines[pair];
        for (int64_t p = 0; p < pair; ++p) {
          const int64_t k = k0 + w * pair + p;
          if (w * pair + p >= depth) {
            lines[p] = zeros;
          } else if (direct) {
            lines[p] = right.at<E>(k, c0 + c);
            for (int64_t j = 0; j < count; j += 64 / sizeof(E)) __builtin_prefetch(lines[p] + 8 * right.row_stride + j);
          } else {
            Line<S, E>::convert(right.at<S>(k, c0 + c), right.col_stride, count, copies[p]);
            if (mask) drop_line<E, T>(*mask, k, c0 + c, count, copies[p]);
            lines[p] = copies[p];
          }
        }
        interleave<E>(lines, count, width, to + c / step * stride + before * width + w * pair * width);
      }
    }
    return;
  }
  // Columns are contiguous: 16 of them at a time, 16 words of each.
  for (int64_t first = 0; first < n; first += step, to += stride) {
    const int64_t count = n - first < step ? n - first : step;
    const int64_t width = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    Word* panel = reinterpret_cast<Word*>(to + before * width);
    for (int64_t c = 0; c < width; c += 16) {
      const int64_t cols = count - c < 16 ? count - c : 16, wide = width - c < 16 ? width - c : 16;
      for (int64_t w = 0; w < words; w += 16) {
        alignas(64) Word block[16][16];
        const int64_t lines = words - w < 16 ? words - w : 16;
        const int64_t deep = depth - w * pair < 16 * pair ? depth - w * pair : 16 * pair;
        if (cols < 16 || deep < 16 * pair) std::memset(block, 0, sizeof block);
        for (int64_t j = 0; j < cols; ++j) {
          const S* column = right.at<S>(k0 + w * pair, c0 + first + c + j);
          Line<S, E>::convert(column, 1, deep, reinterpret_cast<E*>(block[j]));
        }
        transpose_words<Word>(block, lines, wide, panel + w * width + c, width);
      }
    }
  }
}

// Asks for the lines of out that will be written, while the products before that are summed.
template <typename D>
FLORA_TARGET void fetch_lines(const Out& out, int64_t row, int64_t rows, int64_t col, int64_t n) {
  if (out.col_stride != 1) return;
  for (int64_t i = 0; i < rows; ++i) {
    const D* line = static_cast<const D*>(out.data) + (row + i) * out.row_stride + col;
    for (int64_t j = 0; j < n; j += 64 / sizeof(D)) __builtin_prefetch(line + j, 1);
    __builtin_prefetch(line + n - 1, 1);
  }
  asm volatile("");  // gcc takes a function that only prefetches for one without effect, and drops its calls
}

// Terms added one after another before the sum joins what came before: a longer chain of fp32 additions loses more than the
// blocked sums of a good library do.
constexpr int64_t kChain = 256;

// sum (kRows, V vectors; lines kCols apart) = the sum over pieces of left (kRows, depth) right (depth, V vectors), added to
// what it held where `resume`. Panels and `sum` are aligned.
template <int V, typename E, typename T>
struct Tile {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));

  // sum = total, or += where it holds something; total = 0.
  FLORA_TARGET __attribute__((always_inline)) static inline void flush(Vector (&total)[ROWS][V], bool held, T* sum) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        Vector& to = *reinterpret_cast<Vector*>(sum + i * kCols<T> + v * kLanes<T>);
        to = held ? to + total[i][v] : total[i][v];
        total[i][v] = Vector{};
      }
    }
  }

  FLORA_TARGET static void multiply(const Piece<E>* pieces, int64_t count, bool resume, T* sum) {
    Vector total[ROWS][V] = {};
    bool held = resume;
    for (const Piece<E>* piece = pieces; piece < pieces + count; ++piece) {
      const E* row[ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) row[i] = piece->row[i];
      for (int64_t begin = 0; begin < piece->depth; begin += kChain) {
        const int64_t end = piece->depth - begin < kChain ? piece->depth : begin + kChain;
        for (int64_t k = begin; k < end; ++k) {
          const Vector* line = reinterpret_cast<const Vector*>(piece->right) + k * V;
#pragma GCC unroll 16
          for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) total[i][v] += row[i][k] * line[v];
          }
        }
        if (end - begin == kChain) {
          flush(total, held, sum);
          held = true;
        }
      }
    }
    flush(total, held, sum);
  }
};

#if FLORA_BF16
template <int V>
struct Tile<V, BFloat16, float> {
  FLORA_TARGET_BF16 static void multiply(const Piece<BFloat16>* pieces, int64_t count, bool resume, float* sum) {
    __m512 total[ROWS][V];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        total[i][v] = resume ? _mm512_load_ps(sum + i * kCols<float> + v * 16) : _mm512_setzero_ps();
      }
    }
    for (const Piece<BFloat16>* piece = pieces; piece < pieces + count; ++piece) {
      const BFloat16* row[ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) row[i] = piece->row[i];
      for (int64_t k = 0; k < piece->depth; k += 2) {
        __m512bh line[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) line[v] = (__m512bh)_mm512_load_si512(piece->right + (k * V + 2 * v) * 16);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          int32_t two;
          std::memcpy(&two, row[i] + k, sizeof two);
          const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) total[i][v] = _mm512_dpbf16_ps(total[i][v], both, line[v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) _mm512_store_ps(sum + i * kCols<float> + v * 16, total[i][v]);
    }
  }
};

// to[j] = round(sum[j]) with the instruction for it: an eighth of the work of the bit arithmetic.
FLORA_TARGET_BF16 inline void round_bf16(const float* sum, int64_t n, BFloat16* to) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 some = n - j < 16 ? (1u << (n - j)) - 1 : 0xffffu;
    const __m256bh sixteen = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, sum + j));
    _mm256_mask_storeu_epi16(to + j, some, (__m256i)sixteen);
  }
}
#endif

// to[j] = round(sum[j]) for a line of products in E.
template <typename E, typename D, typename T>
FLORA_TARGET void round_product(const T* sum, int64_t n, D* to) {
#if FLORA_BF16
  if constexpr (std::is_same_v<E, BFloat16> && std::is_same_v<D, BFloat16>) {
    round_bf16(sum, n, to);
    return;
  }
#endif
  round_line<D, T>(sum, n, to);
}

// to += tile, or += mask * tile, for `rows` lines of n columns; both kCols apart.
template <typename T>
FLORA_TARGET void add_lines(const T* tile, int64_t rows, int64_t n, const Mask* mask, int64_t row, int64_t col, T* to) {
  T factor[kCols<T>];
  for (int64_t i = 0; i < rows; ++i, tile += kCols<T>, to += kCols<T>) {
    if (mask) {
      mask_line<T>(*mask, row + i, col, n, factor);
      for (int64_t j = 0; j < n; ++j) to[j] += factor[j] * tile[j];
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] += tile[j];
    }
  }
}

// out[row + i, col + j] = round(sums[i][j] + bias[col + j]), or += without a bias; lines kCols apart.
template <typename E, typename D, typename T>
FLORA_TARGET void write_lines(const Out& out, int64_t row, int64_t rows, int64_t col, int64_t n, const T* bias, T* sums) {
  for (int64_t i = 0; i < rows; ++i, sums += kCols<T>) {
    D* line = static_cast<D*>(out.data) + (row + i) * out.row_stride + col * out.col_stride;
    if (bias) {
      for (int64_t j = 0; j < n; ++j) sums[j] += bias[col + j];
    }
    if (out.add && (out.col_stride != 1 || std::is_same_v<D, Half>)) {
      Rows<D, T>::add(line, out.col_stride, n, sums);
    } else if (out.add) {
      for (int64_t j = 0; j < n; ++j) sums[j] += static_cast<T>(widen(line[j]));
      round_product<E, D, T>(sums, n, line);
    } else if (out.col_stride == 1) {
      round_product<E, D, T>(sums, n, line);
    } else {
      for (int64_t j = 0; j < n; ++j) line[j * out.col_stride] = narrow<D>(sums[j]);
    }
  }
}

// h[i][j] = round(tile[i][j] * scale[j]) in D where h is kept, and the same number in E for the product that follows.
template <typename D, typename E, typename T>
FLORA_TARGET void write_scaled(const T* tile, int64_t rows, int64_t n, const float* scale, void* h, int64_t h_ld, E* copy,
                               int64_t copy_ld) {
  T line[kCols<T>];
  D rounded[kCols<T>];
  D* kept = static_cast<D*>(h);
  for (int64_t i = 0; i < rows; ++i, tile += kCols<T>, copy += copy_ld) {
    for (int64_t j = 0; j < n; ++j) line[j] = tile[j] * static_cast<T>(scale[j]);
    round_product<E, D, T>(line, n, rounded);
    Line<D, E>::convert(rounded, 1, n, copy);
    if (!kept) continue;
    std::memcpy(kept, rounded, n * sizeof(D));
    kept += h_ld;
  }
}

// The leaves by storage type: each line of work asks once, outside FLORA_TARGET.
template <typename E, typename T>
Kit<E, T> make_kit() {
  Kit<E, T> kit{};
  kit.rows = kRows, kit.cols = kCols<T>, kit.lanes = kLanes<T>;
  kit.multiply[1] = &Tile<1, E, T>::multiply;
  kit.multiply[2] = &Tile<2, E, T>::multiply;
  kit.multiply[VECTORS] = &Tile<VECTORS, E, T>::multiply;
  kit.add_lines = &add_lines<T>;
  kit.copy_rows = [](const View& from, int64_t begin, int64_t end, const Mask* mask, E* to, int64_t ld) {
    with_type(from.dtype, [&](auto* s) { copy_rows<Storage<decltype(s)>, E, T>(from, begin, end, mask, to, ld); });
  };
  kit.pack = [](const View& right, int64_t k0, int64_t depth, int64_t c0, int64_t n, const Mask* mask, E* to,
                int64_t stride, int64_t before) {
    with_type(right.dtype, [&](auto* s) {
      pack<Storage<decltype(s)>, E, T>(right, k0, depth, c0, n, mask, to, stride, before);
    });
  };
  kit.fetch_lines = [](const Out& out, int64_t row, int64_t rows, int64_t col, int64_t n) {
    with_type(out.dtype, [&](auto* d) { fetch_lines<Storage<decltype(d)>>(out, row, rows, col, n); });
  };
  kit.write_lines = [](const Out& out, int64_t row, int64_t rows, int64_t col, int64_t n, const T* bias, T* sums) {
    with_type(out.dtype, [&](auto* d) { write_lines<E, Storage<decltype(d)>, T>(out, row, rows, col, n, bias, sums); });
  };
  kit.write_scaled = [](const T* tile, int64_t rows, int64_t n, const float* scale, ScalarType dtype, void* h,
                        int64_t h_ld, E* copy, int64_t copy_ld) {
    with_type(dtype, [&](auto* d) {
      write_scaled<Storage<decltype(d)>, E, T>(tile, rows, n, scale, h, h_ld, copy, copy_ld);
    });
  };
  return kit;
}
