// The backend contract over tensors: checks, dense views, memory for the results, kernels. No math, and no Python.
#include "contract.h"

#include <ATen/ops/empty_cpu_dispatch.h>

#include "checks.h"

namespace fastnorm {
namespace {

// Past the dispatcher, half a microsecond each.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::cpu::empty(sizes, at::TensorOptions().dtype(dtype), format);
}

Tensor like_rows(const Tensor& x) { return empty(x.sizes(), x.scalar_type()); }

// dy may come in another dtype, for example from a wider sum.
Tensor as(const Tensor& dy, at::ScalarType dtype) { return dy.scalar_type() == dtype ? dy : dy.to(dtype); }

Maybe empty_grad(std::optional<at::ScalarType> dtype, int64_t n) { return dtype ? Maybe(empty({n}, *dtype)) : std::nullopt; }

Array maybe(const Maybe& t) { return t ? output(*t) : Array{}; }

// A parameter of n elements, made dense; `keep` owns the dense copy while the kernel runs.
ConstArray parameter(const Maybe& t, const char* name, int64_t n, Tensor& keep) {
  if (!t) return {};
  check_numel(*t, name, n);
  keep = t->contiguous();
  return input(keep, name);
}

// x as the kernels read it, dense in its own memory format (a copy where it is not), and its geometry.
struct Dense {
  Tensor x;
  Channels g;
  at::MemoryFormat format;
  explicit Dense(const Tensor& t) {
    check_cpu(t, "x");
    TORCH_CHECK(t.dim() >= 2 && t.numel() > 0, "x should have two or more dimensions and an element, got ", t.sizes());
    format = t.suggest_memory_format();
    x = t.contiguous(format);
    g = {x.size(0), x.size(1), x.numel() / (x.size(0) * x.size(1)), false};
    g.last = format != at::MemoryFormat::Contiguous || g.S == 1;
  }
  Tensor like(const Tensor& dy) const {
    check_cpu(dy, "dy");
    TORCH_CHECK(dy.sizes() == x.sizes(), "dy should have x's shape ", x.sizes(), ", got ", dy.sizes());
    return as(dy, x.scalar_type()).contiguous(format);
  }
  Tensor empty_like() const { return empty(x.sizes(), x.scalar_type(), format); }
  ConstArray array() const { return input(x, "x"); }
  at::ScalarType acc() const { return accumulate_type(x); }
};

// A running statistic as one dense vector; where it is a strided view, a copy that goes back into it with write_back().
struct Running {
  Tensor home, dense;
  Running(const Maybe& t, const char* name, int64_t C) {
    if (!t) return;
    check_cpu(*t, name);
    check_numel(*t, name, C);
    home = *t;
    dense = is_dense_vector(home) ? home : home.contiguous();
  }
  Array array() const { return dense.defined() ? output(dense) : Array{}; }
  void write_back() const {
    if (dense.defined() && !dense.is_same(home)) home.detach().copy_(dense);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> row_fwd(const Tensor& x_, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                                           std::optional<at::ScalarType> dtype) {
  check_cpu(x_, "x");
  TORCH_CHECK(N > 0 && x_.numel() > 0 && x_.numel() % N == 0, "x with ", x_.numel(), " elements is not rows of ", N);
  // No CPU autocast wants a dtype, so the kernels have none: a copy of x will do.
  const Tensor x = as(x_, dtype.value_or(x_.scalar_type())).contiguous();
  Tensor w, b, y = like_rows(x);
  const Rows g{x.numel() / N, N};
  Tensor mean = empty({2, g.M}, accumulate_type(x)), rstd = empty({g.M}, accumulate_type(x));
  cpu::row_fwd(g, input(x, "x"), parameter(weight, "weight", N, w), parameter(bias, "bias", N, b), eps, output(y),
               mean.mutable_data_ptr(), rstd.mutable_data_ptr());
  return {y, mean, rstd};
}

Grads row_bwd(const Tensor& dy_, const Tensor& x_, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
              const Need& need) {
  check_cpu(x_, "x");
  if (dy_.scalar_type() == at::kFloat && at::isReducedFloatingType(x_.scalar_type())) {
    auto [dx, dweight, dbias] = row_bwd(dy_, x_.to(at::kFloat), weight, mean, rstd, need);
    return {dx ? Maybe(dx->to(x_.scalar_type())) : dx, dweight, dbias};
  }
  const Tensor x = x_.contiguous(), dy = as(dy_, x.scalar_type()).contiguous();
  const int64_t M = rstd.numel();
  TORCH_CHECK(M > 0 && x.numel() > 0 && x.numel() % M == 0, "x with ", x.numel(), " elements is not ", M, " rows");
  check_numel(dy, "dy", x.numel());
  const Rows g{M, x.numel() / M};
  Tensor w;
  const Maybe dx = std::get<0>(need) ? Maybe(like_rows(x)) : std::nullopt;
  const Maybe dweight = empty_grad(std::get<1>(need), g.N), dbias = empty_grad(std::get<2>(need), g.N);
  cpu::row_bwd(g, input(dy, "dy"), input(x, "x"), parameter(weight, "weight", g.N, w), statistic(mean, "mean", x, 2 * M),
               statistic(rstd, "rstd", x, M), maybe(dx), maybe(dweight), maybe(dbias));
  return {dx, dweight, dbias};
}

std::tuple<int64_t, Tensor, Tensor> channel_stats(const Tensor& x) {
  const Dense d(x);
  Tensor mean = empty({2, d.g.C}, d.acc()), m2 = empty({d.g.C}, d.acc());
  cpu::channel_stats(d.g, d.array(), mean.mutable_data_ptr(), m2.mutable_data_ptr());
  return {d.g.count(), mean, m2};
}

Tensor channel_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight, const Maybe& bias) {
  const Dense d(x);
  Tensor w, b, y = d.empty_like();
  cpu::channel_apply(d.g, d.array(), statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                     parameter(weight, "weight", d.g.C, w), parameter(bias, "bias", d.g.C, b), output(y));
  return y;
}

std::tuple<Tensor, Tensor> channel_sums(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  const Dense d(x);
  const Tensor dy = d.like(dy_);
  Tensor sum_dz = empty({d.g.C}, d.acc()), sum_dz_x_hat = empty({d.g.C}, d.acc());
  cpu::channel_sums(d.g, input(dy, "dy"), d.array(), statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                    sum_dz.mutable_data_ptr(), sum_dz_x_hat.mutable_data_ptr());
  return {sum_dz, sum_dz_x_hat};
}

Tensor channel_grad(const Tensor& dy_, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight,
                    const Maybe& c1, const Maybe& c2) {
  const Dense d(x);
  const Tensor dy = d.like(dy_);
  TORCH_CHECK(c1.has_value() == c2.has_value(), "c1 and c2 are given together or not at all");
  Tensor w, dx = d.empty_like();
  cpu::channel_grad(d.g, input(dy, "dy"), d.array(), statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                    parameter(weight, "weight", d.g.C, w), c1 ? statistic(*c1, "c1", x, d.g.C) : nullptr,
                    c2 ? statistic(*c2, "c2", x, d.g.C) : nullptr, output(dx));
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> channel_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                               const Maybe& running_mean, const Maybe& running_var, bool training,
                                               double momentum, double eps) {
  const Dense d(x);
  TORCH_CHECK(running_mean.has_value() == running_var.has_value() && (training || running_mean),
              "running_mean and running_var are given together, and always in evaluation");
  const Running m(running_mean, "running_mean", d.g.C), v(running_var, "running_var", d.g.C);
  Tensor w, b, y = d.empty_like(), mean = empty({2, d.g.C}, d.acc()), rstd = empty({d.g.C}, d.acc());
  const ConstArray weights = parameter(weight, "weight", d.g.C, w), biases = parameter(bias, "bias", d.g.C, b);
  cpu::channel_fwd(d.g, d.array(), weights, biases, m.array(), v.array(), training, momentum, eps, output(y),
                   mean.mutable_data_ptr(), rstd.mutable_data_ptr());
  if (training) m.write_back(), v.write_back();
  return {y, mean, rstd};
}

Grads channel_bwd(const Tensor& dy_, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                  bool training, const Need& need) {
  const Dense d(x);
  const Tensor dy = d.like(dy_);
  Tensor w;
  const Maybe dx = std::get<0>(need) ? Maybe(d.empty_like()) : std::nullopt;
  const Maybe dweight = empty_grad(std::get<1>(need), d.g.C), dbias = empty_grad(std::get<2>(need), d.g.C);
  cpu::channel_bwd(d.g, input(dy, "dy"), d.array(), parameter(weight, "weight", d.g.C, w),
                   statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C), training, maybe(dx),
                   maybe(dweight), maybe(dbias));
  return {dx, dweight, dbias};
}

}  // namespace fastnorm
