// Channels (B, C, S) of which some positions do not count: how their elements are gone through.
//
// Runs of S elements of one channel are read with a mask beside them, which is made once for many channels; what lies before
// the first and after the last position that counts is left out. Rows of a grid, whose columns are channels, count or do not:
// they are taken by lists of the ones and the others. Sums are taken over parts of a fixed size, in their order, whoever takes
// them: the result does not depend on the number of threads.
#pragma once

#include <cstring>

#include "channel_grid.h"
#include "row.h"

namespace fastnorm::cpu {

// dx where a position does not count, from Scale's constant, beside what makes it where it does: x is not looked at.
template <class T>
struct ScaleBeside : OneByOne<T, ScaleBeside<T>> {
  static constexpr size_t P = 2, K = 1;
  using V = Vec<T>;
  FN_INLINE static V value(const std::array<V, 2>& v, const std::array<V, 1>& c) { return Scale<T>::value({v[0]}, c); }
};

// ---------------------------------------------------------------- runs

template <class T, size_t P>
class MaskedRuns {
 public:
  using A = Acc<T>;
  using V = Vec<T>;

  MaskedRuns(Channels g, const Inputs<P>& in, const bool* mask) : g_(g), in_(in), mask_(mask) {
    positions_ = std::min(g.S, ceil_div(g.S, ceil_div(g.S, MOST) * LINE) * LINE);
    cuts_ = ceil_div(g.S, positions_);
    each_ = ceil_div(g.B * cuts_, MOST_ITEMS);
    items_ = ceil_div(g.B * cuts_, each_);
    chunks_ = ceil_div(g.C, CHANNELS);
  }

  static bool serves(Channels g, const Inputs<P>& in) {
    return !g.last && g.S >= 16 && std::all_of(in.begin(), in.end(), [](const auto* x) { return x->space.dense(); });
  }

  // Calls settle(c, sums) for every channel with the sums of d = x - shift and of d * d, as often as it returns false.
  template <class Settle>
  void sum(const A* shift, const Settle& settle) const {
    std::vector<Pair2> partial(items_ * g_.C);
    std::vector<char> settled(g_.C, 0);
    for (bool open = true; open;) {
      for_parts([&](int64_t item, int64_t channel, int64_t channels, Mask& mask) {
        const char* done = settled.data() + channel;
        if (std::all_of(done, done + channels, [](char c) { return c != 0; })) return;
        item_sums(item, channel, channels, shift, mask, partial.data() + item * g_.C + channel);
      });
      open = false;
      for (int64_t c = 0; c < g_.C; ++c) {
        Pair2 sums{};
        for (int64_t item = 0; item < items_; ++item) add(sums, partial[item * g_.C + c]);
        settled[c] = settled[c] || settle(c, sums);
        open = open || !settled[c];
      }
    }
  }

  void apply(const Constants<A, 5>& constants, const Constants<A, 1>& scale, T* out) const {
    const int64_t run = g_.S * static_cast<int64_t>(sizeof(T));
    const bool stream = streams(out, run, g_.B * g_.C * run * static_cast<int64_t>(P + 1));
    for_parts([&](int64_t item, int64_t channel, int64_t channels, Mask& mask) {
      for (int64_t unit = item * each_; unit < std::min((item + 1) * each_, g_.B * cuts_); ++unit) {
        const Part w = part(unit);
        mask.set(mask_ + w.b * g_.S + w.s, w.positions, false);
        for (int64_t c = channel; c < channel + channels; ++c) apply_run(w, c, mask, constants, scale, out, stream);
      }
      if (stream) stream_end();
    });
  }

 private:
  using Pair2 = std::array<double, 2>;
  static constexpr int64_t MOST = 4096, LINE = 64;  // positions of a part, what it is a multiple of
  static constexpr int64_t MOST_ITEMS = 64, CHANNELS = 64;

  static void add(Pair2& sums, const Pair2& more) {
    for (int q = 0; q < 2; ++q) sums[q] += more[q];
  }

  struct Part {
    int64_t b, s, positions;
  };
  Part part(int64_t unit) const {
    const int64_t s = unit % cuts_ * positions_;
    return {unit / cuts_, s, std::min(positions_, g_.S - s)};
  }

  // A word of ones beside what counts, zeros beside the rest; `begin` to `end` is where something counts, in whole lines.
  struct Mask {
    Buffer<A> ones{MOST + LINE};
    Buffer<T> same{LOT<T> > 1 ? MOST : 0};
    int64_t begin = 0, end = 0;

