// Channels whose positions lie side by side, (B, C, S) with long S: runs of S elements, each of one channel.
//
// A channel's sums are taken over pieces of a fixed size, in their order, whoever takes them: the result does not depend on the
// number of threads. Where a channel stays in cache and there are enough of them, both passes over it follow each other.
#pragma once

#include "channel_ops.h"

namespace fastnorm::cpu {

template <class T, size_t P>
class RunSweep {
 public:
  using A = Acc<T>;
  using V = Vec<T>;
  using Pair2 = std::array<double, 2>;

  RunSweep(Channels g, const Inputs<P>& in) : g_(g), in_(in) {
    positions_ = std::min(g.S, PIECE);
    samples_ = std::clamp<int64_t>(PIECE / g.S, 1, g.B);
    position_pieces_ = ceil_div(g.S, positions_);
    pieces_ = position_pieces_ * ceil_div(g.B, samples_);
  }

  static bool serves(Channels g, const Inputs<P>& in) {
    return !g.last && g.S >= 16 && std::all_of(in.begin(), in.end(), [](const auto* x) { return x->space.dense(); });
  }

  template <class Terms, class Settle>
  void sum(A* shift, const Settle& settle) const {
    std::vector<Pair2> partial(g_.C * pieces_);
    for (int64_t c = 0; Terms::GUESS && c < g_.C; ++c) shift[c] = guess(c);
    parallel_for(g_.C * pieces_, elements(samples_ * positions_), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        partial[item] = piece_sums<Terms>(item / pieces_, item % pieces_, shift[item / pieces_]);
    });
    for (int64_t c = 0; c < g_.C; ++c) {
      Pair2 sums{};
      for (int64_t k = 0; k < pieces_; ++k) add(sums, partial[c * pieces_ + k]);
      while (!settle(c, sums)) sums = channel_sums<Terms>(c, shift[c]);
    }
  }

  template <class Value>
  void apply(const Constants<A, Value::K>& constants, T* out) const {
    const bool stream = streams_to(out);
    parallel_for(g_.C * pieces_, elements(samples_ * positions_), [&](int64_t begin, int64_t end) {
      for (int64_t item = end - 1; item >= begin; --item)  // what was read last is in cache
        apply_piece<Value>(item / pieces_, item % pieces_, constants, out, stream);
      if (stream) stream_end();
    });
  }

  template <class Terms, class Value, class Settle>
  void both(A* shift, const Settle& settle, const Constants<A, Value::K>& constants, T* out) const {
    const int64_t bytes = g_.B * g_.S * static_cast<int64_t>(sizeof(T) * P);
    if (bytes > CACHE || g_.C < 4 * threads()) {
      sum<Terms>(shift, settle);
      return apply<Value>(constants, out);
    }
    const bool stream = streams_to(out);
    parallel_for(g_.C, elements(g_.B * g_.S), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        if (Terms::GUESS) shift[c] = guess(c);
        while (!settle(c, channel_sums<Terms>(c, shift[c]))) continue;
        for (int64_t k = pieces_ - 1; k >= 0; --k) apply_piece<Value>(c, k, constants, out, stream);
      }
      if (stream) stream_end();
    });
  }

 private:
  static constexpr int64_t PIECE = 16384;
  static int64_t elements(int64_t each) { return each * static_cast<int64_t>(P); }

  bool streams_to(const T* out) const {
    const int64_t run = g_.S * static_cast<int64_t>(sizeof(T));
    return streams(out, run, g_.B * g_.C * run * static_cast<int64_t>(P + 1));
  }

  static void add(Pair2& sums, const Pair2& more) {
    for (int q = 0; q < 2; ++q) sums[q] += more[q];
  }

  A guess(int64_t c) const {
    if (PLAIN_FIRST<T>) return 0;
    return near<A>(g_.S, [at = data<T>(*in_[0]) + c * in_[0]->channel](int64_t i) { return at[i]; });
  }

  struct Part {
    int64_t b, samples, s, positions;
  };
  Part part(int64_t piece) const {
    const int64_t b = piece / position_pieces_ * samples_, s = piece % position_pieces_ * positions_;
    return {b, std::min(samples_, g_.B - b), s, std::min(positions_, g_.S - s)};
  }

  std::array<const T*, P> place(int64_t c, int64_t b, int64_t s) const {
    std::array<const T*, P> at;
    for (size_t p = 0; p < P; ++p) at[p] = data<T>(*in_[p]) + b * in_[p]->sample + c * in_[p]->channel + s;
    return at;
  }

  template <class Terms>
  Pair2 piece_sums(int64_t c, int64_t piece, A shift) const {
    if constexpr (PLAIN_FIRST<T>)
      if (shift == 0) return piece_sums_of(c, piece, typename Terms::Plain{});
    return piece_sums_of(c, piece, [constant = V(shift)](auto, int64_t, int64_t count, const std::array<V, P>& v) FN_LAMBDA {
      return Terms::terms(v, constant, count);
    });
  }

  template <class F>
  Pair2 piece_sums_of(int64_t c, int64_t piece, const F& terms) const {
    const Part w = part(piece);
    constexpr size_t CHAINS = 4;
    constexpr int64_t STEP = CHAINS * LOT<T> * lanes<V>;  // what brings up to LOT additions to each chain
    Chains<V, 1, 2, CHAINS> chains;
    std::array<Sum<V>, 2> sums;
    int64_t added = 0;
    for (int64_t b = w.b; b < w.b + w.samples; ++b) {
      const std::array<std::array<const T*, P>, 1> at{place(c, b, w.s)};
      for (int64_t i = 0; i < w.positions;) {
        const int64_t end = std::min(w.positions, i + GROUP<T, CHAINS> - added);
        add_up(chains, at, i, end, terms);
        added += ceil_div(end - i, STEP) * STEP;
        i = end;
        if (added < GROUP<T, CHAINS>) continue;
        for (int q = 0; q < 2; ++q) sums[q].add(chains.whole(0, q));
        chains.clear();
        added = 0;
      }
    }
    Pair2 out{sums[0].total(), sums[1].total()};
    for (size_t chain = 0; chain < CHAINS; ++chain)  // in double, because a small channel's sums are all here
      for (int q = 0; q < 2; ++q) out[q] += total(chains.s[chain][0][q]);
    return out;
  }

  template <class Terms>
  Pair2 channel_sums(int64_t c, A shift) const {
    Pair2 sums{};
    for (int64_t k = 0; k < pieces_; ++k) add(sums, piece_sums<Terms>(c, k, shift));
    return sums;
  }

  template <class Value>
  void apply_piece(int64_t c, int64_t piece, const Constants<A, Value::K>& constants, T* out, bool stream) const {
    const Part w = part(piece);
    std::array<V, Value::K> constant;
    repeat<Value::K>([&](auto k) FN_LAMBDA { constant[k] = V(constants[k][c]); });
    for (int64_t b = w.b; b < w.b + w.samples; ++b) {
      const auto at = place(c, b, w.s);
      T* to = out + (b * g_.C + c) * g_.S + w.s;
      for_groups<V, 4>(w.positions, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
        std::array<V, J> v;
        repeat<J>([&](auto j) FN_LAMBDA {
          v[j] = Value::value(load_inputs<T, P>(at, i + static_cast<int64_t>(j) * lanes<V>, count), constant);
        });
        put_all<T, J>(to + i, v, count, stream);
      });
    }
  }

  Channels g_;
  Inputs<P> in_;
  int64_t positions_, samples_, position_pieces_, pieces_;
};

}  // namespace fastnorm::cpu
