// What every CPU kernel is made of beside vectors: threads, memory, statistics, small arrays, and elements read in any layout.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "sums.h"

namespace fastnorm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T* as(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

// The threads of a process do not follow it into a fork, and torch's pool would wait for them: a child of a process that had
// asked for them computes alone.
struct Pool {
  std::atomic<bool> asked{false}, lost{false};
  Pool() { pthread_atfork(nullptr, nullptr, lose); }
  static void lose();
};
inline Pool pool;
inline void Pool::lose() { pool.lost = pool.asked.load(); }

// f(begin, end) on torch's own threads. The split of the work must not show in the result: callers give items of fixed size,
// and their work in elements that are read.
template <class F>
void parallel_for(int64_t items, int64_t elements_per_item, const F& f) {
  constexpr int64_t GRAIN = 32768;  // elements below which a second thread costs more than it brings
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements_per_item));
  if (items <= grain || pool.lost) return f(0, items);
  pool.asked = true;
  const AOTITorchError failed = torch_parallel_for(
      0, items, grain, [](int64_t begin, int64_t end, void* g) { (*static_cast<const F*>(g))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
  if (failed) throw std::runtime_error("fastnorm: a CPU kernel ran out of memory");  // nothing else is thrown in there
}

// What a call may read and write and still find in the caches: three eighths of the 32 MB that many processors share, with
// others. From here on a Zen 4 wrote past them in half the time, or in the same.
constexpr int64_t CACHES = 12 << 20;

// Whether rows of `row_bytes` from `out` on are written past the caches: where the `bytes` that a call reads and writes leave
// nothing of them there, and in whole cache lines. It spares the processor to read what it overwrites.
inline bool streams(const void* out, int64_t row_bytes, int64_t bytes) {
  constexpr int64_t LINE = 64;
  return bytes >= CACHES && row_bytes % LINE == 0 && reinterpret_cast<uintptr_t>(out) % LINE == 0;
}

inline int64_t threads() {
  uint32_t n = 1;
  torch_get_num_threads(&n);
  return n;
}

// Memory that nobody has written yet, in whole cache lines.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    if (n == 0) return;
    data_.reset(static_cast<A*>(std::aligned_alloc(64, ceil_div(n * sizeof(A), 64) * 64)));
    if (!data_) throw std::bad_alloc();
  }
  operator A*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  std::unique_ptr<A, Free> data_;
};

// ---------------------------------------------------------------- statistics

// A mean as the pair that the contract asks for; the low part of a double mean is zero, and that of an infinite one.
template <class A>
struct Pair {
  A high, low;
  explicit Pair(double mean)
      : high(static_cast<A>(mean)),
        low(std::isinf(high) ? A(0) : static_cast<A>(mean - static_cast<double>(high))) {}
};

// From n terms d = x - shift: their sum and the sum of their squares.
FN_INLINE Moments<double> moments_about(double shift, double n, double sum_d, double sum_dd) {
  const double mean_d = sum_d / n;
  return {n, shift + mean_d, std::max(sum_dd - sum_d * mean_d, 0.0)};
}

// 1 / sqrt(v[k]) for n of them. Roots and quotients of double take most of the time of a short row, so float's are made good
// by one step of Newton's, to 1e-14; where float has no room for v, they are double's.
inline void reciprocal_roots(const double* v, int64_t n, float* out) {
  for (int64_t k = 0; k < n; ++k) {
    const double r = 1 / std::sqrt(static_cast<float>(v[k]));
    out[k] = static_cast<float>(r * (1.5 - 0.5 * v[k] * r * r));
  }
  int64_t outside = 0;
  for (int64_t k = 0; k < n; ++k) outside += (v[k] > 1e-30) & (v[k] < 1e30) ? 0 : 1;
  for (int64_t k = 0; k < n && outside > 0; ++k) out[k] = static_cast<float>(1 / std::sqrt(v[k]));
}
inline void reciprocal_roots(const double* v, int64_t n, double* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = 1 / std::sqrt(v[k]);
}

// Whether sums about this shift have lost too much to cancellation: it is more than so many deviations off the mean, and what
// they lose grows with the square of that.
FN_INLINE bool too_far(double shift, const Moments<double>& m, double deviations) {
  return (m.mean - shift) * (m.mean - shift) * m.n > deviations * deviations * m.m2;
}

// Two passes in double: where the squares overflow float (|x| > 1e19), and for what is not finite. at(i) is a double. Without
// `centre` the mean is zero.
template <class F>
Moments<double> moments_in_double(int64_t n, const F& at, bool centre = true) {
  double sum = 0, m2 = 0;
  for (int64_t i = 0; centre && i < n; ++i) sum += at(i);
  const double mean = sum / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) m2 += (at(i) - mean) * (at(i) - mean);
  return {static_cast<double>(n), mean, m2};
}

// ---------------------------------------------------------------- small arrays of any dtype