    void set(const bool* mask, int64_t n, bool in_order_of_lots) {
      const bool* last = mask + n;
      while (last > mask && !last[-1]) --last;
      begin = (std::find(mask, last, true) - mask) / LINE * LINE;
      end = std::min(n, ceil_div(last - mask, LINE) * LINE);
      if (end <= begin) return;
      const auto* bytes = reinterpret_cast<const uint8_t*>(mask);  // of which vectors become: gcc would branch at each bool
      for (int64_t i = begin; i < end; ++i) ones[i] = static_cast<A>(static_cast<int32_t>(bytes[i]));
      std::fill_n(ones + end, lanes<V>, A(0));
      if (LOT<T> > 1 && in_order_of_lots) {
        for_vectors<V>(end - begin, [&](int64_t i, int64_t n) { store(same + i, load(ones + begin + i, n), n); });
        in_lots<T>(static_cast<const T*>(same), end - begin, ones + begin);
      }
      for (int64_t i = begin; i < end; i += lanes<V>) store(ones + i, load(ones + i) != V(0));
    }
  };

  // f(item, channel, channels, a thread's mask) for all parts of the work.
  template <class F>
  void for_parts(const F& f) const {
    const int64_t elements = each_ * positions_ * std::min(CHANNELS, g_.C) * static_cast<int64_t>(P);
    parallel_for(items_ * chunks_, elements, [&](int64_t begin, int64_t end) {
      Mask mask;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i % chunks_ * CHANNELS;
        f(i / chunks_, channel, std::min(CHANNELS, g_.C - channel), mask);
      }
    });
  }

  std::array<const T*, P> place(const Part& w, int64_t c) const {
    std::array<const T*, P> at;
    for (size_t p = 0; p < P; ++p) at[p] = data<T>(*in_[p]) + w.b * in_[p]->sample + c * in_[p]->channel + w.s;
    return at;
  }

  // f(terms) with what is added up over R channels.
  template <size_t R, class F>
  static void with_terms(const A* shift, const A* counts, const F& f) {
    std::array<V, R> about;
    for (size_t r = 0; r < R; ++r) about[r] = V(shift[r]);
    if constexpr (PLAIN_FIRST<T>)
      if (std::all_of(shift, shift + R, [](A a) { return a == 0; }))
        return f([counts](auto r, int64_t i, int64_t count, const std::array<V, 1>& v) FN_LAMBDA {
          return typename StatisticsTerms<T>::Plain{}(r, i, count, {v[0] & load(counts + i)});
        });
    // What does not count becomes the shift; so does what does not exist.
    f([about, counts](auto r, int64_t i, int64_t, const std::array<V, 1>& v) FN_LAMBDA {
      return StatisticsTerms<T>::terms({V::blendv(about[r], v[0], load(counts + i))}, {about[r]}, lanes<V>);
    });
  }

  void item_sums(int64_t item, int64_t channel, int64_t channels, const A* shift, Mask& mask, Pair2* out) const {
    std::fill_n(out, channels, Pair2{});
    for (int64_t unit = item * each_; unit < std::min((item + 1) * each_, g_.B * cuts_); ++unit) {
      const Part w = part(unit);
      mask.set(mask_ + w.b * g_.S + w.s, w.positions, true);
      const int64_t begin = mask.begin, n = mask.end - begin;
      if (n <= 0) continue;
      for_sums(n, channels, [&](auto R, auto CHAINS, int64_t k) {
        std::array<std::array<const T*, 1>, R> at;
        double sums[R][2];
        for (size_t r = 0; r < R; ++r) at[r] = {place(w, channel + k + static_cast<int64_t>(r))[0] + begin};
        with_terms<R>(shift + channel + k, mask.ones + begin,
                      [&](const auto& terms) { sum_up<2, CHAINS>(at, n, terms, sums); });
        for (size_t r = 0; r < R; ++r) add(out[k + static_cast<int64_t>(r)], {sums[r][0], sums[r][1]});
      });
    }
  }

