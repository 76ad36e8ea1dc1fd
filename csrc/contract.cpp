// The backend contract over tensors: checks, dense views, memory for the results, kernels. No math, and no Python.
#include "contract.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/core/DeviceGuard.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "checks.h"

namespace fastnorm {

namespace {

// aoti_torch_get_current_cuda_stream.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// THE table of kernels, a row for each type of device.
struct Device {
  const Kernels* kernels;
  CurrentStream stream;
};
Device on_cpu{&cpu::KERNELS, nullptr}, on_cuda{nullptr, nullptr};

}  // namespace

void set_kernels(c10::DeviceType type, const Kernels* kernels, uintptr_t stream) {
  TORCH_CHECK(type == c10::DeviceType::CPU || type == c10::DeviceType::CUDA, "fastnorm has no kernels for ", type);
  const bool is_cpu = type == c10::DeviceType::CPU;
  (is_cpu ? on_cpu : on_cuda) = {is_cpu && !kernels ? &cpu::KERNELS : kernels, reinterpret_cast<CurrentStream>(stream)};
}

Tensor empty(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  if (like.is_cpu()) return at::cpu::empty(sizes, at::TensorOptions().dtype(dtype), format);
  return at::empty(sizes, at::TensorOptions().dtype(dtype).device(like.device()), format);
}

namespace {

// The kernels of x's device for one call: on its current stream, with memory until the call ends.
class On {
 public:
  explicit On(const Tensor& x) : device_(x.is_cpu() ? on_cpu : on_cuda), x_(x) {
    check_served(x);
    if (x.is_cpu()) return;
    TORCH_CHECK(device_.kernels, "fastnorm's kernels for ", x.device().type(), " tensors are not loaded");
    guard_.reset_device(x.device());
    place_.device = x.get_device();
    TORCH_CHECK(device_.stream(place_.device, &place_.stream) == 0, "torch gives no current stream");
  }
  bool gpu() const { return device_.kernels->gpu; }

  template <class F, class... Args>
  void operator()(F Kernels::* function, Args&&... args) {
    Place place = place_;
    place.owner = this;
    place.memory = [](void* self, size_t bytes) { return static_cast<On*>(self)->memory(bytes); };
    const char* error = (device_.kernels->*function)(place, std::forward<Args>(args)...);
    TORCH_CHECK(!error, error);
  }

 private:
  void* memory(size_t bytes) {
    owned_.push_back(empty(x_, {static_cast<int64_t>(bytes)}, at::kByte));
    return owned_.back().mutable_data_ptr();
  }

  const Device device_;
  const Tensor& x_;
  Place place_;
  c10::OptionalDeviceGuard guard_;
  c10::SmallVector<Tensor, 3> owned_;
};

// y or dx. The first write to a fresh mapping costs more than the norm itself, page by page: ask for huge pages. From 32 MB on
// the C library maps every tensor anew; smaller ones come from memory that is used again.
Tensor empty_result(const Tensor& x, at::ScalarType dtype, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  Tensor t = empty(x, x.sizes(), dtype, format);
#if defined(MADV_HUGEPAGE)
  constexpr size_t LARGE = size_t{32} << 20;
  if (t.is_cpu() && t.nbytes() >= LARGE) {
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

// A gradient of n elements; a GPU's kernels write none that is wider than what they compute in.
Maybe empty_grad(const On& on, const Tensor& x, MaybeType dtype, int64_t n) {
  if (!dtype) return std::nullopt;
  return empty(x, {n}, on.gpu() && *dtype == at::kDouble ? accumulate_type(x) : *dtype);
}

Maybe wanted(Maybe&& t, MaybeType dtype) {
  if (t && t->scalar_type() != *dtype) return t->to(*dtype);
  return std::move(t);
}

Array maybe(const Maybe& t) { return t ? output(*t) : Array{}; }

// t in a dtype that a GPU's kernels read beside x.
Tensor readable(const Tensor& t, const Tensor& x) {
  return t.scalar_type() == x.scalar_type() ? t : as(t, accumulate_type(x));
}

// A parameter of n elements, made dense and, for a GPU, aligned; `keep` owns the copy while the kernel runs.
ConstArray parameter(const On& on, const Maybe& t, const char* name, int64_t n, const Tensor& x, Tensor& keep) {
  if (!t) return {};
  check_numel(*t, name, n);
  check_beside(*t, name, x);
  keep = t->contiguous();
  if (on.gpu()) keep = readable(keep, x);
  if (on.gpu() && reinterpret_cast<uintptr_t>(keep.const_data_ptr()) % 16 != 0) keep = keep.clone();
  return input(keep, name, x);
}

// The dimensions of t from `begin` on to `end` as one walk.
bool push(Walk& walk, const Tensor& t, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; ++d)
    if (!walk.push(t.size(d), t.stride(d))) return false;
  return true;
}

// t as rows of N elements, read in place; `keep` owns a dense copy where it has too many dimensions for that, or no
// dimension where the rows begin.
RowsInput rows_input(const Tensor& t, const char* name, int64_t N, const Tensor& x, Tensor& keep) {
  const auto place = [&](const Tensor& from, RowsInput& in) {
    int64_t d = from.dim(), n = 1;
    while (d > 0 && n < N) n *= from.size(--d);
    static_cast<ConstArray&>(in) = input(from, name, x);
    return n == N && push(in.rows, from, 0, d) && push(in.columns, from, d, from.dim());
  };
  RowsInput in;
  if (place(t, in)) return in;
  keep = t.contiguous().view({-1, N});
  in = {};
  place(keep, in);
  return in;
}

ChannelsInput channels_input(const Tensor& t, const char* name, const Tensor& x, Tensor& keep) {
  const auto place = [&](const Tensor& from, ChannelsInput& in) {
    static_cast<ConstArray&>(in) = input(from, name, x);
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
  check_served(x);
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
    in = channels_input(x, "x", x, keep);
  }
  ChannelsInput gradient(const Tensor& dy) {
    check_beside(dy, "dy", x);
    TORCH_CHECK(dy.sizes() == x.sizes(), "dy should have x's shape ", text(x.sizes()), ", got ", text(dy.sizes()));
    const Tensor same = as(dy, x.scalar_type());
    auto out = channels_input(same, "dy", x, keep_dy);
    if (!keep_dy.defined()) keep_dy = same;
    return out;
  }
  Tensor empty_like() const { return empty_result(x, x.scalar_type(), format); }
  at::ScalarType acc() const { return accumulate_type(x); }
};

// A running statistic as one dense vector that the kernels read and write; where it is none, a copy that goes back into it with
// write_back().
struct Running {
  Tensor home, dense;
  Running(const On& on, const Maybe& t, const char* name, int64_t C, const Tensor& x) {
    if (!t) return;
    check_beside(*t, name, x);
    check_numel(*t, name, C);
    home = *t;
    const bool too_wide = on.gpu() && home.scalar_type() == at::kDouble && accumulate_type(x) != at::kDouble;
    dense = too_wide ? home.to(accumulate_type(x)) : is_dense_vector(home) ? home : home.contiguous();
  }
  Array array() const { return dense.defined() ? output(dense) : Array{}; }
  void write_back() const {
    if (dense.defined() && !dense.is_same(home)) home.detach().copy_(dense);
  }
};

}  // namespace

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

}  // namespace fastnorm
