// The backend contract over tensors: checks, dense views, memory for the results, kernels. No math, and no Python.
#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>

namespace fastnorm {

namespace {
// A byte for each position of each sample of d, dense; `keep` owns a copy.
const bool* mask_of(const Tensor& mask, const Shaped& d, Tensor& keep) {
  check_beside(mask, "mask", d.x);
  check_numel(mask, "mask", d.g.B * d.g.S);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask should be a bool tensor, got ", mask.scalar_type());
  keep = mask.contiguous();
  return keep.const_data_ptr<bool>();
}

// THE table of kernels, a row for each type of device.
Device on_cpu{&cpu::KERNELS, nullptr}, on_cuda{nullptr, nullptr};
}  // namespace

const Device& device_of(const Tensor& x) { return x.is_cpu() ? on_cpu : on_cuda; }

void set_kernels(c10::DeviceType type, const Kernels* kernels, uintptr_t stream) {
  TORCH_CHECK(type == c10::DeviceType::CPU || type == c10::DeviceType::CUDA, "fastnorm has no kernels for ", type);
  const bool is_cpu = type == c10::DeviceType::CPU;
  (is_cpu ? on_cpu : on_cuda) = {is_cpu && !kernels ? &cpu::KERNELS : kernels, reinterpret_cast<CurrentStream>(stream)};
}

Tensor empty(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  if (like.is_cpu()) return at::cpu::empty(sizes, at::TensorOptions().dtype(dtype), format);
  return at::empty(sizes, at::TensorOptions().dtype(dtype).device(like.device()), format);
}

Statistics SavedStatistics::make(const Tensor& x, int64_t n) {
  mean = empty(x, {2, n}, accumulate_type(x));
  rstd = empty(x, {n}, accumulate_type(x));
  return {mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
}

Tensor row_forward(const Tensor& x_, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype,
                   MakeStatistics make) {
  On on(x_);
  // A GPU's kernels round once, to the dtype that its autocast wants; no CPU autocast wants one, so that a copy of x will do.
  const at::ScalarType wanted = dtype.value_or(x_.scalar_type());
  const bool as_it_is = wanted == x_.scalar_type() || (on.gpu() && wanted == accumulate_type(x_));
  const Tensor converted = as_it_is ? Tensor() : x_.to(wanted);
  const Tensor& x = as_it_is ? x_ : converted;
  Tensor keep, w, b, y = empty_result(x, wanted);
  const Statistics s = make();
  on(&Kernels::row_fwd, Rows{x.numel() / N, N}, rows_input(x, "x", N, x, keep), parameter(on, weight, "weight", N, x, w),
     parameter(on, bias, "bias", N, x, b), eps, output(y), s.mean, s.rstd);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> row_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                                           MaybeType dtype) {
  check_served(x);
  TORCH_CHECK(N > 0 && x.numel() > 0 && x.numel() % N == 0, "x with ", text(x.numel()), " elements is not rows of ", text(N));
  SavedStatistics s;
  Tensor y = row_forward(x, weight, bias, eps, N, dtype, [&] { return s.make(x, x.numel() / N); });
  return {y, s.mean, s.rstd};
}

Grads row_bwd(const Tensor& dy_, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
              const Need& need) {
  On on(x);
  check_beside(dy_, "dy", x);
  if (!on.gpu() && dy_.scalar_type() == at::kFloat && at::isReducedFloatingType(x.scalar_type())) {
    auto [dx, dweight, dbias] = row_bwd(dy_, x.to(at::kFloat), weight, mean, rstd, need);
    return {dx ? Maybe(dx->to(x.scalar_type())) : dx, dweight, dbias};
  }
  const Tensor dy = on.gpu() ? readable(dy_, x) : as(dy_, x.scalar_type());
  const int64_t M = rstd.numel();
  TORCH_CHECK(M > 0 && x.numel() > 0 && x.numel() % M == 0, "x with ", text(x.numel()), " elements is not ", text(M), " rows");
  check_numel(dy, "dy", x.numel());
  const Rows g{M, x.numel() / M};
  Tensor keep, keep_dy, w;
  const Maybe dx = std::get<0>(need) ? Maybe(empty_result(x, x.scalar_type())) : std::nullopt;
  Maybe dweight = empty_grad(on, x, std::get<1>(need), g.N), dbias = empty_grad(on, x, std::get<2>(need), g.N);
  on(&Kernels::row_bwd, g, rows_input(dy, "dy", g.N, x, keep_dy), rows_input(x, "x", g.N, x, keep),
     parameter(on, weight, "weight", g.N, x, w), statistic(mean, "mean", x, 2 * M), statistic(rstd, "rstd", x, M), maybe(dx),
     maybe(dweight), maybe(dbias));
  return {dx, wanted(std::move(dweight), std::get<1>(need)), wanted(std::move(dbias), std::get<2>(need))};
}

std::tuple<int64_t, Tensor, Tensor> channel_stats(const Tensor& x) {
  On on(x);
  const Shaped d(x);
  Tensor mean = empty(x, {2, d.g.C}, d.acc()), deviation = empty(x, {d.g.C}, d.acc());
  on(&Kernels::channel_stats, d.g, d.in, mean.mutable_data_ptr(), deviation.mutable_data_ptr());
  return {d.g.count(), mean, deviation};
}

Tensor channel_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight, const Maybe& bias) {
  On on(x);
  const Shaped d(x);
  Tensor w, b, y = d.empty_like();
  on(&Kernels::channel_apply, d.g, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
     parameter(on, weight, "weight", d.g.C, x, w), parameter(on, bias, "bias", d.g.C, x, b), output(y));
  return y;
}

std::tuple<Tensor, Tensor> channel_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  On on(x);
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  Tensor sum_dz = empty(x, {d.g.C}, d.acc()), sum_dz_x_hat = empty(x, {d.g.C}, d.acc());
  on(&Kernels::channel_sums, d.g, dz, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
     sum_dz.mutable_data_ptr(), sum_dz_x_hat.mutable_data_ptr());
  return {sum_dz, sum_dz_x_hat};
}