  // As for_groups, but the last vector is a whole one, part of which comes out once more, where there are so many elements.
  template <class F>
  FN_INLINE static void for_overlapping(int64_t n, const F& f) {
    constexpr int64_t W = lanes<V>;
    constexpr std::integral_constant<size_t, 1> one;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) f(std::integral_constant<size_t, 4>{}, i, W);
    for (; i + W <= n; i += W) f(one, i, W);
    if (i < n) n < W ? f(one, i, n - i) : f(one, n - W, W);
  }

  void apply_run(const Part& w, int64_t c, const Mask& mask, const Constants<A, 5>& constants, const Constants<A, 1>& scale,
                 T* out, bool stream) const {
    std::array<V, 5> gradient;
    repeat<5>([&](auto k) FN_LAMBDA { gradient[k] = V(constants[k][c]); });
    const std::array<V, 1> factor{V(scale[0][c])};
    const auto [dy, x] = place(w, c);
    T* to = out + (w.b * g_.C + c) * g_.S + w.s;
    const auto outside = [&, dy = dy](int64_t begin, int64_t end) FN_LAMBDA {
      for_overlapping(end - begin, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA {
          v[j] = Scale<T>::value({load(dy + begin + i + static_cast<int64_t>(j) * lanes<V>, count)}, factor);
        });
        put_all<T, J>(to + begin + i, v, count, stream);
      });
    };
    const int64_t begin = std::min(mask.begin, mask.end), end = mask.end;
    outside(0, begin);
    for_overlapping(end - begin, [&, dy = dy, x = x](auto J, int64_t i, int64_t count) FN_LAMBDA {
      std::array<V, J> v;
      repeat<J>([&](auto j) FN_LAMBDA {
        const int64_t k = begin + i + static_cast<int64_t>(j) * lanes<V>;
        const V dy_k = load(dy + k, count);
        v[j] = V::blendv(Scale<T>::value({dy_k}, factor), WeightedGradient<T>::value({dy_k, load(x + k, count)}, gradient),
                         load(mask.ones + k));
      });
      put_all<T, J>(to + begin + i, v, count, stream);
    });
    outside(end, w.positions);
  }

  Channels g_;
  Inputs<P> in_;
  const bool* mask_;
  int64_t positions_, cuts_, each_, items_, chunks_;
};

// ---------------------------------------------------------------- rows of a grid

template <class T, size_t P>
class MaskedGrid : GridSweep<T, P> {
 public:
  using Base = GridSweep<T, P>;
  using typename Base::A, typename Base::V;

  MaskedGrid(Channels g, const Inputs<P>& in, const bool* mask) : Base(g, in, true), mask_(mask) {}

  // As that of MaskedRuns.
  template <class Settle>
  void sum(const A* shift, const Settle& settle) const {
    const int64_t C = this->g_.C;
    const Buffer<double> partial(this->pieces_ * 2 * C);
    std::vector<char> settled(C, 0);
    for (bool open = true; open;) {
      for_parts([&](const Tiles& tiles, int64_t piece, const Block& k) {
        double* s = partial + piece * 2 * C + k.column;
        piece_sums(tiles, piece, k, shift + k.channel, s, s + C);
      });
      std::vector<double> sums(2 * C, 0.0);
      for (int64_t piece = 0; piece < this->pieces_; ++piece)
        for (int64_t i = 0; i < 2 * C; ++i) sums[i] += partial[piece * 2 * C + i];
      open = !this->settle_all(0, C, sums.data(), sums.data() + C, settled, settle);
    }
  }

  void apply(const Constants<A, 5>& constants, const Constants<A, 1>& scale, T* out) const {
    const bool stream = this->streams_to(out);
    for_parts([&](const Tiles& tiles, int64_t piece, const Block& k) {
      for_lists(piece, [&](int64_t row, int64_t rows, const List& counts, const List& others) {
        for (size_t p = 0; p < P; ++p) fetch(tiles, p, row, rows, k);
        apply_list(WeightedGradient<T>{}, counts, constants, tiles, row, k, out, stream);
        apply_list(ScaleBeside<T>{}, others, scale, tiles, row, k, out, stream);
        if (!this->direct_out_) this->put(tiles.tile[P], row, rows, k, out);
      });
      if (stream) stream_end();
    });
  }

 private:
  using typename Base::Block, typename Base::Order, typename Base::Tiles;

  // Rows of a tile.
  struct List {
    int64_t n = 0;
    std::array<int64_t, TURNED_ROWS> row;
    void add(int64_t i) { row[n++] = i; }
  };

  // f(std::integral_constant<size_t, R>, R rows of the list, how many came before), with R of them at a time.
  template <class F>
  void for_rows(const List& list, const F& f) const {
    const Order order{0, this->read_in_place_ ? this->quarter(list.n) : 0};
    const auto some = [&](auto R, int64_t i) {
      std::array<int64_t, R> rows;
      for (size_t r = 0; r < R; ++r) rows[r] = list.row[order(i + static_cast<int64_t>(r))];
      f(R, rows, i);
    };
    int64_t i = 0;
    for (; i + 4 <= list.n; i += 4) some(std::integral_constant<size_t, 4>{}, i);
    for (; i < list.n; ++i) some(std::integral_constant<size_t, 1>{}, i);
  }

