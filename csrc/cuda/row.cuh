// Rows (M, N): a team of threads to a row. The places of a row's elements in its team depend on N alone, so that its results do
// not depend on where and how the row lies.
#pragma once

#include "row_fused.cuh"

namespace fastnorm::cuda {

// Elements of rows, each thread's in windows of V that follow one another.
template <class T, int V>
struct RowReader {
  Source from;
  Walk rows, columns;  // V > 1: the columns have one stride
  bool whole;          // V > 1: every window lies side by side, at a multiple of 16 bytes

  __device__ __forceinline__ void operator()(Acc<T> (&out)[V], int64_t row, int64_t i) const {
    if (V == 1)
      out[0] = load_one<T>(from, row + columns.offset(i));
    else if (whole)
      load<T, V>(out, from, row + i * V);
    else
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = load_one<T>(from, row + (i * V + j) * columns.stride[0]);
  }
};

template <class T, int V>
struct RowForward {
  static constexpr bool FUSED = false, MASKED = false, centre = true;
  using Begin = int64_t;
  struct Fetched {};
  struct Residual {};

  Rows g;
  int team;
  RowReader<T, V> x;
  Source weight, bias;
  Acc<T> eps;
  Target y;
  Acc<T>*mean, *rstd;

  __device__ __forceinline__ Begin begin(int64_t m, bool inside) const { return inside ? x.rows.offset(m) : 0; }
  __device__ __forceinline__ Fetched fetch(Begin, int64_t) const { return {}; }
  __device__ __forceinline__ Residual fetch_residual(Begin, int64_t) const { return {}; }
  __device__ __forceinline__ void read(Acc<T> (&out)[V], Fetched, Begin row, int64_t i) const { x(out, row, i); }
  __device__ __forceinline__ void read_again(Acc<T> (&out)[V], Begin row, int64_t i) const { x(out, row, i); }
  __device__ static __forceinline__ int64_t part(Begin) { return 0; }
  __device__ __forceinline__ void write(int64_t m, int64_t i, const Acc<T> (&values)[V]) const {
    store<T, V>(y, m * g.N + i * V, values);
  }
};

// f(k, i) for the windows i of a thread: K of them, which the row is not longer than, or, where K is 0, any number.
template <int K, class F>
__device__ __forceinline__ void each_window(int64_t windows, const Team& team, const F& f) {
  if constexpr (K == 0) {
    for (int64_t i = team.lane; i < windows; i += team.size) f(0, i);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = team.lane + k * team.size;
      if (i < windows) f(k, i);
    }
  }
}

// Which elements of K of a thread's windows count, a bit each. Without a mask all do.
template <class P, int V, int K>
struct Counting {
  static constexpr int EACH = 32 / V;  // windows to a register
  const P& p;
  const bool* ones = nullptr;
  unsigned on[K > 0 ? (K + EACH - 1) / EACH : 1] = {};

  __device__ __forceinline__ void begin(int64_t m, bool inside) {
    if constexpr (P::MASKED) ones = inside ? p.mask.row(m) : nullptr;
  }
  __device__ __forceinline__ void look(int k, int64_t i) {
    if constexpr (P::MASKED) {
      const unsigned all = (1u << V) - 1, bits = p.mask.template window<V>(ones, i);
      on[k / EACH] = (on[k / EACH] & ~(all << k % EACH * V)) | bits << k % EACH * V;
    }
  }
  __device__ __forceinline__ bool counts(int k, int j) const { return !P::MASKED || (on[k / EACH] >> (k % EACH * V + j) & 1); }
  // Chosen: what does not count may be no number.
  template <class A>
  __device__ __forceinline__ A only(int k, int j, A value) const {
    return counts(k, j) ? value : 0;
  }
  template <class A>
  __device__ __forceinline__ A count(int k) const {
    A total = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) total += only<A>(k, j, 1);
    return total;
  }
};

// The first sums of a forward's row, and those of a backward's: with a mask, how many columns count is one of them.
template <class P>
constexpr int FORWARD_SUMS = P::MASKED ? 2 : 1;
template <class P>
constexpr int BACKWARD_SUMS = P::MASKED ? 3 : 2;

