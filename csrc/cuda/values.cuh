// Values between memory and registers: they are computed in the accumulate dtype and move 16 bytes at a time.
//
// These files keep to what tests/emulator runs on a CPU: no inline assembly, no asynchronous copies, shared memory asked for by
// the launch, and no read or write that two threads of a launch share without a barrier.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../kernels.h"

namespace fastnorm::cuda {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulate<T>::type;

// Elements of one access where sizes and addresses allow it.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ double widened(double v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T rounded(Acc<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half rounded<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// V elements from an address that is a multiple of 16 bytes, or one.
template <class T, int V>
__device__ __forceinline__ void load(Acc<T> (&out)[V], const T* from) {
  if constexpr (V == 1) {
    out[0] = widened(*from);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += WIDE<T>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      T piece[WIDE<T>];
      memcpy(piece, &bits, sizeof bits);
#pragma unroll
      for (int j = 0; j < WIDE<T>; ++j) out[i + j] = widened(piece[j]);
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const Acc<T> (&values)[V]) {
  if constexpr (V == 1) {
    *to = rounded<T>(values[0]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += WIDE<T>) {
      T piece[WIDE<T>];
#pragma unroll
      for (int j = 0; j < WIDE<T>; ++j) piece[j] = rounded<T>(values[i + j]);
      uint4 bits;
      memcpy(&bits, piece, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(to + i), bits);  // a plain store is taken apart by some versions of nvcc
    }
  }
}

// One or V elements, 16 bytes, as they lie in memory. Only `widen` waits for them, so that several are on their way at once:
// a load that is followed by a conversion holds up the next one where a branch is between.
template <class T, int V>
using Bits = std::conditional_t<V == 1, T, uint4>;

template <class T, int V>
__device__ __forceinline__ void widen(Acc<T> (&out)[V], const Bits<T, V>& bits) {
  static_assert(sizeof bits == sizeof(T[V]));
  T piece[V];
  memcpy(piece, &bits, sizeof bits);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = widened(piece[j]);
}

template <class T, int V>
__device__ __forceinline__ void add_widened(Acc<T> (&to)[V], const Bits<T, V>& bits) {
  Acc<T> more[V];
  widen<T, V>(more, bits);
#pragma unroll
  for (int j = 0; j < V; ++j) to[j] += more[j];
}

// Of elements side by side at a multiple of 16 bytes, or every `stride`.
template <class T, int V>
__device__ __forceinline__ Bits<T, V> fetch(const T* from, bool whole, int64_t stride) {
  if constexpr (V == 1) {
    return *from;
  } else {
    if (whole) return *reinterpret_cast<const uint4*>(from);
    T piece[V];
#pragma unroll
    for (int j = 0; j < V; ++j, from += stride) piece[j] = *from;
    uint4 bits;
    memcpy(&bits, piece, sizeof bits);
    return bits;
  }
}

// A tensor of one of two dtypes: T, or Acc<T> where it is `wide`.
struct Source {
  const void* data;
  bool wide;
};
struct Target {
  void* data;
  bool wide;
};

template <class T, int V>
__device__ __forceinline__ void load(Acc<T> (&out)[V], Source from, int64_t i) {
  if (sizeof(T) < sizeof(Acc<T>) && from.wide)
    load<Acc<T>, V>(out, static_cast<const Acc<T>*>(from.data) + i);
  else
    load<T, V>(out, static_cast<const T*>(from.data) + i);
}

template <class T>
__device__ __forceinline__ Acc<T> load_one(Source from, int64_t i) {
  if (sizeof(T) < sizeof(Acc<T>) && from.wide) return static_cast<const Acc<T>*>(from.data)[i];
  return widened(static_cast<const T*>(from.data)[i]);
}

template <class T, int V>
__device__ __forceinline__ void load_or(Acc<T> (&out)[V], Source from, int64_t i, Acc<T> absent) {
  if (from.data) return load<T, V>(out, from, i);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = absent;
}

template <class T, int V>
__device__ __forceinline__ void store(Target to, int64_t i, const Acc<T> (&values)[V]) {
  if (sizeof(T) < sizeof(Acc<T>) && to.wide)
    store<Acc<T>, V>(static_cast<Acc<T>*>(to.data) + i, values);
  else
    store<T, V>(static_cast<T*>(to.data) + i, values);
}

// One element of any dtype that is no wider than the accumulate dtype A.
template <class A>
__device__ __forceinline__ A element(ConstArray from, int64_t i) {
  if constexpr (sizeof(A) == 8)
    if (from.dtype == DType::f64) return static_cast<const double*>(from.data)[i];
  if (from.dtype == DType::f32) return static_cast<const float*>(from.data)[i];
  if (from.dtype == DType::f16) return widened(static_cast<const __half*>(from.data)[i]);
  return widened(static_cast<const __nv_bfloat16*>(from.data)[i]);
}

template <class A>
__device__ __forceinline__ void set_element(Array to, int64_t i, A v) {
  if constexpr (sizeof(A) == 8)
    if (to.dtype == DType::f64) return void(static_cast<double*>(to.data)[i] = v);
  const float narrow = static_cast<float>(v);
  if (to.dtype == DType::f32)
    static_cast<float*>(to.data)[i] = narrow;
  else if (to.dtype == DType::f16)
    static_cast<__half*>(to.data)[i] = __float2half_rn(narrow);
  else
    static_cast<__nv_bfloat16*>(to.data)[i] = __float2bfloat16_rn(narrow);
}

// walk.offset(i), with the code for several dimensions once in a kernel: it is longer than what a fused norm does to an element.
inline __device__ __attribute__((noinline)) int64_t offset_of_several(const Walk& walk, int64_t i) { return walk.offset(i); }
__device__ __forceinline__ int64_t called_offset(const Walk& walk, int64_t i) {
  return walk.rank == 1 ? i * walk.stride[0] : offset_of_several(walk, i);
}

// The shared memory of a block; its size is asked for by the launch.
extern __shared__ __align__(16) unsigned char shared_memory[];
template <class A>
__device__ __forceinline__ A* shared() {
  return reinterpret_cast<A*>(shared_memory);
}

}  // namespace fastnorm::cuda
