// The backend contract (fastnorm/reference.py says what each function is) over CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastnorm {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Grads = std::tuple<Maybe, Maybe, Maybe>;
// dx wanted or not; the dtypes of dweight and dbias, or none where they are not wanted.
using Need = std::tuple<bool, std::optional<at::ScalarType>, std::optional<at::ScalarType>>;

// New memory, past the dispatcher: half a microsecond less.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format = at::MemoryFormat::Contiguous);

std::tuple<Tensor, Tensor, Tensor> row_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                                           std::optional<at::ScalarType> dtype);
Grads row_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, const Need& need);

std::tuple<int64_t, Tensor, Tensor> channel_stats(const Tensor& x);
Tensor channel_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight, const Maybe& bias);
std::tuple<Tensor, Tensor> channel_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd);
Tensor channel_grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight,
                    const Maybe& c1, const Maybe& c2);
std::tuple<Tensor, Tensor, Tensor> channel_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                               const Maybe& running_mean, const Maybe& running_var, bool training,
                                               double momentum, double eps);
Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need);

// The forward passes with statistics in the caller's memory, for a tensor costs a quarter of a microsecond: mean, 2 n elements,
// and rstd, n, of x's accumulate dtype, where n is the number of rows or of channels.
struct Statistics {
  void *mean, *rstd;
};
struct BatchOptions {
  const Maybe &running_mean, &running_var;
  bool training;
  double momentum, eps;
};
Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, Statistics s);
Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, Statistics s);

}  // namespace fastnorm
