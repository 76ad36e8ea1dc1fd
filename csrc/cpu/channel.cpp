// Channels (B, C, S): batch norm on the CPU, dense (B, C, S) or dense (B, S, C).
//
// Every sum is taken over pieces of a fixed size (about 16384 elements, which stay in cache between the two passes over them)
// and the pieces are added in their order, so that the result does not depend on the number of threads.
#include "loops.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t PIECE = 16384;

// How a channel's elements are cut: `samples` runs of up to `positions` elements, or, channels last, `samples` rows.
struct Split {
  int64_t samples, positions, sample_pieces, position_pieces;
  explicit Split(Channels g) {
    const int64_t runs = g.last ? g.B * g.S : g.B, length = g.last ? 1 : g.S, width = g.last ? g.C : g.S;
    positions = std::min(length, PIECE);
    samples = std::clamp<int64_t>(PIECE / width, g.last ? 16 : 1, g.last ? 1024 : PIECE);
    samples = std::min(samples, runs);
    sample_pieces = ceil_div(runs, samples);
    position_pieces = ceil_div(length, positions);
  }
  int64_t pieces() const { return sample_pieces * position_pieces; }
};

// f(p, channel, runs, n, piece) for every piece of every channel of a dense (B, C, S): p is the offset of the piece.
template <class F>
void for_runs(Channels g, const Split& split, const F& f) {
  const int64_t pieces = split.pieces();
  parallel_for(g.C * pieces, split.samples * split.positions, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / pieces, piece = item % pieces;
      const int64_t b = piece / split.position_pieces * split.samples, s = piece % split.position_pieces * split.positions;
      f((b * g.C + c) * g.S + s, c, std::min(split.samples, g.B - b), std::min(split.positions, g.S - s), piece);
    }
  });
}

// f(J, p, c, count, rows, piece) for every piece and tile of channels of a dense (B, S, C). A tile is J = 4 whole vectors, so
// that a row's bytes are read by the line, or at the end J = 1 vector of which `count` lanes exist.
template <class V, class F>
void for_columns(Channels g, const Split& split, const F& f) {
  constexpr int64_t W = lanes<V>;
  parallel_for(split.sample_pieces, split.samples * g.C, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece * split.samples, rows = std::min(split.samples, g.B * g.S - row);
      int64_t c = 0;
      for (; c + 4 * W <= g.C; c += 4 * W) f(std::integral_constant<int, 4>{}, row * g.C + c, c, W, rows, piece);
      for (; c < g.C; c += W) f(std::integral_constant<int, 1>{}, row * g.C + c, c, std::min(W, g.C - c), rows, piece);
    }
  });
}

// Sums over rows of K quantities for J vectors of channels, lane by lane: f(row, j) -> std::array<V, K>.
template <class V, size_t K, int J, class F>
std::array<std::array<Sum<V>, K>, J> column_sums(int64_t rows, const F& f) {
  std::array<std::array<Sum<V>, K>, J> total;
  for (int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < J; ++j) {
      const std::array<V, K> t = f(r, j);
      for (size_t k = 0; k < K; ++k) total[j][k].add(t[k]);
    }
  return total;
}

// f(offset, count, coefficients) over every element; the K coefficients are arrays over the channels.
template <class V, size_t K, class F>
void for_elements(Channels g, const std::array<const typename V::value_type*, K>& coefficients, const F& f) {
  if (g.last)
    return parallel_for(g.B * g.S, g.C, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for_vectors<V>(g.C, [&](int64_t c, int64_t count) {
          std::array<V, K> v;
          for (size_t k = 0; k < K; ++k) v[k] = load(coefficients[k] + c, count);
          f(row * g.C + c, count, v);
        });
    });
  parallel_for(g.B * g.C, g.S, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      std::array<V, K> v;
      for (size_t k = 0; k < K; ++k) v[k] = V(coefficients[k][run % g.C]);
      for_vectors<V>(g.S, [&](int64_t i, int64_t count) { f(run * g.S + i, count, v); });
    }
  });
}

