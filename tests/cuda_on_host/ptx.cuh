// csrc/cuda/ptx.cuh for a host compiler: every instruction by what the PTX ISA says of its fragments.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace flora::cuda {

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline void prefetch(const void*) {}

template <bool TRANS>
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();  // ldmatrix wants rows of 16 bytes, aligned
  const auto rows = on_host::give(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = TRANS ? lane % 4 * 2 + i : lane / 4, c = TRANS ? lane / 4 : lane % 4 * 2 + i;
      std::memcpy(&pair[i], static_cast<const char*>(rows[8 * m + r]) + 2 * c, 2);
    }
    to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// Terms beside the largest one lose the bits below its 24th, and the result is cut, not rounded: the least that cards keep.
inline float cut_sum(const float (&terms)[9]) {
  double sum = 0;
  float most = 0;
  for (float term : terms) most = std::max(most, std::fabs(term));
  if (most == 0 || !std::isfinite(most)) {
    for (float term : terms) sum += term;
    return static_cast<float>(sum);
  }
  const double step = std::ldexp(1.0, std::ilogb(most) - 23);
  for (float term : terms) sum += std::trunc(term / step) * step;
  const float near = static_cast<float>(sum);
  return std::fabs(static_cast<double>(near)) > std::fabs(sum) ? std::nextafter(near, 0.0f) : near;
}

template <typename Widen>
void multiply_add_of(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1, const Widen& widened) {
  struct Operands {
    uint32_t left[4], right[2];
  };
  const auto all = on_host::give(Operands{{left[0], left[1], left[2], left[3]}, {right0, right1}});
  const auto half = [&](uint32_t both, unsigned which) { return widened(static_cast<unsigned short>(both >> 16 * which)); };
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    for (unsigned first = 0; first < 16; first += 8) {
      float terms[9] = {sum[i]};
      for (unsigned k = first; k < first + 8; ++k) {
        const float a = half(all[row % 8 * 4 + k % 8 / 2].left[row / 8 + k / 8 * 2], k % 2);
        terms[1 + k % 8] = a * half(all[col * 4 + k % 8 / 2].right[k / 8], k % 2);
      }
      sum[i] = cut_sum(terms);
    }
  }
}
inline void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  multiply_add_of(sum, left, right0, right1, [](unsigned short bits) { return __half2float(__ushort_as_half(bits)); });
}
inline void multiply_add_bfloat16(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  multiply_add_of(sum, left, right0, right1, [](unsigned short bits) { return __uint_as_float(uint32_t{bits} << 16); });
}

}  // namespace flora::cuda