Tensor channel_grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight,
                    const Maybe& c1, const Maybe& c2) {
  On on(x);
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  TORCH_CHECK(c1.has_value() == c2.has_value(), "c1 and c2 are given together or not at all");
  Tensor w, dx = d.empty_like();
  on(&Kernels::channel_grad, d.g, dz, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
     parameter(on, weight, "weight", d.g.C, x, w), c1 ? statistic(*c1, "c1", x, d.g.C) : nullptr,
     c2 ? statistic(*c2, "c2", x, d.g.C) : nullptr, output(dx));
  return dx;
}

Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, MakeStatistics make) {
  On on(x);
  const Shaped d(x);
  const Running m(on, o.running_mean, "running_mean", d.g.C, x), v(on, o.running_var, "running_var", d.g.C, x);
  Tensor w, b, y = d.empty_like();
  const Statistics s = make();
  int64_t* const tracked = o.training && o.num_batches_tracked ? o.num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  on(&Kernels::channel_fwd, d.g, d.in, parameter(on, weight, "weight", d.g.C, x, w), parameter(on, bias, "bias", d.g.C, x, b),
     m.array(), v.array(), tracked, o.training, o.momentum, o.eps, output(y), s.mean, s.rstd);
  if (o.training) m.write_back(), v.write_back();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                               const Maybe& running_mean, const Maybe& running_var, bool training,
                                               double momentum, double eps, const Maybe& num_batches_tracked) {
  TORCH_CHECK(running_mean.has_value() == running_var.has_value() && (training || running_mean),
              "running_mean and running_var are given together, and always in evaluation");
  if (num_batches_tracked) {
    check_beside(*num_batches_tracked, "num_batches_tracked", x);
    check_numel(*num_batches_tracked, "num_batches_tracked", 1);
  }
  SavedStatistics s;
  Tensor y = channel_forward(x, weight, bias, {running_mean, running_var, training, momentum, eps, num_batches_tracked},
                             [&] { return s.make(x, channels_of(x)); });
  return {y, s.mean, s.rstd};
}

Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need) {
  On on(x);
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  Tensor w;
  const Maybe dx = std::get<0>(need) ? Maybe(d.empty_like()) : std::nullopt;
  Maybe dweight = empty_grad(on, x, std::get<1>(need), d.g.C), dbias = empty_grad(on, x, std::get<2>(need), d.g.C);
  on(&Kernels::channel_bwd, d.g, dz, d.in, parameter(on, weight, "weight", d.g.C, x, w),
     statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C), training, maybe(dx), maybe(dweight),
     maybe(dbias));
  return {dx, wanted(std::move(dweight), std::get<1>(need)), wanted(std::move(dbias), std::get<2>(need))};
}

std::tuple<Tensor, Tensor, Tensor> channel_masked_stats(const Tensor& x, const Tensor& mask) {
  On on(x);
  const Shaped d(x);
  Tensor keep, count = empty(x, {1}, d.acc()), mean = empty(x, {2, d.g.C}, d.acc()), deviation = empty(x, {d.g.C}, d.acc());
  on(&Kernels::channel_masked_stats, d.g, d.in, mask_of(mask, d, keep), count.mutable_data_ptr(), mean.mutable_data_ptr(),
     deviation.mutable_data_ptr());
  return {count, mean, deviation};
}

Tensor channel_masked_grad(const Tensor& dy, const Tensor& x, const Tensor& mask, const Tensor& mean, const Tensor& rstd,
                           const Maybe& weight, const Tensor& c1, const Tensor& c2) {
  On on(x);
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  Tensor keep, w, dx = d.empty_like();
  on(&Kernels::channel_masked_grad, d.g, dz, d.in, mask_of(mask, d, keep), statistic(mean, "mean", x, 2 * d.g.C),
     statistic(rstd, "rstd", x, d.g.C), parameter(on, weight, "weight", d.g.C, x, w), statistic(c1, "c1", x, d.g.C),
     statistic(c2, "c2", x, d.g.C), output(dx));
  return dx;
}

}  // namespace fastnorm
