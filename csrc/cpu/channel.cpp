// Batch norm's whole passes, and the pieces between which a collective can go.
#include "channel.h"

namespace fastnorm::cpu {
void channel_stats(Channels g, const ChannelsInput& x, void* mean, void* deviation) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Buffer<A> shift(g.C);
    Statistics<T> statistics(g, x, shift);
    with_sweep<T, 1>(g, {&x}, [&](const auto& sweep) {
      sweep.template sum<StatisticsTerms<T>>({shift}, [&](int64_t c, const std::array<double, 2>& sums) {
        Moments<double> m;
        if (!statistics(c, sums, m)) return false;
        set_pair(as<A>(mean), g.C, c, m.mean);
        as<A>(deviation)[c] = static_cast<A>(std::sqrt(m.m2 / m.n));
        return true;
      });
    });
  });
}

void channel_apply(Channels g, const ChannelsInput& x, const void* mean, const void* rstd, ConstArray weight, ConstArray bias,
                   Array y) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto w = Widened<A>::or_else(weight, g.C, 1), b = Widened<A>::or_else(bias, g.C, 0);
    const Constants<A, 3> constants(g.C);
    const A *high = as<A>(mean), *low = high + g.C, *r = as<A>(rstd);
    for (int64_t c = 0; c < g.C; ++c) standardize_constants(constants, c, high[c], low[c], r[c], w[c], b[c]);
    with_sweep<T, 1>(g, {&x}, [&](const auto& sweep) { sweep.apply(Standardize<T>{}, constants, as<T>(y.data)); });
  });
}

void channel_sums(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean, const void* rstd, void* sum_dz,
                  void* sum_dz_x_hat) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Shifts<T> shifts(g.C, as<A>(mean), as<A>(rstd));
    with_sweep<T, 2>(g, {&dy, &x}, [&](const auto& sweep) {
      sweep.template sum<GradientTerms<T>>({shifts}, [&](int64_t c, const std::array<double, 2>& sums) {
        as<A>(sum_dz)[c] = static_cast<A>(sums[0]);
        as<A>(sum_dz_x_hat)[c] = static_cast<A>(shifts.gradient_sum(c, sums));
        return true;
      });
    });
  });
}

void channel_grad(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean, const void* rstd,
                  ConstArray weight, const void* c1, const void* c2, Array dx) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto w = Widened<A>::or_else(weight, g.C, 1);
    const A *high = as<A>(mean), *low = high + g.C, *r = as<A>(rstd);
    if (!c1) return scale<T>(g, dy, r, w, as<T>(dx.data));
    const Constants<A, 5> constants(g.C);
    for (int64_t c = 0; c < g.C; ++c) {
      gradient_constants<A>(constants, c, high[c], low[c], r[c], r[c], as<A>(c1)[c], as<A>(c2)[c]);
      constants[4][c] = w[c];
    }
    with_sweep<T, 2>(g, {&dy, &x},
                     [&](const auto& sweep) { sweep.apply(WeightedGradient<T>{}, constants, as<T>(dx.data)); });
  });
}

void channel_fwd(Channels g, const ChannelsInput& x, ConstArray weight, ConstArray bias, Array running_mean, Array running_var,
                 int64_t* tracked, bool training, double momentum, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    forward<T, 1>(g, {&x}, Standardize<T>{}, weight, bias, running_mean, running_var, tracked, training, momentum, eps,
                  as<T>(y.data), as<A>(mean), as<A>(rstd));
  });
}

void channel_bwd(Channels g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight, const void* mean,
                 const void* rstd, bool training, Array dx, Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    backward<T>(g, dy, weight, as<A>(mean), as<A>(rstd), training, as<T>(dx.data), dweight, dbias, [&](const auto& passes) {
      with_sweep<T, 2>(g, {&dy, &x}, [&](const auto& sweep) { passes(sweep, Nothing{}); });
    });
  });
}

}  // namespace fastnorm::cpu
