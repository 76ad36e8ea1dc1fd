// Channels (B, C, S): batch norm on the CPU. A norm is two passes, sums over each channel and a value for each element, and
// small arithmetic for each channel between them; how the elements are gone through is in channel_runs.h and channel_grid.h.
#pragma once

#include "channel_grid.h"
#include "channel_runs.h"

namespace fastnorm::cpu {

// Runs below this length are better read as rows of a grid, where they lie side by side. Measured on a Zen 3 and a Zen 4.
template <class T>
constexpr int64_t SHORTEST_RUN = lanes<Floats> == 16 && sizeof(T) == 4 ? 512 : 256;

// f(sweep) with the way to go through these inputs.
template <class T, size_t P, class F>
void with_sweep(Channels g, const Inputs<P>& in, const F& f) {
  using Runs = RunSweep<T, P>;
  using Grid = GridSweep<T, P>;
  if (Runs::serves(g, in) && !(Grid::side_by_side(g, in) && g.S < SHORTEST_RUN<T>)) return f(Runs(g, in));
  f(Grid(g, in));
}

// The statistics of channels, from sums of d = x - shift and d * d.
template <class T>
struct Statistics {
  using A = Acc<T>;
  Channels g;
  const ChannelsInput& x;
  A* shift;
  std::vector<char> again;

  Statistics(Channels g_, const ChannelsInput& x_, A* shift_) : g(g_), x(x_), shift(shift_), again(g_.C, 0) {}

  // False where the shift was far off: it is the mean now, and the sums are to be taken again.
  bool operator()(int64_t c, const std::array<double, 2>& sums, Moments<double>& out) {
    const double n = static_cast<double>(g.count());
    if (!std::isfinite(sums[1])) {
      const T* p = as<T>(x.data) + c * x.channel;
      out = moments_in_double(g.count(), [&](int64_t i) { return static_cast<double>(p[x.positions.offset(i)]); });
      return true;
    }
    out = moments_about(static_cast<double>(shift[c]), n, sums[0], sums[1]);
    if (again[c] || !too_far(static_cast<double>(shift[c]), out, DEVIATIONS<T>)) return true;
    again[c] = 1;
    shift[c] = static_cast<A>(out.mean);
    return false;
  }
};

template <class A>
void set_pair(A* mean, int64_t C, int64_t c, double value) {
  const Pair<A> pair(value);
  mean[c] = pair.high;
  mean[C + c] = pair.low;
}

inline void update(Array running, int64_t c, double value, double momentum) {
  if (running.data) set_element(running, c, (1 - momentum) * element(running, c) + momentum * value);
}

// The constants of Standardize for one channel, the first of several.
template <class A, size_t K>
void standardize_constants(const Constants<A, K>& k, int64_t c, A high, A low, A rstd, A weight, A bias) {
  k[0][c] = high;
  k[1][c] = rstd * weight;
  k[2][c] = bias - low * k[1][c];
}

// The constants of Gradient and WeightedGradient for one channel: c1 = mean(g * x_hat), c2 = mean(g).
template <class A, size_t K>
void gradient_constants(const Constants<A, K>& k, int64_t c, A high, A low, A rstd, A scale, double c1, double c2) {
  k[0][c] = high;
  k[1][c] = scale;
  k[2][c] = static_cast<A>(c1 * static_cast<double>(rstd));
  k[3][c] = static_cast<A>(low == 0 ? c2 : c2 - static_cast<double>(low) * c1 * static_cast<double>(rstd));
}

// What x is taken about in the sums of a backward pass: the mean's high part, or zero where that is near enough.
template <class T>
class Shifts {
 public:
  using A = Acc<T>;
  Shifts(int64_t C, const A* high, const A* rstd) : high_(high), low_(high + C), rstd_(rstd), shift_(C) {
    for (int64_t c = 0; c < C; ++c)
      shift_[c] = PLAIN_FIRST<T> && std::abs(high[c]) * rstd[c] < static_cast<A>(DEVIATIONS<T>) ? A(0) : high[c];
  }
  operator A*() const { return shift_; }
  // sum(dz * x_hat) from the sums of dz and of dz * (x - shift); rstd is one factor of a whole channel.
  double gradient_sum(int64_t c, const std::array<double, 2>& sums) const {
    const double off = (static_cast<double>(high_[c]) - static_cast<double>(shift_[c])) + static_cast<double>(low_[c]);
    return (off == 0 ? sums[1] : sums[1] - off * sums[0]) * static_cast<double>(rstd_[c]);
  }

