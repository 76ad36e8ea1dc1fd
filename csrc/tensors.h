// Tensors as the kernels take them: the device's kernels for one call, dense views, parameters, memory for results. What the
// contract's functions are made of.
#pragma once

#include <c10/core/DeviceGuard.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "checks.h"
#include "contract.h"

namespace fastnorm {

// aoti_torch_get_current_cuda_stream.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

// A row of the table of kernels.
struct Device {
  const Kernels* kernels;
  CurrentStream stream;
};
const Device& device_of(const Tensor& x);

// The kernels of x's device for one call: on its current stream, with memory until the call ends.
class On {
 public:
  explicit On(const Tensor& x) : device_(device_of(x)), x_(x) {
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

// y or dx. The first write to fresh memory costs more than the norm itself, page by page: ask for huge pages. From 32 MB on the
// C library maps every tensor anew, and from a few MB on it gives back what two of them have left at the end of its heap.
inline Tensor empty_result(const Tensor& x, at::ScalarType dtype, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  Tensor t = empty(x, x.sizes(), dtype, format);
#if defined(MADV_HUGEPAGE)
  constexpr size_t LARGE = size_t{4} << 20;
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
inline Tensor as(const Tensor& dy, at::ScalarType dtype) { return dy.scalar_type() == dtype ? dy : dy.to(dtype); }

// A gradient of n elements; a GPU's kernels write none that is wider than what they compute in.
inline Maybe empty_grad(const On& on, const Tensor& x, MaybeType dtype, int64_t n) {
  if (!dtype) return std::nullopt;
  return empty(x, {n}, on.gpu() && *dtype == at::kDouble ? accumulate_type(x) : *dtype);
}

inline Maybe wanted(Maybe&& t, MaybeType dtype) {
  if (t && t->scalar_type() != *dtype) return t->to(*dtype);
  return std::move(t);
}

inline Array maybe(const Maybe& t) { return t ? output(*t) : Array{}; }

// t in a dtype that a GPU's kernels read beside x.
inline Tensor readable(const Tensor& t, const Tensor& x) {
  return t.scalar_type() == x.scalar_type() ? t : as(t, accumulate_type(x));
}

// A parameter of n elements, made dense and, for a GPU, aligned; `keep` owns the copy while the kernel runs.
inline ConstArray parameter(const On& on, const Maybe& t, const char* name, int64_t n, const Tensor& x, Tensor& keep) {
  if (!t) return {};
  check_numel(*t, name, n);
  check_beside(*t, name, x);
  keep = t->contiguous();
  if (on.gpu()) keep = readable(keep, x);
  if (on.gpu() && reinterpret_cast<uintptr_t>(keep.const_data_ptr()) % 16 != 0) keep = keep.clone();
  return input(keep, name, x);
}

// The dimensions of t from `begin` on to `end` as one walk.
inline bool push(Walk& walk, const Tensor& t, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; ++d)
    if (!walk.push(t.size(d), t.stride(d))) return false;
  return true;
}

// t as rows of N elements, read in place; `keep` owns a dense copy where it has too many dimensions for that, or no
// dimension where the rows begin.
inline RowsInput rows_input(const Tensor& t, const char* name, int64_t N, const Tensor& x, Tensor& keep) {
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

inline ChannelsInput channels_input(const Tensor& t, const char* name, const Tensor& x, Tensor& keep) {
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

inline int64_t channels_of(const Tensor& x) {
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
  ChannelsInput gradient(const Tensor& dy) { return beside(dy, "dy", keep_dy); }
  // Another tensor of x's shape, in x's dtype; `keep_it` owns what the kernels read.
  ChannelsInput beside(const Tensor& t, const char* name, Tensor& keep_it) const {
    check_beside(t, name, x);
    TORCH_CHECK(t.sizes() == x.sizes(), name, " should have x's shape ", text(x.sizes()), ", got ", text(t.sizes()));
    const Tensor same = as(t, x.scalar_type());
    auto out = channels_input(same, name, x, keep_it);
    if (!keep_it.defined()) keep_it = same;
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

}  // namespace fastnorm
