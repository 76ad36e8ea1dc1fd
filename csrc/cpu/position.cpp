// Layer norm over channels and the activation after it: (B, C, S), all dense, with one mean and rstd for the C channels of a
// position.
#include "position.h"

#include "row.h"

namespace fastnorm::cpu {
namespace {

// What both directions are about.
template <class T>
struct PositionNorm {
  using A = Acc<T>;
  using V = Vec<T>;
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

  // The constants that make x_hat of x, for each position of a block.
  struct Standardized {
    OfPositions<A> high, rstd, rest;

    Standardized(const PositionNorm& p, Block k, int64_t n) {
      for (int64_t i = 0; i < k.count; ++i) {
        high[i] = p.mean[k.m + i];
        rstd[i] = p.rstd[k.m + i];
        rest[i] = -(p.mean[p.g.M() + k.m + i] * rstd[i]);
      }
      for (int64_t i = k.count; i < n; ++i) high[i] = rstd[i] = rest[i] = 0;
    }
    template <size_t J>
    FN_INLINE std::array<std::array<V, 3>, J> at(const Place<V, J>& place) const {
      std::array<std::array<V, 3>, J> c;
      repeat<J>([&](auto j) FN_LAMBDA {
        const int64_t i = place.at(j);
        c[j] = {load(&high[i]), load(&rstd[i]), load(&rest[i])};
      });
      return c;
    }
  };
};

template <class T>
struct PositionForward : PositionNorm<T> {
  using Base = PositionNorm<T>;
  using typename Base::A, typename Base::V;
  using Base::g, Base::mean, Base::rstd;
  double eps;
  T* y;
  Blocks<T> blocks;
  bool stream;

  PositionForward(Positions positions, ConstArray in, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps_, T* y_,
                  void* mean_, void* rstd_)
      : Base(positions, in, weight, bias, epilogue, mean_, rstd_),
        eps(eps_),
        y(y_),
        blocks(g, sizeof(T)),
        stream(blocks.streams_to(y, 2 * sizeof(T))) {}

  void operator()() const {
    parallel_for(blocks.count, g.C * blocks.width(), [&](int64_t begin, int64_t end) {
      const Buffer<T> from = blocks.scratch(), to = blocks.scratch();
      for (int64_t i = begin; i < end; ++i) {
        const Block k = blocks[i];
        const int64_t n = blocks.n(k);
        const Plane<const T> in = blocks.read(this->x, k, from);
        const Plane<T> out = blocks.place(y, k, to);
        save(k, Found(*this, in, n));
        apply(in, n, typename Base::Standardized(*this, k, n), out, blocks.ahead(i));
        blocks.write(out, k, y);
      }
      if (stream) stream_end();
    });
  }

  // The moments of the positions of a block.
  struct Found {
    OfPositions<A> shift;
    OfPositions<double> mean, m2;

    Found(const PositionForward& p, const Plane<const T>& in, int64_t n) {
      const int64_t C = p.g.C;
      for_places<V>(n, [&](auto place) FN_LAMBDA {
        repeat<decltype(place)::J>([&](auto j) FN_LAMBDA {
          store(&shift[place.at(j)], near<V>(C, [&](int64_t c) { return load(in[c] + place.at(j)); }));
        });
      });
      if (sum(C, in, n)) return;
      for (int64_t i = 0; i < n; ++i)
        if (too_far(shift[i], get(i, C), DEVIATIONS<T>)) shift[i] = static_cast<A>(mean[i]);
      sum(C, in, n);
      for (int64_t i = 0; i < n; ++i) {
        if (std::isfinite(m2[i])) continue;
        const auto m = moments_in_double(C, [&](int64_t c) { return static_cast<double>(in[c][i]); });
        mean[i] = m.mean, m2[i] = m.m2;
      }
    }
    Moments<double> get(int64_t i, int64_t C) const { return {static_cast<double>(C), mean[i], m2[i]}; }