 private:
  const A *high_, *low_, *rstd_;
  Buffer<A> shift_;
};

// The whole forward: `value` has Standardize's constants, and x is the first of the inputs.
template <class T, size_t P, class Value>
void forward(Channels g, const Inputs<P>& in, const Value& value, ConstArray weight, ConstArray bias, Array running_mean,
             Array running_var, int64_t* tracked, bool training, double momentum, double eps, T* y, Acc<T>* mean,
             Acc<T>* rstd) {
  using A = Acc<T>;
  const auto w = Widened<A>::or_else(weight, g.C, 1), b = Widened<A>::or_else(bias, g.C, 0);
  const Constants<A, 3> constants(g.C);
  const auto settle = [&](int64_t c, double m, double var) {
    set_pair(mean, g.C, c, m);
    rstd[c] = static_cast<A>(1.0 / std::sqrt(var + eps));
    standardize_constants(constants, c, mean[c], mean[g.C + c], rstd[c], w[c], b[c]);
  };
  if (!training) {
    for (int64_t c = 0; c < g.C; ++c) settle(c, element(running_mean, c), element(running_var, c));
    return with_sweep<T, P>(g, in, [&](const auto& sweep) { sweep.apply(value, constants, y); });
  }
  const Buffer<A> shift(g.C);
  Statistics<T> statistics(g, *in[0], shift);
  const auto settle_batch = [&](int64_t c, const std::array<double, 2>& sums) {
    Moments<double> m;
    if (!statistics(c, sums, m)) return false;
    settle(c, m.mean, m.m2 / m.n);
    update(running_mean, c, m.mean, momentum);
    update(running_var, c, m.m2 / (m.n - 1), momentum);
    return true;
  };
  with_sweep<T, P>(g, in, [&](const auto& sweep) {
    sweep.template both<StatisticsTerms<T>>({shift}, settle_batch, value, constants, y);
  });
  if (tracked) ++*tracked;
}

// dx where mean and rstd are constants
template <class T>
void scale(Channels g, const ChannelsInput& dy, const Acc<T>* rstd, const Acc<T>* weight, T* dx) {
  const Constants<Acc<T>, 1> constants(g.C);
  for (int64_t c = 0; c < g.C; ++c) constants[0][c] = rstd[c] * weight[c];
  with_sweep<T, 1>(g, {&dy}, [&](const auto& sweep) { sweep.apply(Scale<T>{}, constants, dx); });
}

// The whole backward; go(passes) calls passes(sweep, before) with a sweep over dz and x, and what makes dz where it is not
// there.
template <class T, class Go>
void backward(Channels g, const ChannelsInput& dz, ConstArray weight, const Acc<T>* mean, const Acc<T>* rstd, bool training,
              T* dx, Array dweight, Array dbias, const Go& go) {
  using A = Acc<T>;
  const auto w = Widened<A>::or_else(weight, g.C, 1);
  const bool through_statistics = training && dx, sums_needed = through_statistics || dweight.data || dbias.data;
  const Constants<A, 4> constants(g.C);
  const Shifts<T> shifts(g.C, mean, rstd);
  const auto settle = [&](int64_t c, const std::array<double, 2>& sums) {
    const double n = static_cast<double>(g.count()), sum_dz_x_hat = shifts.gradient_sum(c, sums);
    if (dweight.data) set_element(dweight, c, sum_dz_x_hat);
    if (dbias.data) set_element(dbias, c, sums[0]);
    if (through_statistics)
      gradient_constants<A>(constants, c, mean[c], mean[g.C + c], rstd[c], rstd[c] * w[c], sum_dz_x_hat / n, sums[0] / n);
    return true;
  };
  if (sums_needed)
    go([&](const auto& sweep, const auto& before) {
      if (through_statistics)
        sweep.template both<GradientTerms<T>>({shifts}, settle, Gradient<T>{}, constants, dx, before);
      else
        sweep.template sum<GradientTerms<T>>({shifts}, settle, before);
    });
  if (dx && !training) scale<T>(g, dz, rstd, w, dx);
}

}  // namespace fastnorm::cpu