template <class T>
std::vector<Moments<double>> stats(Channels g, const T* x) {
  using A = Acc<T>;
  using V = Vec<T>;
  const Split split(g);
  const int64_t pieces = split.pieces();
  std::vector<Moments<double>> partial(g.C * pieces);
  const auto columns = [&](auto J, int64_t p, int64_t c, int64_t count, int64_t rows, int64_t piece) {
    constexpr int64_t W = lanes<V>;
    const auto at = [&](int64_t r, int j) { return load(x + p + r * g.C + j * W, count); };
    V high[J];  // only numbers near the means: what they miss is in the sums about them
    for (auto& v : high) v = V(0);
    for (int64_t r = 0; r < rows; ++r)
      for (int j = 0; j < J; ++j) high[j] = high[j] + at(r, j);
    for (auto& v : high) v = v / V(static_cast<A>(rows));
    const auto s = column_sums<V, 2, J>(rows, [&](int64_t r, int j) {
      const V d = at(r, j) - high[j];
      return std::array<V, 2>{d, d * d};
    });
    for (int j = 0; j < J; ++j) {
      A h[W];
      double d[W], dd[W];
      high[j].store(h);
      s[j][0].store(d);
      s[j][1].store(dd);
      for (int64_t k = 0; k < count; ++k)
        partial[(c + j * W + k) * pieces + piece] = std::isfinite(dd[k])
                                                        ? moments_about(static_cast<double>(rows), h[k], d[k], dd[k])
                                                        : moments_in_double(x + p + j * W + k, 1, 0, rows, g.C);
    }
  };
  if (g.last)
    for_columns<V>(g, split, columns);
  else
    for_runs(g, split, [&](int64_t p, int64_t c, int64_t runs, int64_t n, int64_t piece) {
      partial[c * pieces + piece] = moments_of(x + p, runs, g.C * g.S, n);
    });
  std::vector<Moments<double>> total(g.C);
  for (int64_t c = 0; c < g.C; ++c) {
    total[c] = partial[c * pieces];
    for (int64_t k = 1; k < pieces; ++k) total[c] = merge(total[c], partial[c * pieces + k]);
  }
  return total;
}

// (sum_dz, sum_dz_x_hat) of each channel. rstd is one factor of a whole channel, so it is multiplied in once, at the end.
template <class T>
std::vector<std::array<double, 2>> sums(Channels g, const T* dy, const T* x, const Acc<T>* mean, const Acc<T>* rstd) {
  using V = Vec<T>;
  const Split split(g);
  const int64_t pieces = split.pieces();
  std::vector<std::array<double, 2>> partial(g.C * pieces), total(g.C);
  const auto term = [&](int64_t p, int64_t count, V high, V low) {
    const V dz = load(dy + p, count);
    return std::array<V, 2>{dz, dz * centre(load(x + p, count), high, low)};
  };
  if (g.last)
    for_columns<V>(g, split, [&](auto J, int64_t p, int64_t c, int64_t count, int64_t rows, int64_t piece) {
      constexpr int64_t W = lanes<V>;
      V high[J], low[J];
      for (int j = 0; j < J; ++j) {
        high[j] = load(mean + c + j * W, count);
        low[j] = load(mean + g.C + c + j * W, count);
      }
      const auto s =
          column_sums<V, 2, J>(rows, [&](int64_t row, int j) { return term(p + row * g.C + j * W, count, high[j], low[j]); });
      for (int j = 0; j < J; ++j) {
        double dz[W], dz_centred[W];
        s[j][0].store(dz);
        s[j][1].store(dz_centred);
        for (int64_t k = 0; k < count; ++k) partial[(c + j * W + k) * pieces + piece] = {dz[k], dz_centred[k]};
      }
    });
  else
    for_runs(g, split, [&](int64_t p, int64_t c, int64_t runs, int64_t n, int64_t piece) {
      const V high(mean[c]), low(mean[g.C + c]);
      partial[c * pieces + piece] =
          sums_over<V, 2>(runs, g.C * g.S, n, [&](int64_t i, int64_t count) { return term(p + i, count, high, low); });
    });
  for (int64_t c = 0; c < g.C; ++c) {
    for (int64_t k = 0; k < pieces; ++k)
      for (int q = 0; q < 2; ++q) total[c][q] += partial[c * pieces + k][q];
    total[c][1] *= static_cast<double>(rstd[c]);
  }
  return total;
}

template <class T>
void apply(Channels g, const T* x, const Acc<T>* mean, const Acc<T>* rstd, const Acc<T>* weight, const Acc<T>* bias, T* y) {
  using V = Vec<T>;
  for_elements<V, 5>(g, {mean, mean + g.C, rstd, weight, bias}, [&](int64_t p, int64_t count, const std::array<V, 5>& k) {
    store(y + p, affine(normalize(load(x + p, count), k[0], k[1], k[2]), k[3], k[4]), count);
  });
}

template <class T>
void grad(Channels g, const T* dy, const T* x, const Acc<T>* mean, const Acc<T>* rstd, const Acc<T>* weight, const Acc<T>* c1,
          const Acc<T>* c2, T* dx) {
  using V = Vec<T>;
  const std::array<const Acc<T>*, 6> coefficients{mean, mean + g.C, rstd, weight, c1, c2};
  for_elements<V, 6>(g, coefficients, [&](int64_t p, int64_t count, const std::array<V, 6>& k) {
    const V x_hat = normalize(load(x + p, count), k[0], k[1], k[2]);
    store(dx + p, grad_input(load(dy + p, count) * k[3], x_hat, k[2], k[4], k[5]), count);
  });
}

