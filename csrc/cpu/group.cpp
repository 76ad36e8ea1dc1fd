// Group norm and the activation after it: (B, C, S), all dense, with one mean and rstd for P neighbouring channels of a sample.
//
// A group is a row of P * S neighbouring elements in which S of them share a weight and a bias. It is gone through in parts of
// one size, some channels or a piece of one, and its sums are those of its parts in their order: they depend neither on the
// number of threads nor on the batch. Where there are groups enough for the threads, a group's second pass follows its first,
// the last parts first, which are in cache; few groups are split into their parts. Backward makes dz a part at a time in the
// memory of dx.
#include "channel_ops.h"
#include "epilogue.h"
#include "row_moments.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t SHORT_RUN = 128;  // below this length, which an end is much of, runs have their weights beside each element

// Channels [channel, channel + channels) of a group, positions [position, position + positions) of each; whole channels where
// there are several, else the `cut`-th piece of one.
struct Part {
  int64_t channel, channels, position, positions, cut;
};

// How every group is cut; no part is larger than PIECE.
struct Cuts {
  int64_t P, S, channels, positions, cuts, count;  // cuts of a channel, parts of a group

  explicit Cuts(Groups g) : P(g.P), S(g.S), channels(std::clamp<int64_t>(PIECE / g.S, 1, g.P)) {
    constexpr int64_t LINE = 64;  // elements
    const int64_t least = ceil_div(S, PIECE);
    positions = std::min(S, ceil_div(S, least * LINE) * LINE);
    cuts = ceil_div(S, positions);
    count = ceil_div(P, channels) * cuts;
  }
  Part operator[](int64_t i) const {
    const int64_t block = cuts == 1 ? i : i / cuts, cut = i - block * cuts;  // small groups would feel a division
    const int64_t channel = block * channels, position = cut * positions;
    return {channel, std::min(channels, P - channel), position, std::min(positions, S - position), cut};
  }
};

template <class T>
struct Same {  // of all elements of a run
  Vec<T> value;
  FN_INLINE Vec<T> operator()(int64_t, int64_t) const { return value; }
};
template <class T>
struct Each {
  const Acc<T>* of;
  FN_INLINE Vec<T> operator()(int64_t i, int64_t count) const { return load(of + i, count); }
};

// What both directions are about: M groups of N elements, read at x.
template <class T>
struct GroupNorm {
  using A = Acc<T>;
  using V = Vec<T>;
  Groups g;
  int64_t M, N, groups;  // groups of a sample
  Cuts cuts;
  const T* x;
  A *mean, *rstd;
  Epilogue epilogue;
  Widened<A> weight, bias;
  Buffer<A> beside;  // where runs are short weight and then bias, one for each element of a sample

  GroupNorm(Groups g_, ConstArray x_, ConstArray weight_, ConstArray bias_, Epilogue e, const void* mean_, const void* rstd_)
      : g(g_),
        M(g.M()),
        N(g.count()),
        groups(g.C / g.P),
        cuts(g),
        x(as<T>(x_.data)),
        mean(as<A>(mean_)),
        rstd(as<A>(rstd_)),
        epilogue(e),
        weight(Widened<A>::or_else(weight_, g.C, 1)),
        bias(Widened<A>::or_else(bias_, g.C, 0)),
        beside(g.S < SHORT_RUN ? 2 * g.C * g.S : 0) {
    for (int64_t c = 0; beside && c < g.C; ++c) {
      std::fill_n(beside + c * g.S, g.S, weight[c]);
      std::fill_n(beside + (g.C + c) * g.S, g.S, bias[c]);
    }
  }

  int64_t first_channel(int64_t m) const { return m % groups * g.P; }
  // Whether there are too few groups for the threads; the results are the same.
  bool few() const { return threads() > 1 && M < 4 * threads() && cuts.count > 1; }

  // f(i, n, w, b) for runs of n elements from the i-th of group m on; w and b give the parameters of the run's elements. f
  // takes copies of them, and makes what else is constant itself: a vector that is written could be part of one elsewhere.
  template <class F>
  void runs(int64_t m, const Part& part, const F& f) const {
    const int64_t channel = first_channel(m) + part.channel, i = part.channel * g.S + part.position;
    if (beside) {
      const A* w = beside + channel * g.S;
      return f(i, part.channels * g.S, Each<T>{w}, Each<T>{w + g.C * g.S});
    }
    for (int64_t k = 0; k < part.channels; ++k)
      f(i + k * g.S, part.positions, Same<T>{V(weight[channel + k])}, Same<T>{V(bias[channel + k])});
  }