inline double element(ConstArray a, int64_t i) {
  if (a.dtype == DType::f32) return static_cast<const float*>(a.data)[i];
  double v = 0;
  with_type(a.dtype, [&](auto* t) { v = static_cast<double>(static_cast<decltype(t)>(const_cast<void*>(a.data))[i]); });
  return v;
}
inline void set_element(Array a, int64_t i, double v) {
  if (a.dtype == DType::f32) {
    static_cast<float*>(a.data)[i] = static_cast<float>(v);
    return;
  }
  with_type(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    static_cast<T*>(a.data)[i] = static_cast<T>(static_cast<Acc<T>>(v));
  });
}

// Elements [begin, begin + n) of `a`, each rounded once from the accumulate dtype.
template <class S>
void set_elements(Array a, int64_t begin, int64_t n, const S* from) {
  with_type(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T* to = static_cast<T*>(a.data) + begin;
    if constexpr (std::is_same_v<S, float> && sizeof(T) == 2)
      for_vectors<Floats>(n, [&](int64_t i, int64_t count) { store(to + i, load(from + i, count), count); });
    else
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<Acc<T>>(from[i]));
  });
}

// A parameter's elements [begin, begin + n) in the accumulate dtype: themselves where they are that already, else a converted
// copy; null where there is no parameter.
template <class A>
class Widened {
 public:
  Widened(ConstArray a, int64_t n, int64_t begin = 0) : own_(convert(a) ? n : 0) {
    if (!a.data) return;
    with_type(a.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      const T* from = static_cast<const T*>(a.data) + begin;
      if constexpr (std::is_same_v<T, A>) {
        data_ = from;
      } else {
        data_ = own_;
        if constexpr (std::is_same_v<A, float> && sizeof(T) == 2)
          for_vectors<Floats>(n, [&](int64_t i, int64_t count) { store(own_ + i, load(from + i, count), count); });
        else
          for (int64_t i = 0; i < n; ++i) own_[i] = static_cast<A>(from[i]);
      }
    });
  }
  // With `absent` in the place of every element of a parameter that is not there.
  static Widened or_else(ConstArray a, int64_t n, A absent) {
    if (a.data) return Widened(a, n);
    Widened w(n);
    std::fill_n(static_cast<A*>(w.own_), n, absent);
    return w;
  }
  operator const A*() const { return data_; }

 private:
  explicit Widened(int64_t n) : own_(n), data_(own_) {}
  static bool convert(ConstArray a) { return a.data && a.dtype != (sizeof(A) == 8 ? DType::f64 : DType::f32); }

  Buffer<A> own_;
  const A* data_ = nullptr;
};

// The same in the order of T's lots.
template <class T>
class InLots {
 public:
  InLots() = default;
  InLots(ConstArray a, int64_t n, int64_t begin = 0) {
    if (!a.data) return;
    with_type(a.dtype, [&](auto* t) {
      using S = std::remove_pointer_t<decltype(t)>;
      const S* from = static_cast<const S*>(a.data) + begin;
      if constexpr (LOT<T> == 1 && std::is_same_v<S, Acc<T>>) {
        data_ = from;
      } else {
        own_ = Buffer<Acc<T>>(n);
        in_lots<T>(from, n, static_cast<Acc<T>*>(own_));
        data_ = own_;
      }
    });
  }
  operator const Acc<T>*() const { return data_; }

 private:
  Buffer<Acc<T>> own_{0};
  const Acc<T>* data_ = nullptr;
};

// f(weight, bias) with their elements [begin, begin + n): as they are where both are T, else in the accumulate dtype.
template <class T, class F>
void with_parameters(ConstArray weight, ConstArray bias, int64_t begin, int64_t n, const F& f) {
  const auto fits = [](ConstArray a) { return !a.data || a.dtype == dtype_of<T>; };
  if (!std::is_same_v<T, Acc<T>> && fits(weight) && fits(bias)) {
    const T *w = static_cast<const T*>(weight.data), *b = static_cast<const T*>(bias.data);
    return f(w ? w + begin : w, b ? b + begin : b);
  }
  const Widened<Acc<T>> w(weight, n, begin), b(bias, n, begin);
  f(static_cast<const Acc<T>*>(w), static_cast<const Acc<T>*>(b));
}

// How many of n bytes, each 0 or 1, are 1: eight at a time, which a multiplication adds up.
inline int64_t count_ones(const bool* mask, int64_t n) {
  int64_t count = 0, i = 0;
  for (uint64_t eight; i + 8 <= n; i += 8) {
    std::memcpy(&eight, mask + i, 8);
    count += static_cast<int64_t>(eight * 0x0101010101010101 >> 56);
  }
  for (; i < n; ++i) count += mask[i];
  return count;
}

// ---------------------------------------------------------------- elements in any layout

// Elements [begin, begin + n) of a walk, one after the other in `out`.
template <class T>
void gather(const T* p, const Walk& walk, int64_t begin, int64_t n, T* out) {
  const int64_t step = walk.step();
  while (n > 0) {
    const int64_t run = std::min(n, walk.left(begin));
    const T* from = p + walk.offset(begin);
    for (int64_t k = 0; k < run; ++k) out[k] = from[k * step];
    begin += run;
    out += run;
    n -= run;
  }
}

}  // namespace fastnorm
