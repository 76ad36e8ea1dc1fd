// The backend contract over tensors: checks, dense views, memory for the results, kernels. No math, and no Python.
#include "contract.h"

#include <ATen/ops/empty_cpu_dispatch.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "checks.h"

namespace fastnorm {

Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  return at::cpu::empty(sizes, at::TensorOptions().dtype(dtype), format);
}

namespace {

// y or dx. The first write to a fresh mapping costs more than the norm itself, page by page: ask for huge pages. From 32 MB on
// the C library maps every tensor anew; smaller ones come from memory that is used again.
Tensor empty_result(const Tensor& x, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  Tensor t = empty(x.sizes(), x.scalar_type(), format);
#if defined(MADV_HUGEPAGE)
  constexpr size_t LARGE = size_t{32} << 20;
  if (t.nbytes() >= LARGE) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<uintptr_t>(t.data_ptr()), first = (start + page - 1) / page * page;
    const uintptr_t bytes = (start + t.nbytes() - first) / page * page;
    madvise(reinterpret_cast<void*>(first), bytes, MADV_HUGEPAGE);  // where it is refused, pages stay small
  }
#endif
  return t;
}

// dy may come in another dtype, for example from a wider sum.
Tensor as(const Tensor& dy, at::ScalarType dtype) { return dy.scalar_type() == dtype ? dy : dy.to(dtype); }

Maybe empty_grad(MaybeType dtype, int64_t n) { return dtype ? Maybe(empty({n}, *dtype)) : std::nullopt; }

Array maybe(const Maybe& t) { return t ? output(*t) : Array{}; }

// A parameter of n elements, made dense; `keep` owns the dense copy while the kernel runs.
ConstArray parameter(const Maybe& t, const char* name, int64_t n, Tensor& keep) {
  if (!t) return {};
  check_numel(*t, name, n);
  keep = t->contiguous();
  return input(keep, name);
}

// The dimensions of t from `begin` on to `end` as one walk.
bool push(Walk& walk, const Tensor& t, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; ++d)
    if (!walk.push(t.size(d), t.stride(d))) return false;
  return true;
}

// t as rows of N elements, read in place; `keep` owns a dense copy where it has too many dimensions for that, or no
// dimension where the rows begin.
RowsInput rows_input(const Tensor& t, const char* name, int64_t N, Tensor& keep) {
  const auto place = [&](const Tensor& from, RowsInput& in) {
    int64_t d = from.dim(), n = 1;
    while (d > 0 && n < N) n *= from.size(--d);
    static_cast<ConstArray&>(in) = input(from, name);
    return n == N && push(in.rows, from, 0, d) && push(in.columns, from, d, from.dim());
  };
  RowsInput in;
  if (place(t, in)) return in;
  keep = t.contiguous().view({-1, N});
  in = {};
  place(keep, in);
  return in;
}

ChannelsInput channels_input(const Tensor& t, const char* name, Tensor& keep) {
  const auto place = [&](const Tensor& from, ChannelsInput& in) {
    static_cast<ConstArray&>(in) = input(from, name);
    in.sample = from.stride(0);
    in.channel = from.stride(1);
    return push(in.space, from, 2, from.dim()) && push(in.positions, from, 0, 1) && push(in.positions, from, 2, from.dim());
  };
  ChannelsInput in;
  if (place(t, in)) return in;
  keep = t.contiguous();
  in = {};
  place(keep, in);
  return in;
}

int64_t channels_of(const Tensor& x) {
  check_cpu(x, "x");
  TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x should have two or more dimensions and an element, got ", text(x.sizes()));
  return x.size(1);
}

