// Channels whose positions lie side by side, (B, C, S) with long S: runs of S elements, each of one channel.
//
// A channel's sums are taken over pieces of a fixed size, in their order, whoever takes them: the result does not depend on the
// number of threads. Where a channel stays in cache and there are enough of them, both passes over it follow each other. Short
// runs of neighbouring channels are taken together, sample by sample: they are one piece of memory.
#pragma once

#include "channel_ops.h"
#include "kept.h"

namespace fastnorm::cpu {

// MARKED: what is read of the first input is what its bits leave of it; where it is applied, that is put elsewhere as well.
template <class T, size_t P, bool MARKED = false>
class RunSweep {
 public:
  using A = Acc<T>;
  using V = Vec<T>;
  using Pair2 = std::array<double, 2>;

  explicit RunSweep(Channels g, const Inputs<P>& in, const Marks<T>& marks = {}) : g_(g), in_(in), marks_(marks) {
    positions_ = std::min(g.S, PIECE);
    samples_ = std::clamp<int64_t>(PIECE / g.S, 1, g.B);
    position_pieces_ = ceil_div(g.S, positions_);
    pieces_ = position_pieces_ * ceil_div(g.B, samples_);
    group_ = TOGETHER && g.B >= 16 ? std::clamp<int64_t>(std::min(WIDEST / run(), g.C / (4 * threads())), 1, MOST) : 1;
  }

  static bool serves(Channels g, const Inputs<P>& in) {
    return !g.last && g.S >= 16 && std::all_of(in.begin(), in.end(), [](const auto* x) { return x->space.dense(); });
  }

  // The same parts of other inputs.
  template <size_t Q>
  RunSweep<T, Q> over(const Inputs<Q>& in) const {
    return RunSweep<T, Q>(g_, in);
  }
  // What makes a part of `out`.
  template <class Value>
  auto maker(const Value& value, const Constants<A, Value::K>& constants, T* out) const {
    return [&, out, this](int64_t channel, int64_t channels, int64_t piece) {
      apply_piece({channel, channels}, piece, value, constants, out, false);
    };
  }

  // Calls f(offset, n) for the runs of dense outputs that a part is made of.
  template <class F>
  auto runs(const F& f) const {
    return [&f, this](int64_t channel, int64_t channels, int64_t piece) {
      const Part w = part(piece);
      for (int64_t b = w.b; b < w.b + w.samples; ++b)
        for (int64_t c = channel; c < channel + channels; ++c) f((b * g_.C + c) * g_.S + w.s, w.positions);
    };
  }
  // The same with bits beside the first input.
  static constexpr bool TAKES_MARKS = MARKS_READ<T>;
  RunSweep<T, P, true> marked(const Marks<T>& marks) const { return RunSweep<T, P, true>(g_, in_, marks); }
  bool takes_marks() const { return MARKS_ANYWHERE || in_eights(); }
  bool in_runs() const { return true; }
  bool in_eights() const { return g_.S % 8 == 0; }  // whether all those begin and end at a multiple of eight

