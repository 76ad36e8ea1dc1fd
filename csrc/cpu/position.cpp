// Layer norm over channels and the activation after it: (B, C, S), all dense, with one mean and rstd for the C channels of a
// position.
#include "channel_ops.h"
#include "epilogue.h"

namespace fastnorm::cpu {
namespace {

template <class T>
struct PositionNorm {
  using A = Acc<T>;
  Positions g;
  const T* x;
  A *mean, *rstd;
  Epilogue epilogue;
  Widened<A> weight, bias;

  PositionNorm(Positions g_, ConstArray x_, ConstArray weight_, ConstArray bias_, Epilogue e, const void* mean_,
               const void* rstd_)
      : g(g_),
        x(as<T>(x_.data)),
        mean(as<A>(mean_)),
        rstd(as<A>(rstd_)),
        epilogue(e),
        weight(Widened<A>::or_else(weight_, g.C, 1)),
        bias(Widened<A>::or_else(bias_, g.C, 0)) {}

  int64_t at(int64_t m, int64_t c) const { return (m / g.S * g.C + c) * g.S + m % g.S; }
  A x_hat(int64_t m, int64_t c) const { return (static_cast<A>(x[at(m, c)]) - mean[m] - mean[g.M() + m]) * rstd[m]; }
};

}  // namespace

void position_fwd(Positions g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps, Array y,
                  void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    using V = Vec<T>;
    const PositionNorm<T> p(g, x, weight, bias, epilogue, mean, rstd);
    parallel_for(g.M(), g.C, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const auto moments = moments_in_double(g.C, [&](int64_t c) { return static_cast<double>(p.x[p.at(m, c)]); });
        const Pair<A> pair(moments.mean);
        p.mean[m] = pair.high;
        p.mean[g.M() + m] = pair.low;
        p.rstd[m] = static_cast<A>(1 / std::sqrt(moments.m2 / static_cast<double>(g.C) + eps));
        for (int64_t c = 0; c < g.C; ++c) {
          std::array<V, 1> z{V(p.x_hat(m, c) * p.weight[c] + p.bias[c])};
          activate_all(epilogue, z);
          A out[lanes<V>];
          z[0].store(out);
          as<T>(y.data)[p.at(m, c)] = static_cast<T>(out[0]);
        }
      }
    });
  });
}

void position_bwd(Positions g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                  const void* mean, const void* rstd, Array dx, Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    using V = Vec<T>;
    const PositionNorm<T> p(g, x, weight, bias, epilogue, mean, rstd);
    std::vector<double> dw(g.C, 0.0), db(g.C, 0.0), dz(g.C);
    for (int64_t m = 0; m < g.M(); ++m) {
      double c1 = 0, c2 = 0;
      for (int64_t c = 0; c < g.C; ++c) {
        const std::array<V, 1> dy_c{V(static_cast<A>(as<T>(dy.data)[p.at(m, c)]))};
        std::array<V, 1> z{V(p.x_hat(m, c) * p.weight[c] + p.bias[c])};
        grad_all(epilogue, dy_c, z);
        A out[lanes<V>];
        z[0].store(out);
        dz[c] = static_cast<double>(out[0]);
        dw[c] += dz[c] * static_cast<double>(p.x_hat(m, c));
        db[c] += dz[c];
        c1 += dz[c] * static_cast<double>(p.weight[c] * p.x_hat(m, c)) / static_cast<double>(g.C);
        c2 += dz[c] * static_cast<double>(p.weight[c]) / static_cast<double>(g.C);
      }
      for (int64_t c = 0; dx.data && c < g.C; ++c) {
        const double gradient = dz[c] * static_cast<double>(p.weight[c]) - c2 - static_cast<double>(p.x_hat(m, c)) * c1;
        as<T>(dx.data)[p.at(m, c)] = static_cast<T>(static_cast<A>(gradient * static_cast<double>(p.rstd[m])));
      }
    }
    if (dweight.data) set_elements(dweight, 0, g.C, dw.data());
    if (dbias.data) set_elements(dbias, 0, g.C, db.data());
  });
}

}  // namespace fastnorm::cpu