    // Whether all of them will do.
    bool sum(int64_t C, const Plane<const T>& in, int64_t n) {
      ChannelSums<T> sums;
      for_tiles<V>(C, n, [&](auto place, int64_t c, int64_t end) FN_LAMBDA {
        constexpr size_t J = decltype(place)::J;
        const auto about = place.load(shift.data());
        typename ChannelSums<T>::template Terms<J> s{};
        for (; c < end; ++c) {
          const auto v = place.load(in[c]);
          repeat<J>([&](auto j) FN_LAMBDA {
            const auto t = StatisticsTerms<T>::terms({v[j]}, {about[j]}, lanes<V>);
            add_terms(s, j, t[0], t[1]);
          });
        }
        sums.add(place, s);
      });
      OfPositions<double> of[2];
      sums.get(n, of);
      int64_t unfit = 0;
      for (int64_t i = 0; i < n; ++i) {
        const auto m = moments_about(static_cast<double>(shift[i]), static_cast<double>(C), of[0][i], of[1][i]);
        mean[i] = m.mean, m2[i] = m.m2;
        unfit += !std::isfinite(m.m2) | too_far(static_cast<double>(shift[i]), m, DEVIATIONS<T>) ? 1 : 0;
      }
      return unfit == 0;
    }
  };

  void save(Block k, const Found& found) const {
    OfPositions<double> variance;
    for (int64_t i = 0; i < k.count; ++i) {
      const Pair<A> centre(found.mean[i]);
      mean[k.m + i] = centre.high;
      mean[g.M() + k.m + i] = centre.low;
      variance[i] = found.m2[i] / static_cast<double>(g.C) + eps;
    }
    reciprocal_roots(variance.data(), k.count, rstd + k.m);
  }

  void apply(const Plane<const T>& in, int64_t n, const typename Base::Standardized& s, const Plane<T>& out,
             int64_t ahead) const {
    for_tiles<V>(g.C, n, [&](auto place, int64_t c, int64_t end) FN_LAMBDA {
      constexpr size_t J = decltype(place)::J;
      const auto constants = s.at(place);
      for (; c < end; ++c) {
        const V w(this->weight[c]), b(this->bias[c]);
        auto z = place.load(in[c]);
        place.template fetch<false>(in[c], ahead);
        if (!stream) place.template fetch<true>(out[c], ahead);
        repeat<J>([&](auto j) FN_LAMBDA { z[j] = affine(Standardize<T>::value({z[j]}, constants[j]), w, b); });
        activate_all(this->epilogue, z);
        place.put(out[c], z, stream);
      }
    });
  }
};

template <class T>
struct PositionBackward : PositionNorm<T> {
  using Base = PositionNorm<T>;
  using typename Base::A, typename Base::V, typename Base::Standardized;
  using Base::g;
  const T* dy;
  T* dx;
  bool slopes;  // whether dz is another than dy
  bool parameters;  // whether their gradients are wanted
  Blocks<T> blocks;
  bool stream;
  int64_t each, items;  // blocks whose sums for dbias and dweight are one
  Buffer<double> partial;  // of each item, both sums of one channel after the other

  PositionBackward(Positions positions, ConstArray dy_, ConstArray in, ConstArray weight, ConstArray bias, Epilogue epilogue,
                   const void* mean_, const void* rstd_, T* dx_, bool parameters_)
      : Base(positions, in, weight, bias, epilogue, mean_, rstd_),
        dy(as<T>(dy_.data)),
        dx(dx_),
        slopes(epilogue.activation != Activation::identity),
        parameters(parameters_),
        blocks(g, 2 * sizeof(T) + (slopes && dx ? sizeof(A) : 0)),
        stream(dx && blocks.streams_to(dx, 3 * sizeof(T))),
        each(ceil_div(blocks.count, 64)),
        items(ceil_div(blocks.count, each)),
        partial(parameters ? items * 2 * channels() : 0) {}

  int64_t channels() const { return ceil_div(g.C, 4) * 4; }

