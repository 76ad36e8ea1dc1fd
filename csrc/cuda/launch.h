// The host's side: how kernels are started, and which instance serves. Launch choices are constants of row.cu and channel.cu.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "values.cuh"

namespace fastnorm::cuda {

using Error = Kernels::Error;

// Null for success.
inline Error words(cudaError_t status) {
  thread_local std::string text;
  if (status == cudaSuccess) return nullptr;
  text = std::string("CUDA error: ") + cudaGetErrorString(status);
  return text.c_str();
}

// The caller has made the device current for as long as the call lasts; this runtime, which is not the caller's, follows it.
// Nothing is set back: what it took to be current before may be long out of date.
inline Error follow(int device) { return words(cudaSetDevice(device)); }

inline int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0 ? count : 1;
}

template <class P>
Error launch(const Place& place, void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, const P& parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(place.stream);
  return words(cudaLaunchKernelEx(&config, kernel, parameters));
}

// f(null pointer to the element type).
template <class F>
Error with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<__half*>(nullptr));
  }
}

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::f64 : std::is_same_v<T, float> ? DType::f32
         : std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
}

template <class T>
Source source(ConstArray a) {
  return {a.data, a.dtype != dtype_of<T>()};
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int bit_ceil(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}
// Blocks along the grid's x.
constexpr int64_t MOST_BLOCKS = (int64_t{1} << 31) - 1;

// Every step of a walk is a multiple of `n` elements.
inline bool multiples(const Walk& walk, int64_t n) {
  return std::all_of(walk.stride, walk.stride + walk.rank, [n](int64_t stride) { return stride % n == 0; });
}

}  // namespace fastnorm::cuda
