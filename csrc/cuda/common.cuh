// What the CUDA operators share: checks, launches, the table that tells a kernel what to read, and the four dtypes.
//
// Lists of tensors reach the device as one table, copied by cudaMemcpyAsync from ordinary host memory: the call returns as
// soon as the driver has the bytes, does not wait for the device and needs no buffer to outlive it. Kernel parameters
// would save that copy, but they hold 4 KiB and clients have no upper number.
#pragma once

#include "../common.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace flora::cuda {

inline void check_cuda(const char* op, const char* what, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or whoever asks next would be told of it
  check(error == cudaSuccess, op, ": expected ", what, " to succeed, got ", cudaGetErrorName(error), ": ",
        cudaGetErrorString(error));
}

inline bool is_cuda_float(const Tensor& t, int64_t dims, int64_t device) {
  return t.is_cuda() && t.get_device() == device && t.dim() == dims && is_float(t.scalar_type());
}

// A floating-point tensor of `dims` dimensions on CUDA device `device`; `what` names the argument in the message. Where there
// are thousands, ask is_cuda_float first: the message costs more to write than all of the checks.
inline void check_cuda_float(const Tensor& t, int64_t dims, int64_t device, const char* op, const std::string& what) {
  check(t.is_cuda(), op, ": expected ", what, " on a CUDA device, got it on another; move all tensors to one device");
  check(t.get_device() == device, op, ": expected ", what, " on cuda:", device, ", got it on cuda:", t.get_device(),
        "; move all tensors to one device");
  check(t.dim() == dims, op, ": expected ", what, " with ", dims, " dimension(s), got shape ", shape(t));
  check(is_float(t.scalar_type()), op, ": expected ", what, " in float32, float64, float16 or bfloat16, got ",
        name(t.scalar_type()));
}

inline cudaStream_t current_stream(const char* op, int64_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream) == AOTI_TORCH_SUCCESS, op,
        ": expected a current stream on cuda:", device, ", got an error from torch");
  return static_cast<cudaStream_t>(stream);
}

// Device memory for `bytes` bytes. Torch's allocator orders its reuse on the current stream, so it may die after a launch.
inline Tensor scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

inline Tensor upload(const char* op, const Tensor& like, const std::vector<char>& table, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(op, "the stream's state", cudaStreamIsCapturing(stream, &status));
  check(status == cudaStreamCaptureStatusNone, op, ": expected a stream that is not being captured, got one that is: the ",
        "pointers of this call would be read again at every replay; call it outside the graph");
  Tensor on_device = scratch(like, table.size());
  check_cuda(op, "the copy of the table",
             cudaMemcpyAsync(on_device.mutable_data_ptr(), table.data(), table.size(), cudaMemcpyHostToDevice, stream));
  return on_device;
}

// Appends `items` to a table; returns where they begin.
template <typename T>
size_t append(std::vector<char>& table, const std::vector<T>& items) {
  const size_t begin = (table.size() + 15) / 16 * 16;
  table.resize(begin + items.size() * sizeof(T));
  std::copy_n(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T), table.data() + begin);
  return begin;
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
            Args... args) {
  check(blocks > 0 && blocks < (int64_t{1} << 31), op, ": expected work for at most 2^31 - 1 blocks, got ", blocks,
        "; give fewer tensors a call");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check_cuda(op, "the launch", cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

enum Kind : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

inline Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::Half: return kHalf;
    default: return kBFloat16;
  }
}

__host__ __device__ constexpr int itemsize(int kind) { return kind == kFloat ? 4 : kind == kDouble ? 8 : 2; }

// Index of the last item whose `begin` is at most n; items ascend and the first begins at 0.
template <typename T>
__device__ int owner(const T* items, int count, int64_t n) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (items[middle].begin <= n ? low : high) = middle;
  }
  return low;
}

// N adjacent elements, moved in units of up to 16 bytes; the caller has checked that they are aligned to that.
template <typename S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Pack {
  S at[N];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// To nearest even; fp64 to a 16-bit type goes through fp32, as in PyTorch.
template <typename S, typename T>
__device__ __forceinline__ S narrow(T x) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<S>(x);
  }
}

// Calls f with a value of the storage type of `kind`.
template <typename F>
__device__ __forceinline__ void with_kind(int kind, const F& f) {
  switch (kind) {
    case kFloat: f(float{}); break;
    case kDouble: f(double{}); break;
    case kHalf: f(__half{}); break;
    default: f(__nv_bfloat16{}); break;
  }
}

template <int N, typename T>
__device__ __forceinline__ void load(const char* from, int kind, T (&x)[N]) {
  with_kind(kind, [&](auto s) {
    const auto pack = *reinterpret_cast<const Pack<decltype(s), N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = static_cast<T>(widen(pack.at[i]));
  });
}

template <int N, typename T>
__device__ __forceinline__ void store(char* to, int kind, const T (&x)[N]) {
  with_kind(kind, [&](auto s) {
    Pack<decltype(s), N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = narrow<decltype(s)>(x[i]);
    *reinterpret_cast<Pack<decltype(s), N>*>(to) = pack;
  });
}

}  // namespace flora::cuda