// K windows of a row are held in registers; K = 0: read again for every pass. What is fused with few of them has blocks in
// pairs, so that one loads while another computes.
template <class T, int V, int K, class P>
__global__ void __launch_bounds__(MOST_THREADS, P::FUSED && K == 1 ? 2 : 1)
    row_fwd_kernel(const __grid_constant__ P p) {
  using A = Acc<T>;
  constexpr int SUMS = FORWARD_SUMS<P>;
  const Team team(p.team);
  A held[K > 0 ? K : 1][V];
  Counting<P, V, K> counting{p};
  A* const place = shared<A>();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * team.rows; first < p.g.M; first += gridDim.x * int64_t{team.rows}) {
    const int64_t m = first + team.row, windows = m < p.g.M ? p.g.N / V : 0;
    const auto row = p.begin(m, windows);
    counting.begin(m, windows);
    A n = static_cast<A>(p.g.N);
    A sum[SUMS] = {};  // of squares, without a centre
    // With a value from the start: without, the last row's stay in registers for this one.
    typename P::Fetched fetched[K > 0 ? K : 1] = {};
    typename P::Residual residual[K > 0 ? K : 1] = {};
    if (K > 0) each_window<K>(windows, team, [&](int k, int64_t i) { fetched[k] = p.fetch(row, i); });
    each_window<K>(windows, team, [&](int k, int64_t i) {
      if (K == 0) fetched[k] = p.fetch(row, i);
      counting.look(k, i);
      p.read(held[k], fetched[k], row, i);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[0] += counting.only(k, j, p.centre ? held[k][j] : held[k][j] * held[k][j]);
      if constexpr (P::MASKED) sum[1] += counting.template count<A>(k);
    });
    if (K > 0) each_window<K>(windows, team, [&](int k, int64_t i) { residual[k] = p.fetch_residual(row, i); });
    team_sum(sum, team.size, place);
    if constexpr (P::MASKED) n = at_least_one(sum[1]);
    const A shift = p.centre ? sum[0] / n : 0;
    const auto squares = [&](A scale, A* at) {
      A s[2] = {0, 0};
      each_window<K>(windows, team, [&](int k, int64_t i) {
        if (K == 0) counting.look(k, i);
        if (K == 0) p.read_again(held[k], row, i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A d = counting.only(k, j, (held[k][j] - shift) * scale);
          s[0] += d;
          s[1] += d * d;
        }
      });
      team_sum(s, team.size, at);
      return p.centre ? about(shift, s[0], s[1], n, scale) : Centred<A>{0, 0, s[1], scale};
    };
    Centred<A> c = p.centre ? squares(1, place + TEAM_SHARED<SUMS>) : Centred<A>{0, 0, sum[0], 1};
    // Rows of a warp decide together, for all of its lanes add up.
    if (__any_sync(ALL_LANES, infinite(c.m2))) {
      const Centred<A> scaled = squares(SCALE, place + TEAM_SHARED<SUMS + 2>);
      if (infinite(c.m2)) c = scaled;
    }
    if (!p.centre) __syncthreads();  // the next row's first sum has the same place
    if constexpr (P::MASKED)
      if (sum[1] == 0) c.m2 = 1;  // and n is 1
    const A rstd = rstd_of(c.m2, n, c.scale, p.eps);
    if (windows && team.lane == 0) {
      p.mean[m] = c.high;
      p.mean[p.g.M + m] = c.low;
      p.rstd[m] = rstd;
    }
    const auto affine_window = [&](int k, int64_t i, A (&z)[V]) {
      if (K == 0) residual[k] = p.fetch_residual(row, i);
      if (K == 0) p.read_again(held[k], row, i);
      A weight[V], bias[V];
      load_or<T, V>(weight, p.weight, p.part(row) + i * V, 1);
      load_or<T, V>(bias, p.bias, p.part(row) + i * V, 0);
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] = affine(normalize(held[k][j], c.high, c.low, rstd), weight[j], bias[j]);
      if constexpr (P::FUSED) p.add_residual(z, residual[k]);
    };
    if constexpr (P::FUSED && K > 0) {
      each_window<K>(windows, team, [&](int k, int64_t i) { affine_window(k, i, held[k]); });
      with_activation(p.activation, [&](auto activation) {
        each_window<K>(windows, team, [&](int k, int64_t) { activate_all(activation, held[k], p.alpha); });
      });
      each_window<K>(windows, team, [&](int k, int64_t i) { p.write(m, i, held[k]); });
    } else {
      each_window<K>(windows, team, [&](int k, int64_t i) {
        A z[V];
        affine_window(k, i, z);
        if constexpr (P::FUSED) with_activation(p.activation, [&](auto activation) { activate_all(activation, z, p.alpha); });
        p.write(m, i, z);
      });
    }
  }
}