  struct Standardized {  // z of one group
    V high, low, rstd;
    FN_INLINE V operator()(V x, V w, V b) const {
      const V slope = rstd * w;
      return Standardize<T>::value({x}, {high, slope, b - low * slope});
    }
  };
  Standardized standardized(int64_t m) const { return {V(mean[m]), V(mean[M + m]), V(rstd[m])}; }
};

template <class T>
struct GroupForward : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using typename Base::A, typename Base::V;
  using Base::cuts, Base::g, Base::M, Base::mean, Base::N, Base::rstd, Base::x;
  double eps;
  T* y;
  bool stream;

  GroupForward(Groups groups, ConstArray in, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps_, T* y_,
               void* mean_, void* rstd_)
      : Base(groups, in, weight, bias, epilogue, mean_, rstd_),
        eps(eps_),
        y(y_),
        stream(streams(y, g.S * sizeof(T), 2 * M * N * sizeof(T))) {}

  void apply(int64_t m, const Part& part) const {
    this->runs(m, part, [&](int64_t begin, int64_t n, auto w, auto b) {
      const auto z_of = this->standardized(m);
      const Epilogue epilogue = this->epilogue;
      const T* from = x + m * N + begin;
      T* to = y + m * N + begin;
      for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
        std::array<V, J> z;
        repeat<J>([&](auto j) FN_LAMBDA {
          const int64_t at = i + static_cast<int64_t>(j) * lanes<V>;
          z[j] = z_of(load(from + at, count), w(at, count), b(at, count));
        });
        activate_all<Activation::silu>(epilogue, z);
        put_all<T, J>(to + i, z, count, stream);
      });
    });
  }

  // Adds part k of groups [m, m + groups) to their moments.
  void add_moments(int64_t m, int64_t groups, int64_t k, BlockMoments& moments) const {
    const Part part = cuts[k];
    const int64_t begin = part.channel * g.S + part.position, n = part.channels * part.positions;
    const T* at[MAX_BLOCK];
    BlockMoments more;
    for (int64_t j = 0; j < groups; ++j) at[j] = x + (m + j) * N + begin;
    moments_of(at, groups, n, true, more);
    for (int64_t j = 0; j < groups; ++j)
      moments.set(j, begin == 0 ? more.get(j, n) : merge(moments.get(j, begin), more.get(j, n)));
  }

  void save(int64_t m, int64_t groups, const BlockMoments& moments) const {
    double variance[MAX_BLOCK];
    for (int64_t j = 0; j < groups; ++j) {
      const Pair<A> centre(moments.mean[j]);
      mean[m + j] = centre.high;
      mean[M + m + j] = centre.low;
      variance[j] = moments.m2[j] / static_cast<double>(N) + eps;
    }
    reciprocal_roots(variance, groups, rstd + m);
  }

  void operator()() const {
    const int64_t parts = cuts.count;
    if (this->few()) return by_parts(parts);
    constexpr int64_t BYTES = 1 << 14;
    const int64_t each = std::clamp<int64_t>(BYTES / (N * static_cast<int64_t>(sizeof(T))), 1, MAX_BLOCK);
    parallel_for(ceil_div(M, each), each * N, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t m = item * each, groups = std::min(each, M - m);
        BlockMoments moments;
        for (int64_t k = 0; k < parts; ++k) add_moments(m, groups, k, moments);
        save(m, groups, moments);
        for (int64_t j = 0; j < groups; ++j)
          for (int64_t k = parts - 1; k >= 0; --k) apply(m + j, cuts[k]);
      }
      if (stream) stream_end();
    });
  }

  void by_parts(int64_t parts) const {
    std::vector<Moments<double>> partial(M * parts);
    parallel_for(M * parts, N / parts, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Part part = cuts[item % parts];
        const T* at = x + item / parts * N + part.channel * g.S + part.position;
        BlockMoments moments;
        moments_of(&at, 1, part.channels * part.positions, true, moments);
        partial[item] = moments.get(0, part.channels * part.positions);
      }
    });
    for (int64_t m = 0; m < M; ++m) {
      auto total = partial[m * parts];
      for (int64_t k = 1; k < parts; ++k) total = merge(total, partial[m * parts + k]);
      BlockMoments moments;
      moments.set(0, total);
      save(m, 1, moments);
    }
    parallel_for(M * parts, N / parts, [&](int64_t begin, int64_t end) {
      for (int64_t item = end - 1; item >= begin; --item) apply(item / parts, cuts[item % parts]);
      if (stream) stream_end();
    });
  }
};