// x, its geometry, and the memory format of what is made of it.
struct Shaped {
  Tensor x, keep, keep_dy;
  Channels g;
  at::MemoryFormat format;
  ChannelsInput in;
  explicit Shaped(const Tensor& t) : x(t) {
    const int64_t C = channels_of(t);
    format = t.suggest_memory_format();
    g = {x.size(0), C, x.numel() / (x.size(0) * C), false};
    g.last = format != at::MemoryFormat::Contiguous || g.S == 1;
    in = channels_input(x, "x", keep);
  }
  ChannelsInput gradient(const Tensor& dy) {
    check_cpu(dy, "dy");
    TORCH_CHECK(dy.sizes() == x.sizes(), "dy should have x's shape ", text(x.sizes()), ", got ", text(dy.sizes()));
    const Tensor same = as(dy, x.scalar_type());
    auto out = channels_input(same, "dy", keep_dy);
    if (!keep_dy.defined()) keep_dy = same;
    return out;
  }
  Tensor empty_like() const { return empty_result(x, format); }
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

Statistics SavedStatistics::make(const Tensor& x, int64_t n) {
  mean = empty({2, n}, accumulate_type(x));
  rstd = empty({n}, accumulate_type(x));
  return {mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
}

Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MakeStatistics make) {
  Tensor keep, w, b, y = empty_result(x);
  const Statistics s = make();
  cpu::row_fwd({x.numel() / N, N}, rows_input(x, "x", N, keep), parameter(weight, "weight", N, w),
               parameter(bias, "bias", N, b), eps, output(y), s.mean, s.rstd);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> row_fwd(const Tensor& x_, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                                           MaybeType dtype) {
  check_cpu(x_, "x");
  TORCH_CHECK(N > 0 && x_.numel() > 0 && x_.numel() % N == 0, "x with ", text(x_.numel()), " elements is not rows of ",
              text(N));
  // No CPU autocast wants a dtype, so the kernels have none: a copy of x will do.
  const Tensor x = as(x_, dtype.value_or(x_.scalar_type()));
  SavedStatistics s;
  Tensor y = row_forward(x, weight, bias, eps, N, [&] { return s.make(x, x.numel() / N); });
  return {y, s.mean, s.rstd};
}

Grads row_bwd(const Tensor& dy_, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
              const Need& need) {
  check_cpu(x, "x");
  if (dy_.scalar_type() == at::kFloat && at::isReducedFloatingType(x.scalar_type())) {
    auto [dx, dweight, dbias] = row_bwd(dy_, x.to(at::kFloat), weight, mean, rstd, need);
    return {dx ? Maybe(dx->to(x.scalar_type())) : dx, dweight, dbias};
  }
  const Tensor dy = as(dy_, x.scalar_type());
  const int64_t M = rstd.numel();
  TORCH_CHECK(M > 0 && x.numel() > 0 && x.numel() % M == 0, "x with ", text(x.numel()), " elements is not ", text(M), " rows");
  check_numel(dy, "dy", x.numel());
  const Rows g{M, x.numel() / M};
  Tensor keep, keep_dy, w;
  const Maybe dx = std::get<0>(need) ? Maybe(empty_result(x)) : std::nullopt;
  const Maybe dweight = empty_grad(std::get<1>(need), g.N), dbias = empty_grad(std::get<2>(need), g.N);
  cpu::row_bwd(g, rows_input(dy, "dy", g.N, keep_dy), rows_input(x, "x", g.N, keep), parameter(weight, "weight", g.N, w),
               statistic(mean, "mean", x, 2 * M), statistic(rstd, "rstd", x, M), maybe(dx), maybe(dweight), maybe(dbias));
  return {dx, dweight, dbias};
}

std::tuple<int64_t, Tensor, Tensor> channel_stats(const Tensor& x) {
  const Shaped d(x);
  Tensor mean = empty({2, d.g.C}, d.acc()), deviation = empty({d.g.C}, d.acc());
  cpu::channel_stats(d.g, d.in, mean.mutable_data_ptr(), deviation.mutable_data_ptr());
  return {d.g.count(), mean, deviation};
}

Tensor channel_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight, const Maybe& bias) {
  const Shaped d(x);
  Tensor w, b, y = d.empty_like();
  cpu::channel_apply(d.g, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                     parameter(weight, "weight", d.g.C, w), parameter(bias, "bias", d.g.C, b), output(y));
  return y;
}

std::tuple<Tensor, Tensor> channel_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  Tensor sum_dz = empty({d.g.C}, d.acc()), sum_dz_x_hat = empty({d.g.C}, d.acc());
  cpu::channel_sums(d.g, dz, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                    sum_dz.mutable_data_ptr(), sum_dz_x_hat.mutable_data_ptr());
  return {sum_dz, sum_dz_x_hat};
}

Tensor channel_grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Maybe& weight,
                    const Maybe& c1, const Maybe& c2) {
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  TORCH_CHECK(c1.has_value() == c2.has_value(), "c1 and c2 are given together or not at all");
  Tensor w, dx = d.empty_like();
  cpu::channel_grad(d.g, dz, d.in, statistic(mean, "mean", x, 2 * d.g.C), statistic(rstd, "rstd", x, d.g.C),
                    parameter(weight, "weight", d.g.C, w), c1 ? statistic(*c1, "c1", x, d.g.C) : nullptr,
                    c2 ? statistic(*c2, "c2", x, d.g.C) : nullptr, output(dx));
  return dx;
}

Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, MakeStatistics make) {
  const Shaped d(x);
  const Running m(o.running_mean, "running_mean", d.g.C), v(o.running_var, "running_var", d.g.C);
  Tensor w, b, y = d.empty_like();
  const Statistics s = make();
  cpu::channel_fwd(d.g, d.in, parameter(weight, "weight", d.g.C, w), parameter(bias, "bias", d.g.C, b), m.array(), v.array(),
                   o.training, o.momentum, o.eps, output(y), s.mean, s.rstd);
  if (o.training) m.write_back(), v.write_back();
  if (o.training && o.num_batches_tracked) ++*o.num_batches_tracked->mutable_data_ptr<int64_t>();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                               const Maybe& running_mean, const Maybe& running_var, bool training,
                                               double momentum, double eps, const Maybe& num_batches_tracked) {
  TORCH_CHECK(running_mean.has_value() == running_var.has_value() && (training || running_mean),
              "running_mean and running_var are given together, and always in evaluation");
  if (num_batches_tracked) {
    check_cpu(*num_batches_tracked, "num_batches_tracked");
    check_numel(*num_batches_tracked, "num_batches_tracked", 1);
  }
  SavedStatistics s;
  Tensor y = channel_forward(x, weight, bias, {running_mean, running_var, training, momentum, eps, num_batches_tracked},
                             [&] { return s.make(x, channels_of(x)); });
  return {y, s.mean, s.rstd};
}

Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need) {
  Shaped d(x);
  const ChannelsInput dz = d.gradient(dy);
  Tensor w;
  const Maybe dx = std::get<0>(need) ? Maybe(d.empty_like()) : std::nullopt;
  const Maybe dweight = empty_grad(std::get<1>(need), d.g.C), dbias = empty_grad(std::get<2>(need), d.g.C);
  cpu::channel_bwd(d.g, dz, d.in, parameter(weight, "weight", d.g.C, w), statistic(mean, "mean", x, 2 * d.g.C),
                   statistic(rstd, "rstd", x, d.g.C), training, maybe(dx), maybe(dweight), maybe(dbias));
  return {dx, dweight, dbias};
}

}  // namespace fastnorm