template <class T, int V>
struct RowBackward {
  static constexpr bool FUSED = false, MASKED = false, centre = true;
  struct Begin {
    int64_t dy, x;
  };

  Rows g;
  int team;
  RowReader<T, V> dy, x;
  Source weight;
  const Acc<T>*mean, *rstd;
  Acc<T>* means;  // (2, M): c1 and c2, see GIVEN
  T* dx;
  Acc<T>*dweight, *dbias;  // (programs, P * N), or null

  __device__ __forceinline__ Begin begin(int64_t m, bool inside, int64_t) const {
    return {inside ? dy.rows.offset(m) : 0, inside ? x.rows.offset(m) : 0};
  }
  __device__ __forceinline__ BlockRows block_rows(bool) const { return {0, g.M, blockIdx.x, 0, blockIdx.y * g.N}; }
};

// A row's window in a backward.
template <class A, int V>
struct Terms {
  A x_hat[V], dz[V], g[V];

  template <class T, class P>
  __device__ __forceinline__ void load(const P& p, const typename P::Begin& row, int64_t i, A high, A low, A rstd) {
    if constexpr (P::FUSED) {
      p.read(dz, x_hat, g, row, i, high, low, rstd);
    } else {
      p.dy(dz, row.dy, i);
      p.x(x_hat, row.x, i);
      load_or<T, V>(g, p.weight, i * V, 1);
#pragma unroll
      for (int j = 0; j < V; ++j) x_hat[j] = normalize(x_hat[j], high, low, rstd);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] *= dz[j];
  }
};

// c1 and c2 of every row, where a row is too long for the kernel below.
template <class T, int V, class P>
__global__ void __launch_bounds__(MOST_THREADS, 1) row_means_kernel(const __grid_constant__ P p) {
  using A = Acc<T>;
  constexpr int SUMS = BACKWARD_SUMS<P>;
  const Team team(p.team);
  for (int64_t m = blockIdx.x; m < p.g.M; m += gridDim.x) {
    const auto row = p.begin(m, true, part_of(p.g, m));
    Counting<P, V, 1> counting{p};
    counting.begin(m, true);
    A c[SUMS] = {};
    each_window<0>(p.g.N / V, team, [&](int, int64_t i) {
      Terms<A, V> t;
      t.template load<T>(p, row, i, p.mean[m], p.mean[p.g.M + m], p.rstd[m]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        c[0] += t.g[j] * t.x_hat[j];
        c[1] += t.g[j];
      }
      if constexpr (P::MASKED) {
        counting.look(0, i);
        c[2] += counting.template count<A>(0);
      }
    });
    team_sum(c, team.size, shared<A>() + (m / gridDim.x % 2) * TEAM_SHARED<SUMS>);
    if (team.lane == 0) {
      const auto mean = [&](A total) { return total / (P::MASKED ? at_least_one(c[SUMS - 1]) : static_cast<A>(p.g.N)); };
      p.means[m] = mean(c[0]);
      p.means[p.g.M + m] = p.centre ? mean(c[1]) : 0;
    }
  }
}

// HELD: x and dy stay in registers between the row's sums and dx. AGAIN: they are read again, from L1. GIVEN: the sums are
// there, and a block has a chunk of the columns alone.
enum class Way { held, again, given };