  void operator()(Array dweight, Array dbias) const {
    parallel_for(items, 3 * g.C * blocks.width() * each, [&](int64_t begin, int64_t end) {
      const Buffer<T> dy_block = blocks.scratch(), x_block = blocks.scratch(), dx_block = blocks.scratch(dx);
      const Buffer<A> dz(slopes && dx ? g.C * MAX_WIDTH : 0);
      for (int64_t item = begin; item < end; ++item) {
        double* sums = parameters ? partial + item * 2 * channels() : nullptr;
        if (sums) std::fill_n(sums, 2 * channels(), 0.0);
        for (int64_t i = item * each; i < std::min(blocks.count, (item + 1) * each); ++i) {
          const Block k = blocks[i];
          const Plane<T> out = dx ? blocks.place(dx, k, dx_block) : Plane<T>{};
          go(k, {blocks.read(dy, k, dy_block), blocks.read(this->x, k, x_block)}, dz, out, sums, blocks.ahead(i));
          if (dx) blocks.write(out, k, dx);
        }
      }
      if (stream) stream_end();
    });
    add_items(dbias, 0);
    add_items(dweight, 1);
  }

  struct In {
    Plane<const T> dy, x;
  };

  void go(Block k, const In& in, A* dz, const Plane<T>& out, double* sums, int64_t ahead) const {
    const int64_t n = blocks.n(k);
    const Standardized s(*this, k, n);
    const Plane<A> kept{dz, MAX_WIDTH};
    OfPositions<double> of[2];
    const auto take = [&](auto SLOPES, auto PARAMETERS) { take_sums<SLOPES, PARAMETERS>(in, n, s, kept, sums, of); };
    using Yes = std::true_type;
    using No = std::false_type;
    if (slopes)
      sums ? take(Yes{}, Yes{}) : take(Yes{}, No{});
    else
      sums ? take(No{}, Yes{}) : take(No{}, No{});
    if (!dx) return;
    OfPositions<A> c1_rstd, c2;
    for (int64_t i = 0; i < n; ++i) {
      const double r = static_cast<double>(s.rstd[i]), C = static_cast<double>(g.C), c1 = of[1][i] / C;
      c1_rstd[i] = static_cast<A>(c1 * r);
      c2[i] = static_cast<A>(of[0][i] / C + c1 * static_cast<double>(s.rest[i]));
    }
    if (slopes)
      apply(kept, in, n, s, c1_rstd, c2, out, ahead);
    else
      apply(in.dy, in, n, s, c1_rstd, c2, out, ahead);
  }

  // For each position the sums of g = dz * weight and of g * x_hat, and for each channel those of dz and dz * x_hat. Keeps dz
  // for the second sweep, where there is one and it is another than dy.
  template <bool SLOPES, bool PARAMETERS>
  void take_sums(const In& in, int64_t n, const Standardized& s, const Plane<A>& kept, double* sums,
                 OfPositions<double> (&of)[2]) const {
    ChannelSums<T> over_channels;
    V over_positions[PLAIN / 4][8] = {};
    const auto tile = [&](auto place, int64_t first, int64_t end) FN_LAMBDA {
      constexpr size_t J = decltype(place)::J;
      const auto constants = s.at(place);
      typename ChannelSums<T>::template Terms<J> sum{};
      for (int64_t c = first; c < end; ++c) {
        const V w(this->weight[c]);
        auto dz = place.load(in.dy[c]), x_hat = place.load(in.x[c]);
        repeat<J>([&](auto j) FN_LAMBDA { x_hat[j] = Standardize<T>::value({x_hat[j]}, constants[j]); });
        if constexpr (SLOPES) {
          const V b(this->bias[c]);
          std::array<V, J> z;
          repeat<J>([&](auto j) FN_LAMBDA { z[j] = affine(x_hat[j], w, b); });
          grad_all(this->epilogue, dz, z);
          dz = z;
          if (kept.first) repeat<J>([&](auto j) FN_LAMBDA { store(kept[c] + place.at(j), dz[j]); });
        }
        V* beside = &over_positions[(c - first) / 4][(c - first) % 4 * 2];
        V a = place.i == 0 ? V(0) : beside[0], b = place.i == 0 ? V(0) : beside[1];
        repeat<J>([&](auto j) FN_LAMBDA {
          add_terms(sum, j, dz[j] * w, dz[j] * x_hat[j] * w);
          if constexpr (PARAMETERS) {
            const V own = only(dz[j], place.own(j));
            a = a + own;
            b = b + own * x_hat[j];
          }
        });
        if constexpr (PARAMETERS) beside[0] = a, beside[1] = b;
      }
      over_channels.add(place, sum);
    };
    for_tiles<V>(g.C, n, tile, [&](int64_t first, int64_t end) {
      if constexpr (PARAMETERS)
        for (int64_t c = first; c < end; c += 4) {
          double whole[8];
          totals(over_positions[(c - first) / 4], whole);
          for (int64_t i = 0; i < 2 * std::min<int64_t>(4, end - c); ++i) sums[2 * c + i] += whole[i];
        }
    });
    over_channels.get(n, of);
  }

