// Pieces of a batch norm of which some positions do not count.
#include "channel_masked.h"

#include "channel.h"

namespace fastnorm::cpu {
namespace {

// The statistics of channels, from sums of d = x - shift and d * d over what counts.
template <class T>
struct MaskedStatistics {
  using A = Acc<T>;
  Channels g;
  const ChannelsInput& x;
  const bool* mask;
  int64_t n;
  Buffer<A> shift;
  std::vector<char> again;

  MaskedStatistics(Channels g_, const ChannelsInput& x_, const bool* mask_)
      : g(g_), x(x_), mask(mask_), n(count_ones(mask, g.count())), shift(g.C), again(g.C, 0) {}

  const T* channel(int64_t c) const { return data<T>(x) + c * x.channel; }

  // Near the means of channels.
  void guess() const {
    if (PLAIN_FIRST<T>) {
      std::fill_n(static_cast<A*>(shift), g.C, A(0));
      return;
    }
    int64_t first[4], found = 0;
    for (int64_t i = 0; found < std::min<int64_t>(n, 4); ++i)
      if (mask[i]) first[found++] = x.positions.offset(i);
    for (int64_t c = 0; c < g.C; ++c)
      shift[c] = near<A>(n, [at = channel(c), &first](int64_t i) { return at[first[i]]; });
  }

  // False where the shift was far off: it is the mean now, and the sums are to be taken again.
  bool operator()(int64_t c, const std::array<double, 2>& sums, Moments<double>& out) {
    if (!std::isfinite(sums[1])) {
      out = in_double(c);
      return true;
    }
    out = moments_about(static_cast<double>(shift[c]), static_cast<double>(n), sums[0], sums[1]);
    if (again[c] || !too_far(static_cast<double>(shift[c]), out, DEVIATIONS<T>)) return true;
    again[c] = 1;
    shift[c] = static_cast<A>(out.mean);
    return false;
  }

  Moments<double> in_double(int64_t c) const {
    std::vector<double> counting;
    for (int64_t i = 0; i < g.count(); ++i)
      if (mask[i]) counting.push_back(static_cast<double>(channel(c)[x.positions.offset(i)]));
    return moments_in_double(n, [&](int64_t i) { return counting[i]; });
  }
};

}  // namespace

void channel_masked_stats(Channels g, const ChannelsInput& x, const bool* mask, void* count, void* mean, void* deviation) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    MaskedStatistics<T> statistics(g, x, mask);
    const auto set = [&](int64_t c, double m, double d) {
      set_pair(as<A>(mean), g.C, c, m);
      as<A>(deviation)[c] = static_cast<A>(d);
    };
    *as<A>(count) = static_cast<A>(statistics.n);
    for (int64_t c = 0; statistics.n == 0 && c < g.C; ++c) set(c, 0, 0);
    if (statistics.n == 0) return;
    statistics.guess();
    with_masked_sweep<T, 1>(g, {&x}, mask, [&](const auto& sweep) {
      sweep.sum(statistics.shift, [&](int64_t c, const std::array<double, 2>& sums) {
        Moments<double> m;
        if (!statistics(c, sums, m)) return false;
        set(c, m.mean, std::sqrt(m.m2 / m.n));
        return true;
      });
    });
  });
}

void channel_masked_grad(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const bool* mask, const void* mean,
                         const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto w = Widened<A>::or_else(weight, g.C, 1);
    const A *high = as<A>(mean), *low = high + g.C, *r = as<A>(rstd);
    const Constants<A, 5> constants(g.C);
    const Constants<A, 1> scale(g.C);
    for (int64_t c = 0; c < g.C; ++c) {
      gradient_constants<A>(constants, c, high[c], low[c], r[c], r[c], as<A>(c1)[c], as<A>(c2)[c]);
      constants[4][c] = w[c];
      scale[0][c] = r[c] * w[c];
    }
    with_masked_sweep<T, 2>(g, {&dy, &x}, mask, [&](const auto& sweep) { sweep.apply(constants, scale, as<T>(dx.data)); });
  });
}

}  // namespace fastnorm::cpu