// In evaluation mean and rstd are constants, and x is not read: what is not finite in it stays out of dx.
template <class T>
void grad_of_constants(Channels g, const T* dy, const Acc<T>* rstd, const Acc<T>* weight, T* dx) {
  using V = Vec<T>;
  for_elements<V, 2>(g, {rstd, weight}, [&](int64_t p, int64_t count, const std::array<V, 2>& k) {
    store(dx + p, load(dy + p, count) * k[1] * k[0], count);
  });
}

template <class A>
void set_pair(A* mean, int64_t C, int64_t c, double value) {
  const Pair<A> pair(value);
  mean[c] = pair.high;
  mean[C + c] = pair.low;
}

void update(Array running, int64_t c, double value, double momentum) {
  if (running.data) set_element(running, c, (1 - momentum) * element(running, c) + momentum * value);
}

template <class T>
T* as(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

}  // namespace

void channel_stats(Channels g, ConstArray x, void* mean, void* deviation) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto moments = stats<T>(g, as<T>(x.data));
    for (int64_t c = 0; c < g.C; ++c) {
      set_pair(as<A>(mean), g.C, c, moments[c].mean);
      as<A>(deviation)[c] = static_cast<A>(std::sqrt(moments[c].m2 / moments[c].n));
    }
  });
}

void channel_apply(Channels g, ConstArray x, const void* mean, const void* rstd, ConstArray weight, ConstArray bias, Array y) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Widened<A> w(weight, g.C, 1), b(bias, g.C, 0);
    apply<T>(g, as<T>(x.data), as<A>(mean), as<A>(rstd), w, b, as<T>(y.data));
  });
}

void channel_sums(Channels g, ConstArray dy, ConstArray x, const void* mean, const void* rstd, void* sum_dz,
                  void* sum_dz_x_hat) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto s = sums<T>(g, as<T>(dy.data), as<T>(x.data), as<A>(mean), as<A>(rstd));
    for (int64_t c = 0; c < g.C; ++c) {
      as<A>(sum_dz)[c] = static_cast<A>(s[c][0]);
      as<A>(sum_dz_x_hat)[c] = static_cast<A>(s[c][1]);
    }
  });
}

void channel_grad(Channels g, ConstArray dy, ConstArray x, const void* mean, const void* rstd, ConstArray weight,
                  const void* c1, const void* c2, Array dx) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Widened<A> w(weight, g.C, 1);
    if (c1)
      grad<T>(g, as<T>(dy.data), as<T>(x.data), as<A>(mean), as<A>(rstd), w, as<A>(c1), as<A>(c2), as<T>(dx.data));
    else
      grad_of_constants<T>(g, as<T>(dy.data), as<A>(rstd), w, as<T>(dx.data));
  });
}

void channel_fwd(Channels g, ConstArray x, ConstArray weight, ConstArray bias, Array running_mean, Array running_var,
                 bool training, double momentum, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto moments = training ? stats<T>(g, as<T>(x.data)) : std::vector<Moments<double>>{};
    for (int64_t c = 0; c < g.C; ++c) {
      const double m = training ? moments[c].mean : element(running_mean, c);
      const double var = training ? moments[c].m2 / moments[c].n : element(running_var, c);
      set_pair(as<A>(mean), g.C, c, m);
      as<A>(rstd)[c] = static_cast<A>(1.0 / std::sqrt(var + eps));
      if (training) {
        update(running_mean, c, m, momentum);
        update(running_var, c, moments[c].m2 / (moments[c].n - 1), momentum);
      }
    }
    channel_apply(g, x, mean, rstd, weight, bias, y);
  });
}

void channel_bwd(Channels g, ConstArray dy, ConstArray x, ConstArray weight, const void* mean, const void* rstd, bool training,
                 Array dx, Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    std::vector<A> c1(g.C), c2(g.C);
    const Widened<A> w(weight, g.C, 1);
    if ((training && dx.data) || dweight.data || dbias.data) {
      const auto s = sums<T>(g, as<T>(dy.data), as<T>(x.data), as<A>(mean), as<A>(rstd));
      for (int64_t c = 0; c < g.C; ++c) {
        if (dweight.data) set_element(dweight, c, s[c][1]);
        if (dbias.data) set_element(dbias, c, s[c][0]);
        if (training) {
          c1[c] = static_cast<A>(w[c] * s[c][1] / g.count());
          c2[c] = static_cast<A>(w[c] * s[c][0] / g.count());
        }
      }
    }
    if (dx.data) channel_grad(g, dy, x, mean, rstd, weight, training ? c1.data() : nullptr, training ? c2.data() : nullptr, dx);
  });
}

}  // namespace fastnorm::cpu
