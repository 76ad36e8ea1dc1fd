// The backend contract on plain memory: what bindings.cpp calls, what cpu/*.cpp implement. fastnorm/reference.py says what each
// function means. `mean` is two arrays one after the other, high and low; mean, rstd, deviation, sums, c1 and c2 are in the
// accumulate dtype: double for double inputs, else float. An absent array has a null pointer.
#pragma once

#include <cstdint>

namespace fastnorm {

enum class DType : int8_t { f64, f32, bf16, f16 };

struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
};

struct ConstArray {
  const void* data = nullptr;
  DType dtype = DType::f32;
  ConstArray() = default;
  ConstArray(const void* d, DType t) : data(d), dtype(t) {}
  ConstArray(Array a) : data(a.data), dtype(a.dtype) {}
};

struct Rows {
  int64_t M, N;
};

// Dense (B, C, S), or dense (B, S, C) when `last`.
struct Channels {
  int64_t B, C, S;
  bool last;
  int64_t count() const { return B * S; }
};

namespace cpu {

void row_fwd(Rows g, ConstArray x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd);
void row_bwd(Rows g, ConstArray dy, ConstArray x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias);

void channel_stats(Channels g, ConstArray x, void* mean, void* deviation);
void channel_apply(Channels g, ConstArray x, const void* mean, const void* rstd, ConstArray weight, ConstArray bias, Array y);
void channel_sums(Channels g, ConstArray dy, ConstArray x, const void* mean, const void* rstd, void* sum_dz,
                  void* sum_dz_x_hat);
void channel_grad(Channels g, ConstArray dy, ConstArray x, const void* mean, const void* rstd, ConstArray weight,
                  const void* c1, const void* c2, Array dx);
void channel_fwd(Channels g, ConstArray x, ConstArray weight, ConstArray bias, Array running_mean, Array running_var,
                 bool training, double momentum, double eps, Array y, void* mean, void* rstd);
void channel_bwd(Channels g, ConstArray dy, ConstArray x, ConstArray weight, const void* mean, const void* rstd, bool training,
                 Array dx, Array dweight, Array dbias);

}  // namespace cpu
}  // namespace fastnorm