  template <class S>
  void apply(const Plane<S>& dz, const In& in, int64_t n, const Standardized& s, const OfPositions<A>& c1_rstd,
             const OfPositions<A>& c2, const Plane<T>& out, int64_t ahead) const {
    for_tiles<V>(g.C, n, [&](auto place, int64_t c, int64_t end) FN_LAMBDA {
      constexpr size_t J = decltype(place)::J;
      const auto high = place.load(s.high.data()), rstd = place.load(s.rstd.data());
      const auto c1_p = place.load(c1_rstd.data()), c2_p = place.load(c2.data());
      for (; c < end; ++c) {
        const V w(this->weight[c]);
        auto v = place.load(dz[c]);
        const auto x_c = place.load(in.x[c]);
        place.template fetch<false>(in.dy[c], ahead);
        place.template fetch<false>(in.x[c], ahead);
        if (!stream) place.template fetch<true>(out[c], ahead);
        repeat<J>([&](auto j) FN_LAMBDA {
          v[j] = WeightedGradient<T>::value({v[j], x_c[j]}, {high[j], rstd[j], c1_p[j], c2_p[j], w});
        });
        place.put(out[c], v, stream);
      }
    });
  }

  // A gradient of a parameter, the sums of all items in their order.
  void add_items(Array to, int64_t which) const {
    if (!to.data) return;
    std::vector<double> sum(g.C, 0.0);
    for (int64_t item = 0; item < items; ++item)
      for (int64_t c = 0; c < g.C; ++c) sum[c] += partial[item * 2 * channels() + 2 * c + which];
    set_elements(to, 0, g.C, sum.data());
  }
};

// Samples of one position are rows.
RowsInput rows_of(Positions g, ConstArray of) {
  RowsInput in;
  static_cast<ConstArray&>(in) = of;
  in.rows.push(g.B, g.C);
  in.columns.push(g.C, 1);
  return in;
}

}  // namespace

void position_fwd(Positions g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps, Array y,
                  void* mean, void* rstd) {
  if (g.S == 1)
    return row_fused_fwd({g.B, g.C}, rows_of(g, x), ABSENT, ABSENT, weight, bias, epilogue, true, eps, {}, y, mean, rstd);
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    PositionForward<T>(g, x, weight, bias, epilogue, eps, as<T>(y.data), mean, rstd)();
  });
}

void position_bwd(Positions g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                  const void* mean, const void* rstd, Array dx, Array dweight, Array dbias) {
  if (g.S == 1)
    return row_fused_bwd({g.B, g.C}, rows_of(g, dy), ABSENT, rows_of(g, x), ABSENT, weight, bias, epilogue, true, mean, rstd,
                         dx, dweight, dbias, {});
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    PositionBackward<T>(g, dy, x, weight, bias, epilogue, mean, rstd, as<T>(dx.data),
                        dweight.data || dbias.data)(dweight, dbias);
  });
}

}  // namespace fastnorm::cpu
