// The checks behind every entry: a pointer is taken only from a tensor beside x, of a dtype and size that the kernels expect.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "kernels.h"

namespace fastnorm {

inline DType dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "fastnorm's native kernels read float64, float32, bfloat16 and float16, not ", t);
  }
}

// Numbers in messages, without a stream: where the compiler links its own libstdc++ into the library, as some images' does, a
// stream mixes it with the one that torch uses, and the first number that is written ends the process.
inline std::string text(int64_t n) { return std::to_string(n); }
inline std::string text(at::IntArrayRef sizes) {
  std::string all = "[";
  for (const int64_t n : sizes) all += (all.size() > 1 ? ", " : "") + text(n);
  return all + "]";
}

inline at::ScalarType accumulate_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_served(const at::Tensor& x) {
  TORCH_CHECK((x.is_cpu() || x.is_cuda()) && x.layout() == at::kStrided,
              "fastnorm's native kernels expect x as a strided CPU or CUDA tensor, got one on ", x.device());
}

inline void check_beside(const at::Tensor& t, const char* name, const at::Tensor& x) {
  const bool beside = x.is_cpu() ? t.is_cpu() : t.device() == x.device();  // the first is asked faster
  TORCH_CHECK(beside && t.layout() == at::kStrided, "fastnorm's native kernels expect ", name,
              " as a strided tensor on ", x.device(), " beside x, got one on ", t.device());
}

inline void check_numel(const at::Tensor& t, const char* name, int64_t numel) {
  TORCH_CHECK(t.numel() == numel, name, " should have ", text(numel), " elements, got ", text(t.numel()));
}

// A tensor of x's accumulate dtype and of n elements, dense; its pointer.
inline const void* statistic(const at::Tensor& t, const char* name, const at::Tensor& x, int64_t n) {
  check_beside(t, name, x);
  check_numel(t, name, n);
  TORCH_CHECK(t.scalar_type() == accumulate_type(x) && t.is_contiguous(), name, " should be contiguous and ",
              accumulate_type(x));
  return t.const_data_ptr();
}

inline ConstArray input(const at::Tensor& t, const char* name, const at::Tensor& x) {
  check_beside(t, name, x);
  return {t.const_data_ptr(), dtype_of(t.scalar_type())};
}

inline Array output(const at::Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t.scalar_type())}; }

// A running statistic: written in place, so its strides are kept; the caller copies where it is not dense.
inline bool is_dense_vector(const at::Tensor& t) { return t.dim() == 1 && (t.numel() < 2 || t.stride(0) == 1); }

}  // namespace fastnorm
