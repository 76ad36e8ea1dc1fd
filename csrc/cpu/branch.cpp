// A branch onto a stream: dropout and scales of its elements, and the sum; dense rows.
//
// The factors of a piece of a row are made first, in an array that stays in L1: words of a generator become plain vectors
// there.
#include "loops.h"
#include "words.h"

namespace fastnorm::cpu {
namespace {

constexpr int64_t PIECE_OF_ROW = 2048;  // elements of a row at a time
constexpr int64_t ROWS_OF_SUMS = 64;    // rows of which a column is added up in the accumulate dtype

template <class A>
class Factors {
 public:
  Factors(Rows g, const void* row_scale, const void* column_scale, Dropout dropout)
      : g_(g), rows_(as<A>(row_scale)), columns_(as<A>(column_scale)), dropout_(dropout) {}

  // Of elements [n, n + count) of row m, at `out`; without those of the columns where not `whole`.
  void make(int64_t m, int64_t n, int64_t count, bool whole, A* out) const {
    A scale = static_cast<A>(dropout_.scale);
    if (rows_) scale *= rows_[m / (g_.M / g_.P)];
    if (dropout_.seed)
      drop(m * g_.N + n, count, scale, out);
    else
      std::fill_n(out, count, scale);
    if (whole && columns_)
      for (int64_t i = 0; i < count; ++i) out[i] *= columns_[n + i];
  }

 private:
  void drop(int64_t first, int64_t count, A scale, A* out) const {
    constexpr int64_t MANY = 128, FEW = 64;  // words at once: many are made faster, few where so many are not wanted
    const uint64_t seed = static_cast<uint64_t>(*dropout_.seed);
    const uint32_t least = dropout_.least;
    const int64_t end = first + count;
    uint32_t words[MANY];
    for (int64_t at = first / 4 * 4, next; at < end; at = next) {
      const bool many = at + MANY <= end;
      const auto counter = static_cast<uint64_t>(at / 4);
      many ? random_words<MANY / 4>(seed, counter, words) : random_words<FEW / 4>(seed, counter, words);
      next = at + (many ? MANY : FEW);
      for (int64_t i = std::max(at, first); i < std::min(next, end); ++i)
        out[i - first] = words[i - at] >= least ? scale : A(0);
    }
  }

  Rows g_;
  const A *rows_, *columns_;
  Dropout dropout_;
};

// f(m, n, count) for all pieces of rows [begin, end).
template <class F>
void for_pieces(int64_t begin, int64_t end, int64_t N, const F& f) {
  for (int64_t m = begin; m < end; ++m)
    for (int64_t n = 0; n < N; n += PIECE_OF_ROW) f(m, n, std::min(PIECE_OF_ROW, N - n));
}

// f(null pointers to the types of a branch and of a stream).
template <class F>
void with_types(DType branch, DType stream, const F& f) {
  with_type(branch, [&](auto* t) {
    using A = Acc<std::remove_pointer_t<decltype(t)>>;
    if (stream == branch)
      f(t, t);
    else
      f(t, static_cast<A*>(nullptr));
  });
}

}  // namespace

void branch_fwd(Rows g, ConstArray x, ConstArray addend, const void* row_scale, const void* column_scale, Dropout dropout,
                Array h) {
  with_types(x.dtype, addend.dtype, [&](auto* t, auto* a) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const Factors<A> factors(g, row_scale, column_scale, dropout);
    const auto run = [&](auto* to) {
      using H = std::remove_pointer_t<decltype(to)>;
      using V = Vec<T>;
      const bool stream = streams(to, g.N * sizeof(H), g.M * g.N * 3 * sizeof(H));
      parallel_for(g.M, 2 * g.N, [&](int64_t begin, int64_t end) {
        A factor[PIECE_OF_ROW];
        for_pieces(begin, end, g.N, [&](int64_t m, int64_t n, int64_t count) {
          factors.make(m, n, count, true, factor);
          const int64_t first = m * g.N + n;
          const T* from = as<T>(x.data) + first;
          const auto* onto = as<std::remove_pointer_t<decltype(a)>>(addend.data) + first;
          for_groups<V, 4>(count, [&](auto J, int64_t i, int64_t k) FN_LAMBDA {
            std::array<V, J> v;
            repeat<J>([&](auto j) FN_LAMBDA {
              const int64_t at = i + static_cast<int64_t>(j) * lanes<V>;
              v[j] = affine(load(from + at, k), load(factor + at, k), load(onto + at, k));
            });
            put_all<H, J>(to + first + i, v, k, stream);
          });
        });
        if (stream) stream_end();
      });
    };
    if (h.dtype == x.dtype)
      run(as<T>(h.data));
    else
      run(as<A>(h.data));
  });
}

void branch_bwd(Rows g, ConstArray dh, ConstArray x, const void* row_scale, const void* column_scale, Dropout dropout, Array dx,
                Array dcolumn_scale) {
  const int64_t blocks = ceil_div(g.M, ROWS_OF_SUMS);
  with_types(dx.data ? dx.dtype : x.dtype, dh.dtype, [&](auto* t, auto* s) {
    using T = std::remove_pointer_t<decltype(t)>;
    using H = std::remove_pointer_t<decltype(s)>;
    using A = Acc<T>;
    using V = Vec<T>;
    const Factors<A> factors(g, row_scale, column_scale, dropout);
    const A* columns = as<A>(column_scale);
    const Buffer<A> sums(dcolumn_scale.data ? blocks * g.N : 0);
    const bool stream = dx.data && streams(dx.data, g.N * sizeof(T), g.M * g.N * 3 * sizeof(T));
    parallel_for(blocks, 3 * g.N * std::min(g.M, ROWS_OF_SUMS), [&](int64_t begin, int64_t end) {
      A factor[PIECE_OF_ROW];
      if (sums) std::fill(sums + begin * g.N, sums + end * g.N, A(0));
      for_pieces(begin * ROWS_OF_SUMS, std::min(end * ROWS_OF_SUMS, g.M), g.N, [&](int64_t m, int64_t n, int64_t count) {
        factors.make(m, n, count, !sums, factor);
        const H* from = as<H>(dh.data) + m * g.N + n;
        A* sum = sums ? sums + m / ROWS_OF_SUMS * g.N + n : nullptr;
        for_groups<V, 4>(count, [&](auto J, int64_t i, int64_t k) FN_LAMBDA {
          const int64_t first = m * g.N + n + i;
          std::array<V, J> u;
          repeat<J>([&](auto j) FN_LAMBDA {
            const int64_t off = static_cast<int64_t>(j) * lanes<V>, at = i + off;
            u[j] = load(from + at, k) * load(factor + at, k);
            if (sum) {
              store(sum + at, load(sum + at, k) + u[j] * load(as<T>(x.data) + first + off, k), k);
              u[j] = u[j] * load(columns + n + at, k);
            }
          });
          if (dx.data) put_all<T, J>(as<T>(dx.data) + first, u, k, stream);
        });
      });
      if (stream) stream_end();
    });
    if (!sums) return;
    std::vector<double> total(g.N, 0.0);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t n = 0; n < g.N; ++n) total[n] += static_cast<double>(sums[b * g.N + n]);
    set_elements(dcolumn_scale, 0, g.N, total.data());
  });
}

}  // namespace fastnorm::cpu
