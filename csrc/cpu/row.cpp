// Rows (M, N): layer norm on the CPU.
#include "loops.h"

namespace fastnorm::cpu {
namespace {

template <class T>
void fwd(Rows g, const T* x, const Acc<T>* weight, const Acc<T>* bias, double eps, T* y, Acc<T>* mean, Acc<T>* rstd,
         int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<T>;
  for (int64_t m = begin; m < end; ++m) {
    const T* row = x + m * g.N;
    const auto stats = moments_of(row, 1, 0, g.N);
    const Pair<A> centre(stats.mean);
    const A r = static_cast<A>(1.0 / std::sqrt(stats.m2 / stats.n + eps));
    mean[m] = centre.high;
    mean[g.M + m] = centre.low;
    rstd[m] = r;
    for_vectors<V>(g.N, [&](int64_t i, int64_t count) {
      const V x_hat = normalize(load(row + i, count), V(centre.high), V(centre.low), V(r));
      const V w = weight ? load(weight + i, count) : V(1);
      const V b = bias ? load(bias + i, count) : V(0);
      store(y + m * g.N + i, affine(x_hat, w, b), count);
    });
  }
}

// One block of rows; dw and db are this block's own sums, N rounded up to whole vectors, zero at the start.
template <class T>
void bwd_block(Rows g, const T* dy, const T* x, const Acc<T>* weight, const Acc<T>* mean, const Acc<T>* rstd, T* dx, Acc<T>* dw,
               Acc<T>* db, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t m = begin; m < end; ++m) {
    const V high(mean[m]), low(mean[g.M + m]), r(rstd[m]);
    const auto dz_at = [&](int64_t i, int64_t count) { return load(dy + m * g.N + i, count); };
    const auto x_hat_at = [&](int64_t i, int64_t count) { return normalize(load(x + m * g.N + i, count), high, low, r); };
    const auto g_of = [&](V dz, int64_t i, int64_t count) { return weight ? dz * load(weight + i, count) : dz; };
    V c1(0), c2(0);
    if (dx) {
      const auto sums = sums_over<V, 2>(1, 0, g.N, [&](int64_t i, int64_t count) {
        const V gi = g_of(dz_at(i, count), i, count);
        return std::array<V, 2>{gi * x_hat_at(i, count), gi};
      });
      c1 = V(static_cast<Acc<T>>(sums[0] / g.N));
      c2 = V(static_cast<Acc<T>>(sums[1] / g.N));
    }
    for_vectors<V>(g.N, [&](int64_t i, int64_t count) {
      const V dz = dz_at(i, count), x_hat = x_hat_at(i, count);
      if (dx) store(dx + m * g.N + i, grad_input(g_of(dz, i, count), x_hat, r, c1, c2), count);
      if (dw) store(dw + i, load(dw + i) + dz * x_hat);
      if (db) store(db + i, load(db + i) + dz);
    });
  }
}

}  // namespace

void row_fwd(Rows g, ConstArray x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Widened<A> w(weight, g.N), b(bias, g.N);
    parallel_for(g.M, g.N, [&](int64_t begin, int64_t end) {
      fwd<T>(g, static_cast<const T*>(x.data), w, b, eps, static_cast<T*>(y.data), static_cast<A*>(mean), static_cast<A*>(rstd),
             begin, end);
    });
  });
}

void row_bwd(Rows g, ConstArray dy, ConstArray x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    // Blocks depend on the shape alone: 32 rows or more each, at most 32 of them, so the sums do not depend on the threads.
    const int64_t rows = std::max<int64_t>(32, ceil_div(g.M, 32)), blocks = ceil_div(g.M, rows);
    const int64_t padded = ceil_div(g.N, 64) * 64;
    std::vector<A> dw_partial(dweight.data ? blocks * padded : 0), db_partial(dbias.data ? blocks * padded : 0);
    const Widened<A> w(weight, g.N);
    parallel_for(blocks, rows * g.N, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        bwd_block<T>(g, static_cast<const T*>(dy.data), static_cast<const T*>(x.data), w, static_cast<const A*>(mean),
                     static_cast<const A*>(rstd), static_cast<T*>(dx.data), dweight.data ? &dw_partial[k * padded] : nullptr,
                     dbias.data ? &db_partial[k * padded] : nullptr, k * rows, std::min(g.M, (k + 1) * rows));
    });
    const auto finish = [&](const std::vector<A>& partial, Array out) {
      for (int64_t i = 0; out.data && i < g.N; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += partial[k * padded + i];
        set_element(out, i, sum);
      }
    };
    finish(dw_partial, dweight);
    finish(db_partial, dbias);
  });
}

}  // namespace fastnorm::cpu