  template <class F>
  void for_parts(const F& f) const {
    parallel_for(this->pieces_ * this->blocks_, this->elements(this->piece_ * this->width_), [&](int64_t begin, int64_t end) {
      const Tiles tiles(*this);
      for (int64_t item = begin; item < end; ++item)
        f(tiles, item / this->blocks_, this->block(item % this->blocks_));
    });
  }

  // f(first row, rows, those that count, the others) for the tiles of a piece.
  template <class F>
  void for_lists(int64_t piece, const F& f) const {
    const int64_t end = std::min((piece + 1) * this->piece_, this->rows_);
    for (int64_t row = piece * this->piece_; row < end; row += TURNED_ROWS) {
      const int64_t rows = std::min(TURNED_ROWS, end - row);
      List lists[2];
      for (int64_t i = 0; i < rows; ++i) lists[mask_[row + i]].add(i);
      f(row, rows, lists[1], lists[0]);
    }
  }

  void fetch(const Tiles& tiles, size_t p, int64_t row, int64_t rows, const Block& k) const {
    if (!this->direct_[p]) Base::fetch(p, row, rows, k, tiles.tile[p]);
  }
  const T* place(const Tiles& tiles, size_t p, int64_t row, int64_t i, const Block& k) const {
    return this->direct_[p] ? this->row(p, row + i, k.column) : tiles.tile[p] + i * TURNED_COLUMNS;
  }

  // The sums of one piece of rows, in s and q.
  void piece_sums(const Tiles& tiles, int64_t piece, const Block& k, const A* shift, double* s, double* q) const {
    const bool plain = PLAIN_FIRST<T> && std::all_of(shift, shift + k.columns, [](A a) { return a == 0; });
    alignas(64) A tile[2][MAX_COLUMNS];
    std::fill_n(s, k.columns, 0.0);
    std::fill_n(q, k.columns, 0.0);
    for_lists(piece, [&](int64_t row, int64_t rows, const List& counts, const List&) {
      if (counts.n > 0) fetch(tiles, 0, row, rows, k);
      for_rows(counts, [&](auto R, const auto& list, int64_t i) {
        std::array<std::array<const T*, 1>, R> at;
        for (size_t r = 0; r < R; ++r) at[r] = {place(tiles, 0, row, list[r], k)};
        const int64_t end = i + static_cast<int64_t>(R);
        const bool first = i % TILE_ROWS == 0;
        if (plain)
          Base::template add_rows<StatisticsTerms<T>, PLAIN_FIRST<T>, R>(at, k.columns, first, {shift}, tile[0], tile[1]);
        else
          Base::template add_rows<StatisticsTerms<T>, false, R>(at, k.columns, first, {shift}, tile[0], tile[1]);
        if (end % TILE_ROWS != 0 && end != counts.n) return;
        for (int64_t c = 0; c < k.columns; ++c) s[c] += tile[0][c], q[c] += tile[1][c];
      });
    });
  }

  template <class Value>
  void apply_list(const Value& value, const List& list, const Constants<A, Value::K>& constants, const Tiles& tiles,
                  int64_t row, const Block& k, T* out, bool stream) const {
    const auto expanded = Base::template columns<Value::K, LOTS_STORED<T>>(k, constants);
    for_rows(list, [&](auto R, const auto& rows, int64_t) {
      std::array<std::array<const T*, P>, R> at;
      std::array<T*, R> to;
      for (size_t r = 0; r < R; ++r) {
        for (size_t p = 0; p < P; ++p) at[r][p] = place(tiles, p, row, rows[r], k);
        to[r] = this->direct_out_ ? out + (row + rows[r]) * this->columns_ + k.column
                                  : tiles.tile[P] + rows[r] * TURNED_COLUMNS;
      }
      Base::template apply_rows<Value, R>(value, at, k.columns, expanded.all(), to, stream);
    });
  }

  const bool* mask_;
};

// f(sweep) with the way to go through these inputs.
template <class T, size_t P, class F>
void with_masked_sweep(Channels g, const Inputs<P>& in, const bool* mask, const F& f) {
  if (MaskedRuns<T, P>::serves(g, in)) return f(MaskedRuns<T, P>(g, in, mask));
  f(MaskedGrid<T, P>(g, in, mask));
}

}  // namespace fastnorm::cpu
