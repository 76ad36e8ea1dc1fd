// The backend contract (fastnorm/reference.py says what each function is) over tensors of every device that has kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace fastnorm {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using MaybeType = std::optional<at::ScalarType>;
using Grads = std::tuple<Maybe, Maybe, Maybe>;
// dx wanted or not; the dtypes of dweight and dbias, or none where they are not wanted.
using Need = std::tuple<bool, MaybeType, MaybeType>;

// Puts a library's row into the table, or another one in its place; null: the row goes, the CPU's own comes back. `stream` is
// the address of aoti_torch_get_current_cuda_stream, or 0 where there are no streams.
void set_kernels(c10::DeviceType device, const Kernels* kernels, uintptr_t stream);

// New memory beside `like`, on the CPU past the dispatcher: half a microsecond less.
Tensor empty(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype,
             at::MemoryFormat format = at::MemoryFormat::Contiguous);

std::tuple<Tensor, Tensor, Tensor> row_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                                           MaybeType dtype);
Grads row_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, const Need& need);

std::tuple<int64_t, Tensor, Tensor> channel_stats(const Tensor& x);
Tensor channel_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight, const Maybe& bias);
std::tuple<Tensor, Tensor> channel_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd);
Tensor channel_grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight,
                    const Maybe& c1, const Maybe& c2);
std::tuple<Tensor, Tensor, Tensor> channel_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                               const Maybe& running_mean, const Maybe& running_var, bool training,
                                               double momentum, double eps, const Maybe& num_batches_tracked);
Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need);

// A norm with what surrounds it; `activation` is a name of activations.py. The fourth of FusedNeed: dresidual wanted or not.
using FusedNeed = std::tuple<bool, MaybeType, MaybeType, bool>;
using FusedGrads = std::tuple<Maybe, Maybe, Maybe, Maybe>;
std::tuple<Tensor, Maybe, Tensor, Tensor> row_fused_fwd(const Tensor& x, const Maybe& addend, const Maybe& weight,
                                                        const Maybe& bias, const Maybe& residual,
                                                        const std::string& activation, double alpha, double eps, int64_t N,
                                                        bool centre);
FusedGrads row_fused_bwd(const Tensor& dy, const Maybe& dh, const Tensor& x, const Maybe& residual, const Maybe& weight,
                         const Maybe& bias, const std::string& activation, double alpha, const Tensor& mean,
                         const Tensor& rstd, const FusedNeed& need, bool centre);
std::tuple<Tensor, Tensor, Tensor, Maybe> channel_fused_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                                            const Maybe& residual, const std::string& activation,
                                                            double alpha, const Maybe& running_mean, const Maybe& running_var,
                                                            bool training, double momentum, double eps,
                                                            const Maybe& num_batches_tracked, bool keep);
FusedGrads channel_fused_bwd(const Tensor& dy, const Tensor& x, const Maybe& kept, const Maybe& weight, const Maybe& bias,
                             const std::string& activation, double alpha, const Tensor& mean, const Tensor& rstd,
                             bool training, const FusedNeed& need);

// Group norm of a dense (B, C, *), or of a copy that is dense.
std::tuple<Tensor, Tensor, Tensor> group_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                             const std::string& activation, double alpha, double eps, int64_t groups);
Grads group_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias, const std::string& activation,
                double alpha, const Tensor& mean, const Tensor& rstd, const Need& need);

// Layer norm over the channels of a dense (B, C, *), or of a copy that is dense.
std::tuple<Tensor, Tensor, Tensor> position_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                                const std::string& activation, double alpha, double eps);
Grads position_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias, const std::string& activation,
                   double alpha, const Tensor& mean, const Tensor& rstd, const Need& need);

// Pieces of a batch norm of which some positions do not count; `mask` is bool, (B, *) beside x (B, C, *).
std::tuple<Tensor, Tensor, Tensor> channel_masked_stats(const Tensor& x, const Tensor& mask);
Tensor channel_masked_grad(const Tensor& dy, const Tensor& x, const Tensor& mask, const Tensor& mean, const Tensor& rstd,
                           const Maybe& weight, const Tensor& c1, const Tensor& c2);

// Layer norm of which some columns do not count; `mask` is bool, (R, P), see RowMask.
std::tuple<Tensor, Tensor, Tensor> row_masked_fwd(const Tensor& x, const Tensor& mask, const Maybe& weight, const Maybe& bias,
                                                  double eps, int64_t N);
Grads row_masked_bwd(const Tensor& dy, const Tensor& x, const Tensor& mask, const Maybe& weight, const Tensor& mean,
                     const Tensor& rstd, const Need& need);

// h = addend + x * row_scale * column_scale * kept / (1 - p). `seed` is one int64, of no use where p is 0.
Tensor branch_fwd(const Tensor& x, const Tensor& addend, const Maybe& row_scale, const Maybe& column_scale, double p,
                  const Maybe& seed, at::ScalarType dtype);
std::tuple<Maybe, Maybe> branch_bwd(const Tensor& dh, const Maybe& x, const Maybe& row_scale, const Maybe& column_scale,
                                    double p, const Maybe& seed, MaybeType dx_dtype, MaybeType dcolumn_dtype);

// The forward passes with statistics in the caller's memory, for a tensor costs a quarter of a microsecond: mean, 2 n elements,
// and rstd, n, of x's accumulate dtype, where n is the number of rows or of channels. They are asked for once y is there: small
// memory taken first may be cut from what an earlier y has left, and this one would go to new pages.
struct Statistics {
  void *mean, *rstd;
};
using MakeStatistics = c10::function_ref<Statistics()>;
// Two tensors, as in autograd.py, for a checkpoint may run the one path and then the other and counts what they save.
struct SavedStatistics {
  Tensor mean, rstd;
  Statistics make(const Tensor& x, int64_t n);
};
struct BatchOptions {
  const Maybe &running_mean, &running_var;
  bool training;
  double momentum, eps;
  const Maybe& num_batches_tracked;
};
// `dtype`: y's, where it is not x's.
Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype,
                   MakeStatistics make);
Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, MakeStatistics make);

}  // namespace fastnorm
