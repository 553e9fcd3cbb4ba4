// Host functions without tensors: what the processor can do, and how the C allocator treats large blocks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cstdint>
#include <map>
#include <string>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__x86_64__)
// The register states that the operating system saves: a processor feature without its state must not be used.
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
  for (const char* key : {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
                          "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "neon"}) {
    features[key] = false;
  }
#if defined(__aarch64__)
  features["neon"] = true;
#endif
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return features;  // OSXSAVE
  const uint64_t states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6;
  const bool zmm = (states & 0xe6) == 0xe6;
  const bool tiles = (states & 0x60000) == 0x60000;
  features["fma"] = ymm && (c >> 12 & 1);
  features["f16c"] = ymm && (c >> 29 & 1);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const uint32_t subleaves = a;
  features["avx2"] = ymm && (b >> 5 & 1);
  features["avx512f"] = zmm && (b >> 16 & 1);
  features["avx512dq"] = zmm && (b >> 17 & 1);
  features["avx512bw"] = zmm && (b >> 30 & 1);
  features["avx512vl"] = zmm && (b >> 31 & 1);
  features["avx512_fp16"] = zmm && (d >> 23 & 1);
  features["amx_bf16"] = tiles && (d >> 22 & 1);
  features["amx_tile"] = tiles && (d >> 24 & 1);
  features["amx_int8"] = tiles && (d >> 25 & 1);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) features["avx512_bf16"] = zmm && (a >> 5 & 1);
#endif
  return features;
}

#if defined(__GLIBC__)
int checked(const char* name, int64_t bytes) {
  if (bytes < 0 || bytes > INT_MAX) {
    throw py::value_error(std::string("tune_allocator: expected ") + name + " from 0 to " + std::to_string(INT_MAX) +
                          " bytes, got " + std::to_string(bytes));
  }
  return static_cast<int>(bytes);
}
#endif

bool tune_allocator(int64_t mmap_threshold, int64_t trim_threshold, int64_t top_pad) {
#if defined(__GLIBC__)
  const int map = checked("mmap_threshold", mmap_threshold), trim = checked("trim_threshold", trim_threshold),
            pad = checked("top_pad", top_pad);
  const bool mapped = mallopt(M_MMAP_THRESHOLD, map) == 1;
  const bool trimmed = mallopt(M_TRIM_THRESHOLD, trim) == 1;
  const bool padded = mallopt(M_TOP_PAD, pad) == 1;
  return mapped && trimmed && padded;
#else
  (void)mmap_threshold, (void)trim_threshold, (void)top_pad;
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host functions without tensors.";
  m.def("cpu_features", &cpu_features,
        "Name the vector and matrix instructions that the processor has and the operating system enables.\n\n"
        "Returns a dict of bool by lower-case feature name; all False on processors it does not know.");
  m.def("tune_allocator", &tune_allocator, py::arg("mmap_threshold") = int64_t{1} << 30,
        py::arg("trim_threshold") = int64_t{1} << 30, py::arg("top_pad") = int64_t{64} << 20,
        "Make the C allocator keep large blocks instead of returning them to the system.\n\n"
        "By default glibc maps every large tensor afresh and unmaps it when it is freed, so each step of a training\n"
        "loop faults again on the first touch of every page. Sizes are in bytes, below 2**31 (ValueError otherwise).\n"
        "Acts on the whole process and on later allocations only. Returns True if every setting was accepted, False\n"
        "where the allocator is not glibc's or refuses one.");
}
