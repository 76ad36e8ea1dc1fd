// Layer norm over channels on the CPU: how (B, C, S) is cut into blocks, and how a block is gone through.
//
// Lanes are positions: a block is some neighbouring positions of a sample with all channels of each, C rows of `n` elements. It
// is read from memory once; the second sweep finds it in cache. Each position is computed in its own lane, so that it is the
// same in every batch. The last vector of a row overlaps the one before it: what is computed twice comes out alike. Samples
// that are shorter than a vector are packed side by side, and with zeros up to whole vectors.
#pragma once

#include "channel_ops.h"
#include "epilogue.h"

namespace fastnorm::cpu {

// Positions of a block, and what the last block of a sample may have: less than a vector more.
constexpr int64_t WIDEST_BLOCK = 64, MAX_WIDTH = WIDEST_BLOCK + 16;

template <class A>
using OfPositions = std::array<A, MAX_WIDTH>;

template <class T>
struct Plane {  // C rows
  T* first = nullptr;
  int64_t stride = 0;
  FN_INLINE T* operator[](int64_t c) const { return first + c * stride; }
};

// J vectors of a row: at i, i + W and so on, the last of them at `last`.
template <class V, size_t J_>
struct Place {
  static constexpr size_t J = J_;
  int64_t i, last;
  FN_INLINE int64_t at(size_t j) const { return j + 1 < J ? i + static_cast<int64_t>(j) * lanes<V> : last; }
  // How many lanes of the vector are not in the next one as well.
  FN_INLINE int64_t own(size_t j) const { return j + 2 == J ? last - at(j) : lanes<V>; }
  template <class T>
  FN_INLINE std::array<V, J> load(const T* row) const {
    std::array<V, J> v;
    repeat<J>([&](auto j) FN_LAMBDA { v[j] = fastnorm::load(row + at(j)); });
    return v;
  }
  template <class T>
  FN_INLINE void put(T* row, const std::array<V, J>& v, bool stream) const {
    constexpr int64_t W = lanes<V>;
    if (J == 1 || own(J - 2) == W) return put_all<T, J>(row + (J == 1 ? last : i), v, W, stream);
    repeat<J>([&](auto j) FN_LAMBDA { store(row + at(j), v[j]); });
  }
  // Asks for the same place of the block that begins `ahead` elements after this one, where that is not 0.
  template <bool WRITE, class T>
  FN_INLINE void fetch(const T* row, int64_t ahead) const {
    if (ahead > 0) prefetch<WRITE>(row + i + ahead, J * lanes<V> * static_cast<int64_t>(sizeof(T)));
  }
};

// f(place) for the vectors of n elements, at least one vector, up to four at a time and never one alone beside others.
template <class V, class F>
FN_INLINE void for_places(int64_t n, const F& f) {
  constexpr int64_t W = lanes<V>;
  const int64_t vectors = ceil_div(n, W);
  int64_t groups = ceil_div(vectors, 4);
  for (int64_t k = 0; k < vectors; --groups) {
    const int64_t J = ceil_div(vectors - k, groups), i = k * W, last = std::min(i + (J - 1) * W, n - W);
    if (J == 4)
      f(Place<V, 4>{i, last});
    else if (J == 3)
      f(Place<V, 3>{i, last});
    else if (J == 2)
      f(Place<V, 2>{i, last});
    else
      f(Place<V, 1>{i, last});
    k += J;
  }
}

// f(place, first channel, end) for all of a block, some channels at a time; done(first channel, end) after each time.
template <class V, class F, class Done = Nothing>
FN_INLINE void for_tiles(int64_t C, int64_t n, const F& f, const Done& done = {}) {
  for (int64_t c = 0; c < C; c += PLAIN) {
    const int64_t end = std::min(C, c + PLAIN);
    for_places<V>(n, [&](auto place) FN_LAMBDA { f(place, c, end); });
    done(c, end);
  }
}

// Two sums over the channels for each of n positions: a few channels are added plainly, and what they come to goes to a Sum.
template <class T>
class ChannelSums {
 public:
  using V = Vec<T>;
  template <size_t J>
  using Terms = std::array<std::array<V, 2>, J>;

  template <size_t J>
  FN_INLINE void add(const Place<V, J>& place, const Terms<J>& terms) {
    repeat<J>([&](auto j) FN_LAMBDA {
      repeat<2>([&](auto q) FN_LAMBDA { sums_[place.i / W + static_cast<int64_t>(j)][q].add(terms[j][q]); });
    });
  }
  void get(int64_t n, OfPositions<double> (&out)[2]) const {
    for (int64_t k = 0; k * W < n; ++k)
      for (int q = 0; q < 2; ++q) {
        Acc<T> value[W], lost[W];
        sums_[k][q].value.store(value);
        sums_[k][q].lost.store(lost);
        double* to = &out[q][std::min(k * W, n - W)];
        for (int64_t l = 0; l < W; ++l)  // what an infinite sum lost is not a number
          to[l] = static_cast<double>(value[l]) + (std::isfinite(lost[l]) ? static_cast<double>(lost[l]) : 0.0);
      }
  }

