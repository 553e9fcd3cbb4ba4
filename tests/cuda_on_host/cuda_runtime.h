// CUDA's language and runtime for a host compiler, as far as csrc/cuda uses them: a launch runs its blocks one after another.
//
// A thread is a fiber. A warp runs alone until all of its threads wait at __syncthreads; so one warp is as far ahead of the
// others as the barriers let it be, and with the warps in either order a missing barrier changes the result. Shared memory
// is full of NaN at the start of a block, and what lies beyond what the launch asked for is poisoned under AddressSanitizer.
#pragma once

#include <sanitizer/asan_interface.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned n = 1) : x(n) {}
};
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
inline uint32_t __float_as_uint(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
using std::isfinite;
inline void atomicMin(int* to, int value) { *to = min(*to, value); }

// ---- threads ------------------------------------------------------------------------------------------------------

namespace on_host {

constexpr size_t kStack = 1 << 16, kSharedMost = 232448;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done, waits;
};

// What the lanes of a warp give one another. Two of each, taken in turns: whoever writes again knows that all have read.
struct alignas(16) Exchange {
  char bytes[2][32][64];
  int turns[32];
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(1024);
  std::vector<Exchange> exchanges = std::vector<Exchange>(32);
  ucontext_t scheduler;
  std::function<void()> kernel;
  unsigned thread, threads, block;
};
inline Machine machine;
struct Index {
  unsigned x;
};
inline Index thread_index_of() { return {machine.thread}; }
inline Index block_index_of() { return {machine.block}; }

// On to the next thread of this warp that neither is done nor waits for other warps; where there is none, back to the scheduler.
inline void leave() {
  const unsigned from = machine.thread, warp = from / 32 * 32;
  for (unsigned step = 1; step <= 32; ++step) {
    const unsigned next = warp + (from - warp + step) % 32;
    if (next >= machine.threads || machine.fibers[next].done || machine.fibers[next].waits) continue;
    if (next == from) return;
    machine.thread = next;
    swapcontext(&machine.fibers[from].context, &machine.fibers[next].context);
    return;
  }
  swapcontext(&machine.fibers[from].context, &machine.scheduler);
}

template <typename T>
struct Given {
  const char (*bytes)[64];
  const T& operator[](unsigned lane) const { return *reinterpret_cast<const T*>(bytes[lane]); }
};
// Gives `mine` to the warp; returns what each of its 32 threads gave.
template <typename T>
Given<T> give(const T& mine) {
  static_assert(sizeof(T) <= 64);
  const unsigned lane = machine.thread % 32, first = machine.thread / 32 * 32;
  Exchange& e = machine.exchanges[machine.thread / 32];
  const int turn = ++e.turns[lane];
  std::memcpy(e.bytes[turn % 2][lane], &mine, sizeof(T));
  for (unsigned other = 0; other < 32 && first + other < machine.threads; ++other) {
    while (e.turns[other] < turn) {
      const Fiber& late = machine.fibers[first + other];
      if (late.done || late.waits) std::abort();  // it went elsewhere than its warp
      leave();
    }
  }
  return {e.bytes[turn % 2]};
}

inline void enter() {
  machine.kernel();
  machine.fibers[machine.thread].done = true;
  leave();
}

void run(unsigned blocks, unsigned threads, size_t shared, std::function<void()> kernel);

}  // namespace on_host

#define threadIdx on_host::thread_index_of()
#define blockIdx on_host::block_index_of()
inline void __syncthreads() {
  on_host::machine.fibers[on_host::machine.thread].waits = true;
  on_host::leave();
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int by) { return on_host::give(value)[on_host::machine.thread % 32 ^ by]; }

// ---- the runtime --------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorName(cudaError_t) { return "an error"; }
inline const char* cudaGetErrorString(cudaError_t) { return "what the host's stand-in refuses"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
// A card of two processors, so that blocks take several tiles; the environment makes it an older one, or one with less memory.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const auto given = [](const char* name, int otherwise) { return std::getenv(name) ? std::atoi(std::getenv(name)) : otherwise; };
  *value = which == cudaDevAttrMultiProcessorCount      ? 2
           : which == cudaDevAttrComputeCapabilityMajor ? given("ON_HOST_MAJOR", 9)
                                                        : given("ON_HOST_SHARED", on_host::kSharedMost);
  return cudaSuccess;
}
inline size_t allowed_shared = 49152;
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed_shared = static_cast<size_t>(value);
  return value <= static_cast<int>(on_host::kSharedMost) ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  if (config->dynamicSmemBytes > allowed_shared || config->blockDim.x > 1024 || !config->gridDim.x) return cudaErrorInvalidValue;
  allowed_shared = 49152;
  on_host::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [=] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
