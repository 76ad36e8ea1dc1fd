// The backend contract on plain memory: what contract.cpp calls, what cpu/*.cpp and cuda/*.cu implement. fastnorm/reference.py
// says what each function means. Inputs have any strides; y, dx and vectors of parameters are dense. `mean` is two arrays one
// after the other, high and low; mean, rstd, deviation, sums, c1 and c2 are in the accumulate dtype: double for double inputs,
// else float. An absent array has a null pointer. Includes no framework.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"

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
  FN_HD ConstArray(const void* d, DType t) : data(d), dtype(t) {}
  FN_HD ConstArray(Array a) : data(a.data), dtype(a.dtype) {}
};

// The way of one index over several dimensions, the last one fastest, folded where the strides allow it.
struct Walk {
  static constexpr int MAX = 8;
  int rank = 0;
  int64_t size[MAX], stride[MAX];

  // One more dimension, faster than those before it; false where there is no room for it.
  bool push(int64_t n, int64_t step) {
    if (n == 1) return true;
    if (rank > 0 && stride[rank - 1] == n * step) {
      size[rank - 1] *= n;
      stride[rank - 1] = step;
      return true;
    }
    if (rank == MAX) return false;
    size[rank] = n;
    stride[rank++] = step;
    return true;
  }
  FN_HD int64_t offset(int64_t i) const {
    if (rank == 1) return i * stride[0];
    int64_t sum = 0;
    for (int d = rank - 1; d > 0; --d) {
      sum += i % size[d] * stride[d];
      i /= size[d];
    }
    return rank == 0 ? 0 : sum + i * stride[0];
  }
  bool dense() const { return rank == 0 || (rank == 1 && stride[0] == 1); }
  // Steps along the fastest dimension, and how many of them are left from index i on.
  int64_t step() const { return rank == 0 ? 1 : stride[rank - 1]; }
  int64_t left(int64_t i) const { return rank == 0 ? 1 : size[rank - 1] - i % size[rank - 1]; }
};

// Where P is not 1, which it is for functions of fused rows alone, weight and bias are P parts of N elements: the first is for
// the first M / P rows, and so on; there is a weight then.
struct Rows {
  int64_t M, N, P = 1;
};

struct RowsInput : ConstArray {
  Walk rows, columns;
};

// Which columns of rows count: R rows of P bytes, 1 or 0, each byte for the next N / P columns of the next M / R rows.
struct RowMask {
  const bool* data = nullptr;
  int64_t R = 1, P = 1;
};

// (B, C, S); outputs are dense, or dense (B, S, C) when `last`.
struct Channels {
  int64_t B, C, S;
  bool last;
  int64_t count() const { return B * S; }
};

struct ChannelsInput : ConstArray {
  int64_t sample = 0, channel = 0;  // strides of B and C
  Walk space, positions;            // over S, over B and S
};

// (B, C, S), all dense: the statistics are those of P neighbouring channels of a sample; there are M such groups.
struct Groups {
  int64_t B, C, S, P;
  int64_t M() const { return B * C / P; }
  int64_t count() const { return P * S; }
};

// (B, C, S), all dense: the statistics are those of the C channels of one position; there are M positions, numbered b * S + s.
struct Positions {
  int64_t B, C, S;
  int64_t M() const { return B * S; }
};

// What dropout needs: word i % 4 of counter i / 4 of philox.h decides over element i, which is kept from `least` on; `scale` is
// 1 / (1 - p).
struct Dropout {
  const int64_t* seed = nullptr;  // in the device's memory; null: everything is kept, and scale is 1
  uint32_t least = 0;
  double scale = 1;
};

// Where a device's kernels run, and memory that is theirs until the call ends; the CPU's ask for none of it.
struct Place {
  int device = 0;
  void* stream = nullptr;
  void* (*memory)(void* owner, size_t bytes) = nullptr;
  void* owner = nullptr;

  template <class T>
  T* take(int64_t n) const {
    return static_cast<T*>(memory(owner, static_cast<size_t>(n) * sizeof(T)));
  }
};

