// Compiles the leaves of the products for every instruction set and picks one at run time.
#include "kit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flora {
namespace {

#if defined(__x86_64__)
#define FLORA_F16C 1
namespace avx512 {
#define FLORA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define FLORA_TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define FLORA_BF16 1
#define VECTOR_BYTES 64
#define ROWS 8
#define VECTORS 3
#include "tile.h"
#include "product.h"
#include "rounding.h"
#undef FLORA_BF16
#undef FLORA_TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef VECTORS
}  // namespace avx512
namespace avx2 {
#define FLORA_TARGET __attribute__((target("avx2,fma,f16c")))
#define FLORA_BF16 0
#define VECTOR_BYTES 32
#define ROWS 6
#define VECTORS 2
#include "tile.h"
#include "product.h"
#include "rounding.h"
#undef FLORA_TARGET
#undef VECTOR_BYTES
#undef ROWS
#undef VECTORS
}  // namespace avx2
#undef FLORA_F16C
#undef FLORA_BF16
#endif

#define FLORA_F16C 0
#define FLORA_BF16 0
namespace baseline {
#define FLORA_TARGET
#define VECTOR_BYTES 16
#define ROWS 6
#define VECTORS 2
#include "tile.h"
#include "product.h"
#include "rounding.h"
}  // namespace baseline

enum Set { kBaseline, kAvx2, kAvx512 };

Set best_set() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? kAvx512 : has_avx2 ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

template <typename E, typename T>
Kit<E, T> choose_kit() {
  [[maybe_unused]] const Set set = best_set();
#if defined(__x86_64__)
  if (set == kAvx512) return avx512::make_kit<E, T>();
  if constexpr (!std::is_same_v<E, BFloat16>) {
    if (set == kAvx2) return avx2::make_kit<E, T>();
  }
#endif
  if constexpr (!std::is_same_v<E, BFloat16>) return baseline::make_kit<E, T>();
  return {};
}

template <typename T>
MergeKit<T> choose_merge_kit() {
  [[maybe_unused]] const Set set = best_set();
#if defined(__x86_64__)
  if (set == kAvx512) return avx512::make_merge_kit<T>();
  if (set == kAvx2) return avx2::make_merge_kit<T>();
#endif
  return baseline::make_merge_kit<T>();
}

}  // namespace

bool multiplies_bf16() {
#if defined(__x86_64__)
  static const bool has =
      kit<float, float>().lanes == 16 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

template <typename E, typename T>
const Kit<E, T>& kit() {
  static const Kit<E, T> chosen = choose_kit<E, T>();
  return chosen;
}

template <typename T>
const MergeKit<T>& merge_kit() {
  static const MergeKit<T> chosen = choose_merge_kit<T>();
  return chosen;
}

template const MergeKit<float>& merge_kit();
template const MergeKit<double>& merge_kit();
template const Kit<float, float>& kit();
template const Kit<double, double>& kit();
template const Kit<BFloat16, float>& kit();

}  // namespace flora