  template <class Terms, class Settle, class Before = Nothing>
  void sum(const std::array<A*, Terms::K>& of, const Settle& settle, const Before& before = {}) const {
    std::vector<Pair2> partial(pieces_ * g_.C);
    for (int64_t c = 0; Terms::GUESS && c < g_.C; ++c) of[0][c] = guess(c);
    const int64_t groups = ceil_div(g_.C, group_);
    parallel_for(groups * pieces_, elements(samples_ * positions_ * group_), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Group k = group(item / pieces_, group_);
        before(k.channel, k.channels, item % pieces_);
        piece_sums<Terms>(k, item % pieces_, of, partial.data() + item % pieces_ * g_.C + k.channel);
      }
    });
    for (int64_t c = 0; c < g_.C; ++c) {
      Pair2 sums{};
      for (int64_t k = 0; k < pieces_; ++k) add(sums, partial[k * g_.C + c]);
      settle_alone<Terms>(c, sums, of, settle);
    }
  }

  template <class Value>
  void apply(const Value& value, const Constants<A, Value::K>& constants, T* out) const {
    const bool stream = streams_to(out);
    parallel_for(ceil_div(g_.C, group_) * pieces_, elements(samples_ * positions_ * group_), [&](int64_t begin, int64_t end) {
      for (int64_t item = end - 1; item >= begin; --item)  // what was read last is in cache
        apply_piece(group(item / pieces_, group_), item % pieces_, value, constants, out, stream);
      if (stream) stream_end();
    });
  }

  template <class Terms, class Settle, class Value, class Before = Nothing>
  void both(const std::array<A*, Terms::K>& of, const Settle& settle, const Value& value,
            const Constants<A, Value::K>& constants, T* out, const Before& before = {}) const {
    const int64_t together = std::min(group_, CACHE / (g_.B * run() * static_cast<int64_t>(P)));
    if (together * run() < std::min(NARROWEST, group_ * run()) || g_.C < 4 * threads()) {
      sum<Terms>(of, settle, before);
      return apply(value, constants, out);
    }
    const bool stream = streams_to(out);
    parallel_for(ceil_div(g_.C, together), elements(g_.B * g_.S * together), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Group k = group(item, together);
        for (int64_t j = 0; Terms::GUESS && j < k.channels; ++j) of[0][k.channel + j] = guess(k.channel + j);
        Pair2 sums[MOST];
        channel_sums<Terms>(k, of, sums, before);
        for (int64_t j = 0; j < k.channels; ++j) settle_alone<Terms>(k.channel + j, sums[j], of, settle);
        for (int64_t piece = pieces_ - 1; piece >= 0; --piece) apply_piece(k, piece, value, constants, out, stream);
      }
      if (stream) stream_end();
    });
  }

 private:
  static constexpr int64_t PIECE = 16384;
  static constexpr int64_t WIDEST = 4096, MOST = 16;  // bytes and number of runs that are taken together
  // Whether short runs are taken together, and those of the next sample, pages away, fetched ahead: 1.3 to 1.8 times as fast
  // on a Xeon with AVX-512, a loss on a Zen 3 with AVX2.
  static constexpr bool TOGETHER = lanes<Floats> == 16;
  static int64_t elements(int64_t each) { return each * static_cast<int64_t>(P); }

  int64_t run() const { return g_.S * static_cast<int64_t>(sizeof(T)); }  // bytes
  bool streams_to(const T* out) const {
    const int64_t bytes = g_.B * g_.C * run() * static_cast<int64_t>(P + 1 + MARKED);
    const auto past = [&](const T* to) { return streams(to, run(), bytes); };
    return out != data<T>(*in_[0]) && past(out) && (!MARKED || past(marks_.dz));
  }

  struct Group {
    int64_t channel, channels;
  };
  Group group(int64_t k, int64_t size) const { return {k * size, std::min(size, g_.C - k * size)}; }

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

  // Of the first Q inputs.
  template <size_t Q>
  std::array<const T*, Q> place(int64_t c, int64_t b, int64_t s) const {
    std::array<const T*, Q> at;
    for (size_t p = 0; p < Q; ++p) at[p] = data<T>(*in_[p]) + b * in_[p]->sample + c * in_[p]->channel + s;
    return at;
  }

  auto reading() const {
    if constexpr (MARKED)
      return Marked<T>(marks_);
    else
      return AsTheyAre{};
  }

  static constexpr size_t CHAINS = 4;

  // The sums of one channel while they are taken.
  struct Open {
    Chains<V, 1, 2, CHAINS> chains;
    std::array<Sum<V>, 2> sums;
  };

  // Adds n elements; how many each chain has got since it was last emptied goes in and out.
  template <size_t Q, class F>
  FN_INLINE int64_t add_run(Open& to, const std::array<const T*, Q>& run, int64_t n, int64_t added, const F& terms) const {
    const auto read = reading();
    constexpr int64_t STEP = CHAINS * LOT<T> * lanes<V>;  // what brings up to LOT additions to each chain
    for (int64_t i = 0; i < n;) {
      const int64_t end = std::min(n, i + GROUP<T, CHAINS> - added);
      add_up(to.chains, std::array<std::array<const T*, Q>, 1>{run}, i, end, terms, read);
      added += ceil_div(end - i, STEP) * STEP;
      i = end;
      if (added < GROUP<T, CHAINS>) continue;
      for (int q = 0; q < 2; ++q) to.sums[q].add(to.chains.whole(0, q));
      to.chains.clear();
      added = 0;
    }
    return added;
  }

  static Pair2 whole(const Open& of) {
    Pair2 out{of.sums[0].total(), of.sums[1].total()};
    for (size_t chain = 0; chain < CHAINS; ++chain)  // in double, because a small channel's sums are all here
      for (int q = 0; q < 2; ++q) out[q] += total(of.chains.s[chain][0][q]);
    return out;
  }

  // f(terms) with what is added up over channel c.
  template <class Terms, class F>
  FN_INLINE static auto with_terms(const std::array<A*, Terms::K>& of, int64_t c, const F& f) {
    if constexpr (PLAIN_FIRST<T> && Terms::K == 1)
      if (of[0][c] == 0) return f(typename Terms::Plain{});
    std::array<V, Terms::K> constants;
    repeat<Terms::K>([&](auto k) FN_LAMBDA { constants[k] = V(of[k][c]); });
    return f([constants](auto, int64_t, int64_t count, const std::array<V, Terms::P>& v)
                 FN_LAMBDA { return Terms::terms(v, constants, count); });
  }

  // The sums of one piece of each channel of a group.
  template <class Terms>
  void piece_sums(Group k, int64_t piece, const std::array<A*, Terms::K>& of, Pair2* out) const {
    const Part w = part(piece);
    if (k.channels == 1) {
      out[0] = with_terms<Terms>(of, k.channel, [&](const auto& terms) {
        Open open;  // in registers
        int64_t added = 0;
        for (int64_t b = w.b; b < w.b + w.samples; ++b)
          added = add_run(open, place<Terms::P>(k.channel, b, w.s), w.positions, added, terms);
        return whole(open);
      });
      return;
    }
    Open open[MOST];
    int64_t added = 0;
    for (int64_t b = w.b; b < w.b + w.samples; ++b) {
      const int64_t before = added;
      for (int64_t j = 0; j < k.channels; ++j) {
        const int64_t c = k.channel + j;
        if (b + 1 < w.b + w.samples)
          for (const T* next : place<Terms::P>(c, b + 1, w.s)) prefetch<false>(next, run());
        added = with_terms<Terms>(of, c, [&](const auto& terms) {
          return add_run(open[j], place<Terms::P>(c, b, w.s), w.positions, before, terms);
        });
      }
    }
    for (int64_t j = 0; j < k.channels; ++j) out[j] = whole(open[j]);
  }

  template <class Terms, class Before = Nothing>
  void channel_sums(Group k, const std::array<A*, Terms::K>& of, Pair2* sums, const Before& before = {}) const {
    std::fill_n(sums, k.channels, Pair2{});
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      Pair2 more[MOST];
      before(k.channel, k.channels, piece);
      piece_sums<Terms>(k, piece, of, more);
      for (int64_t j = 0; j < k.channels; ++j) add(sums[j], more[j]);
    }
  }

  template <class Terms, class Settle>
  void settle_alone(int64_t c, Pair2 sums, const std::array<A*, Terms::K>& of, const Settle& settle) const {
    while (!settle(c, sums)) channel_sums<Terms>({c, 1}, of, &sums);
  }

  // A channel's constants for whichever vector.
  template <size_t K>
  struct Same {
    std::array<V, K> constants;
    FN_INLINE const std::array<V, K>& operator[](size_t) const { return constants; }
  };

  // `value` is a copy: bytes that are written could be part of one that lies elsewhere, and it would be read again for each.
  template <class Value>
  void apply_piece(Group k, int64_t piece, Value value, const Constants<A, Value::K>& constants, T* out, bool stream) const {
    const Part w = part(piece);
    [[maybe_unused]] const Marks<T> marks = marks_;
    for (int64_t b = w.b; b < w.b + w.samples; ++b)
      for (int64_t c = k.channel; c < k.channel + k.channels; ++c) {
        Same<Value::K> constant;
        repeat<Value::K>([&](auto i) FN_LAMBDA { constant.constants[i] = V(own(constants[i][c])); });
        const auto at = place<P>(c, b, w.s);
        T* to = out + (b * g_.C + c) * g_.S + w.s;
        if (k.channels > 1 && b + 1 < w.b + w.samples) prefetch<true>(to + g_.C * g_.S, run());
        for_groups<V, 4>(w.positions, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
          auto in = load_group<T, P, J>(at, i, count);
          if constexpr (MARKED) {
            const auto dz = pass_marked<T, J>(marks, at[0] + i, count, stream);
            repeat<J>([&](auto j) FN_LAMBDA { in[j][0] = dz[j]; });
          }
          const auto v = value(in, constant);
          put_group<T, J>(to + i, v, count, stream);
          note(value, to + i, v, count);
        });
      }
  }

  Channels g_;
  Inputs<P> in_;
  int64_t positions_, samples_, position_pieces_, pieces_, group_;
  Marks<T> marks_;
};

}  // namespace fastnorm::cpu