// The kernels of one device. Each returns null, or what went wrong in words.
struct Kernels {
  using Error = const char*;
  // On a GPU y and dy may be in the accumulate dtype where x and dx are in a narrower one.
  Error (*row_fwd)(const Place&, Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y,
                   void* mean, void* rstd);
  Error (*row_bwd)(const Place&, Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean,
                   const void* rstd, Array dx, Array dweight, Array dbias);
  Error (*channel_stats)(const Place&, Channels g, const ChannelsInput& x, void* mean, void* deviation);
  Error (*channel_apply)(const Place&, Channels g, const ChannelsInput& x, const void* mean, const void* rstd,
                         ConstArray weight, ConstArray bias, Array y);
  Error (*channel_sums)(const Place&, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean,
                        const void* rstd, void* sum_dz, void* sum_dz_x_hat);
  Error (*channel_grad)(const Place&, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean,
                        const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx);
  // `tracked`: one more after training, or null.
  Error (*channel_fwd)(const Place&, Channels g, const ChannelsInput& x, ConstArray weight, ConstArray bias, Array running_mean,
                       Array running_var, int64_t* tracked, bool training, double momentum, double eps, Array y, void* mean,
                       void* rstd);
  Error (*channel_bwd)(const Place&, Channels g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight,
                       const void* mean, const void* rstd, bool training, Array dx, Array dweight, Array dbias);
  // A norm with what surrounds it, see fastnorm/reference.py: absent tensors have a null pointer; all that have x's shape have
  // its dtype, on a GPU as well. `h`: given with `addend`. dx has `dh` in it, and x is h then.
  Error (*row_fused_fwd)(const Place&, Rows g, const RowsInput& x, const RowsInput& addend, const RowsInput& residual,
                         ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre, double eps, Array h, Array y,
                         void* mean, void* rstd);
  Error (*row_fused_bwd)(const Place&, Rows g, const RowsInput& dy, const RowsInput& dh, const RowsInput& x,
                         const RowsInput& residual, ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre,
                         const void* mean, const void* rstd, Array dx, Array dweight, Array dbias, Array dresidual);
  // `kept`: of a CPU's relu(z + residual), what backward takes in the place of the residual, see cpu/kept.h; dy is then as
  // dense as y. Null for a GPU's.
  Error (*channel_fused_fwd)(const Place&, Channels g, const ChannelsInput& x, const ChannelsInput& residual, ConstArray weight,
                             ConstArray bias, Epilogue epilogue, Array running_mean, Array running_var, int64_t* tracked,
                             bool training, double momentum, double eps, Array y, uint8_t* kept, void* mean, void* rstd);
  Error (*channel_fused_bwd)(const Place&, Channels g, const ChannelsInput& dy, const ChannelsInput& x,
                             const ChannelsInput& residual, const uint8_t* kept, ConstArray weight, ConstArray bias,
                             Epilogue epilogue, const void* mean, const void* rstd, bool training, Array dx, Array dweight,
                             Array dbias, Array dresidual);
  // Group norm; mean and rstd of M groups, weight and bias of C channels.
  Error (*group_fwd)(const Place&, Groups g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps,
                     Array y, void* mean, void* rstd);
  Error (*group_bwd)(const Place&, Groups g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                     const void* mean, const void* rstd, Array dx, Array dweight, Array dbias);
  // Layer norm over channels; mean and rstd of M positions, weight and bias of C channels.
  Error (*position_fwd)(const Place&, Positions g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                        double eps, Array y, void* mean, void* rstd);
  Error (*position_bwd)(const Place&, Positions g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias,
                        Epilogue epilogue, const void* mean, const void* rstd, Array dx, Array dweight, Array dbias);
  // With `mask`, B * S bytes: 1 where a position of a sample counts, else 0. `count`, one number, is how many do; where none
  // does, it, mean and deviation are 0. What does not count has no part in c1 and c2, its dx is g * rstd.
  Error (*channel_masked_stats)(const Place&, Channels g, const ChannelsInput& x, const bool* mask, void* count, void* mean,
                                void* deviation);
  Error (*channel_masked_grad)(const Place&, Channels g, const ChannelsInput& dy, const ChannelsInput& x, const bool* mask,
                               const void* mean, const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx);
  // Layer norm of what counts; a row of which nothing does has mean 0 and variance 1. All of a row is normalised, and is in c1
  // and c2, which are divided by the count; of what does not count dx is g * rstd.
  Error (*row_masked_fwd)(const Place&, Rows g, RowMask mask, const RowsInput& x, ConstArray weight, ConstArray bias,
                          double eps, Array y, void* mean, void* rstd);
  Error (*row_masked_bwd)(const Place&, Rows g, RowMask mask, const RowsInput& dy, const RowsInput& x, ConstArray weight,
                          const void* mean, const void* rstd, Array dx, Array dweight, Array dbias);
  // A branch onto a stream, all dense: h = addend + x * factor, where the factor of an element is row_scale (P numbers, each
  // for the next M / P rows) times column_scale (N) times dropout's; what is absent is 1. Scales are in x's accumulate dtype;
  // addend and h (and dh, the gradient of h) in that or in x's dtype, dx in x's. dcolumn_scale is the sum over rows of dh * x
  // times the other factors, and needs x, which is absent without it.
  Error (*branch_fwd)(const Place&, Rows g, ConstArray x, ConstArray addend, const void* row_scale, const void* column_scale,
                      Dropout dropout, Array h);
  Error (*branch_bwd)(const Place&, Rows g, ConstArray dh, ConstArray x, const void* row_scale, const void* column_scale,
                      Dropout dropout, Array dx, Array dcolumn_scale);
  // Whether these are a GPU's: rows in two dtypes at once, as above; and every parameter is in x's dtype or in the accumulate
  // dtype, and no result but these is wider. Else y and dy have x's dtype, and parameters any.
  bool gpu;
};

namespace cpu {
extern const Kernels KERNELS;
}  // namespace cpu

}  // namespace fastnorm