 private:
  static constexpr int64_t W = lanes<V>;
  Sum<V> sums_[MAX_WIDTH / W][2];
};

// Adds the terms of one channel; the first of two nested arrays are vectors.
template <class V, size_t J>
FN_INLINE void add_terms(std::array<std::array<V, 2>, J>& to, size_t j, V a, V b) {
  to[j][0] = to[j][0] + a;
  to[j][1] = to[j][1] + b;
}

// `count` positions from the m-th on.
struct Block {
  int64_t m, count;
};

template <class T>
class Blocks {
 public:
  static constexpr int64_t W = lanes<Vec<T>>;
  int64_t count;

  // `bytes`: what is to stay in cache of each channel of a position.
  Blocks(Positions g, int64_t bytes) : g_(g), packed_(g.S < W) {
    constexpr int64_t LINE = std::max<int64_t>(16, 64 / sizeof(T));
    width_ = std::clamp<int64_t>(CACHE / (g.C * bytes) / LINE * LINE, LINE, WIDEST_BLOCK);
    if (packed_)
      width_ = std::max<int64_t>(1, width_ / g.S) * g.S;
    else  // of about one size, so that each asks for all of the next
      width_ = ceil_div(ceil_div(g.S, ceil_div(g.S, width_)), LINE) * LINE;
    in_sample_ = packed_ ? 1 : std::max<int64_t>(1, ceil_div(g.S - W + 1, width_));
    count = packed_ ? ceil_div(g.M(), width_) : g.B * in_sample_;
  }

  int64_t width() const { return width_; }
  Block operator[](int64_t i) const {
    if (packed_) return {i * width_, std::min(width_, g_.M() - i * width_)};
    const int64_t b = i / in_sample_, k = i % in_sample_, s = k * width_;
    return {b * g_.S + s, k + 1 < in_sample_ ? width_ : g_.S - s};
  }
  // From each row of block i to that of the next, where it is to be asked for; else 0. Rows lie in pages of their own, so that
  // the processor does not find out by itself what comes next: it takes five times as long where that is not in its caches.
  int64_t ahead(int64_t i) const { return packed_ || i + 1 == count ? 0 : offset((*this)[i + 1]) - offset((*this)[i]); }
  // Positions that are computed.
  int64_t n(Block k) const { return packed_ ? ceil_div(k.count, W) * W : k.count; }
  // What a thread needs for one input or output.
  Buffer<T> scratch(bool wanted = true) const { return Buffer<T>(packed_ && wanted ? g_.C * MAX_WIDTH : 0); }

  Plane<const T> read(const T* x, Block k, T* scratch) const {
    if (!packed_) return {x + offset(k), g_.S};
    const Plane<T> to{scratch, n(k)};
    for (int64_t c = 0; c < g_.C; ++c) std::fill_n(to[c] + k.count, to.stride - k.count, T(0));
    for_runs(k, [&](auto S, int64_t c, int64_t from, int64_t i) FN_LAMBDA { copy<S>(x + from, to[c] + i); });
    return {scratch, to.stride};
  }
  // Where a block of `out` is made; write() brings it there.
  Plane<T> place(T* out, Block k, T* scratch) const {
    return packed_ ? Plane<T>{scratch, n(k)} : Plane<T>{out + offset(k), g_.S};
  }
  void write(Plane<T> from, Block k, T* out) const {
    if (packed_) for_runs(k, [&](auto S, int64_t c, int64_t to, int64_t i) FN_LAMBDA { copy<S>(from[c] + i, out + to); });
  }
  bool streams_to(const T* out, int64_t bytes) const {
    return !packed_ && streams(out, g_.S * static_cast<int64_t>(sizeof(T)), g_.M() * g_.C * bytes);
  }

 private:
  int64_t offset(Block k) const { return k.m / g_.S * g_.C * g_.S + k.m % g_.S; }
  template <size_t S>
  FN_INLINE static void copy(const T* from, T* to) {
    repeat<S>([&](auto s) FN_LAMBDA { to[s] = from[s]; });
  }
  // f(S, c, where the run of S elements lies, its first position in the block), with S a constant: a run is a few copies.
  template <class F>
  void for_runs(Block k, const F& f) const {
    repeat<W>([&](auto S) {
      if (g_.S == static_cast<int64_t>(S)) for_runs_of<S>(k, f);
    });
  }
  // A few channels of all samples at a time: their lines stay in the first-level cache.
  template <int64_t S, class F>
  void for_runs_of(Block k, const F& f) const {
    for (int64_t c = 0; c < g_.C; c += PLAIN)
      for (int64_t i = 0; i < k.count; i += S)
        for (int64_t each = c; each < std::min(g_.C, c + PLAIN); ++each)
          f(std::integral_constant<size_t, S>{}, each, ((k.m + i) / S * g_.C + each) * S, i);
  }

  Positions g_;
  bool packed_;
  int64_t width_, in_sample_;
};

}  // namespace fastnorm::cpu