// Rows of the block's place along the grid's y, one after another; dweight and dbias stay in registers until the last one. The
// grid's x goes through the chunks of columns of each part of the weight.
template <class T, int V, int K, Way WAY, class P>
__global__ void __launch_bounds__(MOST_THREADS, 1) row_bwd_kernel(const __grid_constant__ P p) {
  using A = Acc<T>;
  constexpr int SUMS = BACKWARD_SUMS<P>;
  const Team team(p.team);
  const BlockRows mine = p.block_rows(WAY == Way::given);
  const int64_t begin = WAY == Way::given ? static_cast<int64_t>(mine.chunk) * team.size * K : 0;
  const int64_t all = p.g.N / V - begin;
  A dweight[K][V] = {}, dbias[K][V] = {};
  Terms<A, V> held[WAY == Way::held ? K : 1];
  Counting<P, V, WAY == Way::held ? K : 1> counting{p};
  int parity = 0;
  for (int64_t first = mine.begin + static_cast<int64_t>(blockIdx.y) * team.rows; first < mine.end;
       first += gridDim.y * int64_t{team.rows}) {
    const int64_t m = first + team.row, windows = m < mine.end ? all : 0;
    const auto row = p.begin(m, windows > 0, mine.part);
    A high = 0, low = 0, rstd = 0, c[SUMS] = {};
    if (windows > 0) high = p.mean[m], low = p.mean[p.g.M + m], rstd = p.rstd[m];
    counting.begin(m, windows > 0);
    const auto window = [&](int k) -> Terms<A, V>& { return held[WAY == Way::held ? k : 0]; };
    const auto read = [&](int k, int64_t i) { window(k).template load<T>(p, row, begin + i, high, low, rstd); };
    // Of every window, once.
    const auto add_up = [&](int k, [[maybe_unused]] int64_t i) {
      const Terms<A, V>& t = window(k);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dweight[k][j] += t.dz[j] * t.x_hat[j];
        dbias[k][j] += t.dz[j];
      }
      if constexpr (P::FUSED)
        if (p.dresidual) store<T, V>(p.dresidual + m * p.g.N + (begin + i) * V, t.dz);
    };
    if (WAY == Way::given) {
      if (windows > 0 && p.dx) c[0] = p.means[m], c[1] = p.means[p.g.M + m];
    } else {
      const auto count = [&](int k, int64_t i) {
        counting.look(k, i);
        if constexpr (P::MASKED) c[2] += counting.template count<A>(k);
      };
      // By itself where reading has few registers to spare.
      if constexpr (P::MASKED && WAY == Way::again) each_window<0>(windows, team, count);
      each_window<K>(windows, team, [&](int k, int64_t i) {
        read(k, i);
        add_up(k, i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          c[0] += window(k).g[j] * window(k).x_hat[j];
          c[1] += window(k).g[j];
        }
        if (WAY == Way::held) count(k, i);
      });
      team_sum(c, team.size, shared<A>() + parity * TEAM_SHARED<SUMS>);
      parity ^= 1;
      const A n = P::MASKED ? at_least_one(c[SUMS - 1]) : static_cast<A>(p.g.N);
      c[0] /= n;
      c[1] = p.centre ? c[1] / n : 0;
    }
    // Where no window has registers of its own, a slope or a mask is long enough to be in a loop.
    each_window<WAY == Way::again && (P::FUSED || P::MASKED) ? 0 : K>(windows, team, [&](int k, int64_t i) {
      if (WAY != Way::held) read(k, i);
      if (WAY == Way::given) add_up(k, i);
      if (!p.dx) return;
      const Terms<A, V>& t = window(k);
      A dx[V];
#pragma unroll
      for (int j = 0; j < V; ++j) dx[j] = grad_input(t.g[j], t.x_hat[j], rstd, c[0], c[1]);
      if (WAY != Way::held) counting.look(0, begin + i);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (!counting.counts(WAY == Way::held ? k : 0, j)) dx[j] = t.g[j] * rstd;
      if constexpr (P::FUSED) p.add_dh(dx, row, begin + i);
      store<T, V>(p.dx + m * p.g.N + (begin + i) * V, dx);
    });
  }
  const auto partial = [&](A (&sum)[K][V], A* to) {
    if (!to) return;
    to += mine.sums + begin * V;
    A* const sums = shared<A>() + 2 * TEAM_SHARED<SUMS>;  // (rows of the block, N)
    if (team.rows > 1) {
      each_window<K>(all, team, [&](int k, int64_t i) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[team.row * p.g.N + i * V + j] = sum[k][j];
      });
      __syncthreads();
      for (int64_t column = threadIdx.x; column < p.g.N; column += blockDim.x) {
        A total = 0, lost = 0;
        for (int r = 0; r < team.rows; ++r) add(total, lost, sums[r * p.g.N + column]);
        to[column] = with_lost(total, lost);
      }
      __syncthreads();
    } else {
      each_window<K>(all, team, [&](int k, int64_t i) { store<A, V>(to + i * V, sum[k]); });
    }
  };
  partial(dweight, p.dweight);
  partial(dbias, p.dbias);
}

}  // namespace fastnorm::cuda