template <class T>
struct GroupBackward : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using typename Base::A, typename Base::V;
  using Sums = std::array<double, 2>;
  using Base::cuts, Base::g, Base::M, Base::mean, Base::N, Base::rstd, Base::x;
  const T* dy;
  T* dx;
  bool slopes;  // whether dz is another than dy
  bool stream;
  // For each channel of each sample, a cut of it after the other: sums of dz and dz * (x - high); from `settle` on, in the
  // first, of dz and dz * x_hat.
  std::vector<Sums> sums;
  std::vector<std::array<A, 2>> constants;  // of groups: the last two of WeightedGradient but for the weight

  GroupBackward(Groups groups, ConstArray dy_, ConstArray in, ConstArray weight, ConstArray bias, Epilogue epilogue,
                const void* mean_, const void* rstd_, T* dx_)
      : Base(groups, in, weight, bias, epilogue, mean_, rstd_),
        dy(as<T>(dy_.data)),
        dx(dx_),
        slopes(epilogue.activation != Activation::identity),
        stream(!slopes && streams(dx, g.S * sizeof(T), 3 * M * N * sizeof(T))),
        sums(g.B * g.C * cuts.cuts),
        constants(M) {}

  // dz of a part of group m; `to` is where the part's first element goes.
  void make_dz(int64_t m, const Part& part, T* to) const {
    const int64_t first = part.channel * g.S + part.position;
    this->runs(m, part, [&](int64_t begin, int64_t n, auto w, auto b) {
      const auto z_of = this->standardized(m);
      const Epilogue epilogue = this->epilogue;
      const T *dy_run = dy + m * N + begin, *x_run = x + m * N + begin;
      T* dz = to + begin - first;
      for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
        std::array<V, J> dy_i, z;
        repeat<J>([&](auto j) FN_LAMBDA {
          const int64_t at = i + static_cast<int64_t>(j) * lanes<V>;
          dy_i[j] = load(dy_run + at, count);
          z[j] = z_of(load(x_run + at, count), w(at, count), b(at, count));
        });
        grad_all<Activation::silu>(epilogue, dy_i, z);
        store_all<T, J>(dz + i, z, count);
      });
    });
  }

  // Part k of group m, its dz in dx's memory or, without that, in `scratch`.
  void take_sums(int64_t m, int64_t k, T* scratch) {
    const Part part = cuts[k];
    const int64_t first = m * N + part.channel * g.S + part.position;
    const T* dz = dy + first;
    if (slopes) {
      T* made = dx ? dx + first : scratch;
      make_dz(m, part, made);
      dz = made;
    }
    Sums* to = &sums[(m * g.P + part.channel) * cuts.cuts + part.cut];
    if (g.S < 4) return few_sums(mean[m], part.channels, dz, x + first, to);
    const auto terms = [high = V(mean[m])](auto, int64_t, int64_t count, const std::array<V, 2>& v)
                           FN_LAMBDA { return GradientTerms<T>::terms(v, {high}, count); };
    for_sums(part.positions, part.channels, [&](auto R, auto CHAINS, int64_t channel) {
      std::array<std::array<const T*, 2>, R> at;
      double found[R][2];
      for (size_t r = 0; r < R; ++r) {
        const int64_t i = (channel + static_cast<int64_t>(r)) * g.S;
        at[r] = {dz + i, x + first + i};
      }
      sum_up<2, CHAINS>(at, part.positions, terms, found);
      for (size_t r = 0; r < R; ++r) to[(channel + static_cast<int64_t>(r)) * cuts.cuts] = {found[r][0], found[r][1]};
    });
  }

  // Of channels that are too short for vectors.
  void few_sums(A high, int64_t channels, const T* dz, const T* x_at, Sums* to) const {
    for (int64_t c = 0; c < channels; ++c) {
      Sums sum{};
      for (int64_t i = c * g.S; i < (c + 1) * g.S; ++i) {
        const double dz_i = static_cast<double>(static_cast<A>(dz[i]));
        sum[0] += dz_i;
        sum[1] += dz_i * static_cast<double>(static_cast<A>(x_at[i]) - high);
      }
      to[c] = sum;
    }
  }

  void settle(int64_t m) {
    const A* w = this->weight + this->first_channel(m);
    const double low = static_cast<double>(mean[M + m]), r = static_cast<double>(rstd[m]), n = static_cast<double>(N);
    double sum_g = 0, sum_g_x_hat = 0;
    for (int64_t c = 0; c < g.P; ++c) {
      Sums* of = &sums[(m * g.P + c) * cuts.cuts];
      for (int64_t k = 1; k < cuts.cuts; ++k) of[0][0] += of[k][0], of[0][1] += of[k][1];
      of[0][1] = (of[0][1] - low * of[0][0]) * r;
      sum_g += of[0][0] * static_cast<double>(w[c]);
      sum_g_x_hat += of[0][1] * static_cast<double>(w[c]);
    }
    const double c1_rstd = sum_g_x_hat / n * r;
    constants[m] = {static_cast<A>(c1_rstd), static_cast<A>(sum_g / n - low * c1_rstd)};
  }

  void apply(int64_t m, const Part& part) const {
    const T* dz_of = slopes ? dx : dy;
    this->runs(m, part, [&](int64_t begin, int64_t n, auto w, auto) {
      const V high(mean[m]), r(rstd[m]), c1_rstd(constants[m][0]), c2(constants[m][1]);
      const T *dz = dz_of + m * N + begin, *x_run = x + m * N + begin;
      T* to = dx + m * N + begin;
      for_groups<V, 4>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA {
          const int64_t at = i + static_cast<int64_t>(j) * lanes<V>;
          v[j] = WeightedGradient<T>::value({load(dz + at, count), load(x_run + at, count)},
                                            {high, r, c1_rstd, c2, w(at, count)});
        });
        put_all<T, J>(to + i, v, count, stream);
      });
    });
  }

  void operator()(Array dweight, Array dbias) {
    const int64_t parts = cuts.count;
    const auto passes = [&](int64_t items, int64_t parts_each) {
      const auto pass = [&](const auto& f) { parallel_for(items, 3 * N / parts * parts_each, f); };
      const bool both = parts_each == parts;  // of a group
      pass([&](int64_t begin, int64_t end) {
        const Buffer<T> scratch(slopes && !dx ? PIECE : 0);
        for (int64_t item = begin; item < end; ++item) {
          for (int64_t i = item * parts_each; i < (item + 1) * parts_each; ++i) take_sums(i / parts, i % parts, scratch);
          if (!both) continue;
          settle(item);
          for (int64_t k = parts - 1; dx && k >= 0; --k) apply(item, cuts[k]);
        }
        if (stream) stream_end();
      });
      if (both) return;
      for (int64_t m = 0; m < M; ++m) settle(m);
      if (dx)
        pass([&](int64_t begin, int64_t end) {
          for (int64_t item = end - 1; item >= begin; --item) apply(item / parts, cuts[item % parts]);
          if (stream) stream_end();
        });
    };
    if (this->few())
      passes(M * parts, 1);
    else
      passes(M, parts);
    add_samples(dbias, 0);
    add_samples(dweight, 1);
  }

  // A gradient of a parameter, the sums of all samples in their order.
  void add_samples(Array to, size_t which) const {
    if (!to.data) return;
    std::vector<double> sum(g.C, 0.0);
    for (int64_t b = 0; b < g.B; ++b)
      for (int64_t c = 0; c < g.C; ++c) sum[c] += sums[(b * g.C + c) * cuts.cuts][which];
    set_elements(to, 0, g.C, sum.data());
  }
};

}  // namespace

void group_fwd(Groups g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps, Array y, void* mean,
               void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    GroupForward<T>(g, x, weight, bias, epilogue, eps, as<T>(y.data), mean, rstd)();
  });
}

void group_bwd(Groups g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, const void* mean,
               const void* rstd, Array dx, Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    GroupBackward<T>(g, dy, x, weight, bias, epilogue, mean, rstd, as<T>(dx.data))(dweight, dbias);
  });
}

}  // namespace fastnorm::cpu
