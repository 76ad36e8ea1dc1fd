// Channels side by side: a grid whose rows are positions and whose columns are channels, (B * S, C); for few channels without
// gaps, several positions are a row, (B * S / n, n * C), where a channel has every C-th column; and for short runs of
// neighbouring channels rows are samples, (B, C * S), where a channel has S columns.
//
// Four rows at a time, so that a column's sums and constants are touched once for all four. Sums are taken over pieces of rows
// of a fixed size, in their order, whoever takes them: the result does not depend on the number of threads. Inputs and outputs
// that do not lie so are read and written through tiles that are turned round in cache.
#pragma once

#include <numeric>

#include "columns.h"
#include "kept.h"
#include "transpose.h"

namespace fastnorm::cpu {

constexpr int64_t TILE_ROWS = 16;  // are added plainly, by fours, before their sum goes to double
constexpr int64_t SMALL = 32768;   // elements that one thread is faster with, and that every four rows' sum goes to double of
constexpr int64_t MAX_COLUMNS = 1536;  // whose sums and constants are at hand in the first-level cache
constexpr int64_t TURNED_ROWS = 256, TURNED_COLUMNS = 128;

// MARKED: what is read of the first input is what its bits leave of it; where it is applied, that is put elsewhere as well.
template <class T, size_t P, bool MARKED = false>
class GridSweep {
 public:
  using A = Acc<T>;
  using V = Vec<T>;

  // `single`: every row is one position, whatever else would be faster.
  GridSweep(Channels g, const Inputs<P>& in, bool single = false)
      : g_(g), in_(in), flat_(!single && side_by_side(g, in)) {
    fold_ = flat_ ? g.S : 1;
    find_direct();
    direct_out_ = flat_ || g.last || g.C == 1;
    positions_ = !single && packed(g, in) ? positions_in_row(g) : 1;
    rows_ = flat_ ? g.B : g.count() / positions_;
    columns_ = g.C * fold_ * positions_;
    // Rows of 16 bits are half as long.
    const int64_t widest = !(read_in_place_ && direct_out_) ? TURNED_COLUMNS
                           : sizeof(T) == 2                 ? MAX_COLUMNS
                                                            : MAX_COLUMNS / 3 * 2;
    // Rows of neighbouring samples are far apart, so a block is as wide as lets it stay in cache.
    int64_t fitting = flat_ ? CACHE / static_cast<int64_t>(rows_ * sizeof(T) * P) : widest;
    if (flat_ && fitting * static_cast<int64_t>(sizeof(T)) < NARROWEST) fitting = widest;
    const int64_t unit = fold_ * positions_, an_eight = 8 / std::gcd(unit, int64_t{8});
    int64_t units = std::max<int64_t>(1, std::min(widest, fitting) / unit);
    if (units > an_eight) units -= units % an_eight;
    width_ = std::min(units * unit, columns_);
    blocks_ = ceil_div(columns_, width_);
    piece_ = std::clamp<int64_t>(65536 / width_ / TILE_ROWS * TILE_ROWS, 4 * TILE_ROWS, 1024);
    pieces_ = ceil_div(rows_, piece_);
    summed_rows_ = rows_ * columns_ <= SMALL ? 4 : TILE_ROWS;
  }

  // The same parts of other inputs, which are as dense as those of `like`.
  template <size_t Q>
  GridSweep(const GridSweep<T, Q>& like, const Inputs<P>& in, const Marks<T>& marks = {})
      : g_(like.g_),
        in_(in),
        flat_(like.flat_),
        direct_out_(like.direct_out_),
        fold_(like.fold_),
        positions_(like.positions_),
        rows_(like.rows_),
        columns_(like.columns_),
        width_(like.width_),
        blocks_(like.blocks_),
        piece_(like.piece_),
        pieces_(like.pieces_),
        summed_rows_(like.summed_rows_),
        marks_(marks) {
    find_direct();
  }
  template <size_t Q>
  GridSweep<T, Q> over(const Inputs<Q>& in) const {
    return GridSweep<T, Q>(*this, in);
  }
  // The same with bits beside the first input.
  static constexpr bool TAKES_MARKS = MARKS_READ<T>;
  GridSweep<T, P, true> marked(const Marks<T>& marks) const { return {*this, in_, marks}; }
  bool takes_marks() const { return read_in_place_ && direct_out_ && (MARKS_ANYWHERE || in_eights()); }
  // What makes a part of `out`.
  template <class Value>
  auto maker(const Value& value, const Constants<A, Value::K>& constants, T* out) const {
    return [&, out, this](int64_t k, int64_t piece) {
      apply_piece(Tiles(*this), piece, block(k), value, constants, out, false);
    };
  }

  // Calls f(offset, n) for the runs of dense outputs that a part is made of, where it is made of runs.
  template <class F>
  auto runs(const F& f) const {
    return [&f, this](int64_t k, int64_t piece) {
      const int64_t rows = std::min(piece_, rows_ - piece * piece_);
      for (int64_t r = piece * piece_; r < piece * piece_ + rows; ++r) f(r * columns_ + k * width_, block(k).columns);
    };
  }
  bool in_runs() const { return direct_out_; }
  // Whether all those begin and end at a multiple of eight.
  bool in_eights() const { return direct_out_ && columns_ % 8 == 0 && width_ % 8 == 0; }

  // A kilobyte, so that four rows a quarter of a piece apart can lie in different sets of a cache.
  static constexpr int64_t PACKED_COLUMNS = 1024 / static_cast<int64_t>(sizeof(T));

  // Whether positions follow each other without gaps, all channels of each; few channels, so that it is worth something.
  bool packed(Channels g, const Inputs<P>& in) const {
    const auto dense = [&](const auto* x) {
      return x->channel == 1 && x->positions.rank == 1 && x->positions.stride[0] == g.C;
    };
    return !flat_ && g.last && 4 * g.C <= PACKED_COLUMNS && std::all_of(in.begin(), in.end(), dense);
  }
  // As many as leave enough rows for a piece.
  static int64_t positions_in_row(Channels g) {
    constexpr int64_t MOST = 64;
    int64_t n = std::min({MOST, PACKED_COLUMNS / g.C, g.count() / (4 * TILE_ROWS)});
    while (n > 1 && g.count() % n != 0) --n;
    return std::max<int64_t>(1, n);
  }

  // Whether enough samples have their channels one after the other, so that they are rows of C * S columns.
  static bool side_by_side(Channels g, const Inputs<P>& in) {
    const auto dense = [&](const auto* x) { return x->space.dense() && x->channel == g.S; };
    return !g.last && g.B >= 16 && std::all_of(in.begin(), in.end(), dense);
  }

  template <class Terms, class Settle, class Before = Nothing>
  void sum(const std::array<A*, Terms::K>& of, const Settle& settle, const Before& before = {}) const {
    const int64_t width = ceil_div(columns_, 16) * 16;
    const Buffer<double> partial(pieces_ * 2 * width);
    std::vector<char> settled(g_.C, 0);
    if constexpr (Terms::GUESS)
      for (int64_t k = 0; k < blocks_; ++k) guess(block(k), of[0]);
    for (bool open = true; open;) {
      parallel_for(pieces_ * blocks_, elements(piece_ * width_), [&](int64_t begin, int64_t end) {
        const Tiles tiles(*this);
        for (int64_t item = begin; item < end; ++item) {
          const Block b = block(item % blocks_);
          before(item % blocks_, item / blocks_);
          double* s = partial + item / blocks_ * 2 * width + b.column;
          const auto constants = columns<Terms::K>(b, of);
          piece_sums<Terms>(tiles, item / blocks_, b, constants.all(), s, s + width);
        }
      });
      std::vector<double> sums(2 * width, 0.0);
      for (int64_t k = 0; k < pieces_; ++k)
        for (int64_t i = 0; i < 2 * width; ++i) sums[i] += partial[k * 2 * width + i];
      open = !settle_all(0, g_.C, sums.data(), sums.data() + width, settled, settle);
    }
  }

  template <class Value>
  void apply(const Value& value, const Constants<A, Value::K>& constants, T* out) const {
    const bool stream = streams_to(out);
    parallel_for(pieces_ * blocks_, elements(piece_ * width_), [&](int64_t begin, int64_t end) {
      const Tiles tiles(*this);
      for (int64_t item = end - 1; item >= begin; --item)  // what was read last is in cache
        apply_piece(tiles, item / blocks_, block(item % blocks_), value, constants, out, stream);
      if (stream) stream_end();
    });
  }

  template <class Terms, class Settle, class Value, class Before = Nothing>
  void both(const std::array<A*, Terms::K>& of, const Settle& settle, const Value& value,
            const Constants<A, Value::K>& constants, T* out, const Before& before = {}) const {
    const int64_t bytes = rows_ * width_ * static_cast<int64_t>(sizeof(T) * P);
    const bool small = rows_ * columns_ <= SMALL;
    if (!small && (bytes > CACHE || blocks_ < 2 * threads())) {
      sum<Terms>(of, settle, before);
      return apply(value, constants, out);
    }
    const bool stream = streams_to(out);
    parallel_for(blocks_, elements(rows_ * width_), [&](int64_t begin, int64_t end) {
      const Tiles tiles(*this);
      for (int64_t k = begin; k < end; ++k) {
        sum_block<Terms>(tiles, k, of, settle, before);
        for (int64_t piece = pieces_ - 1; piece >= 0; --piece)
          apply_piece(tiles, piece, block(k), value, constants, out, stream);
      }
      if (stream) stream_end();
    });
  }

 protected:
  static int64_t elements(int64_t each) { return each * static_cast<int64_t>(P); }

  void find_direct() {
    for (size_t p = 0; p < P; ++p) direct_[p] = flat_ || in_[p]->channel == 1 || g_.C == 1;
    read_in_place_ = std::all_of(direct_.begin(), direct_.end(), [](bool d) { return d; });
  }

  bool streams_to(const T* out) const {
    const auto bytes = [](int64_t n) { return n * static_cast<int64_t>(sizeof(T)); };
    const auto past = [&](const T* to) { return streams(to, bytes(columns_), bytes(rows_ * columns_ * (P + 1 + MARKED))); };
    return direct_out_ && out != data<T>(*in_[0]) && bytes(width_) % 64 == 0 && past(out) && (!MARKED || past(marks_.dz));
  }

  struct Block {
    int64_t column, columns, channel, channels;
  };
  Block block(int64_t k) const {
    const int64_t column = k * width_, columns = std::min(width_, columns_ - column);
    return {column, columns, column / fold_, columns / (fold_ * positions_)};
  }
  template <size_t K, bool LOTS = false, class Of>
  ColumnConstants<T, K, LOTS> columns(const Block& k, const Of& of) const {
    return {k.channel, k.channels, fold_, positions_, of};
  }

  // ------------------------------------------------------------ rows and tiles

  // A thread's tiles: one for each input, and the last for the output; empty where they are not needed.
  struct Tiles {
    std::array<Buffer<T>, P + 1> tile;
    explicit Tiles(const GridSweep& s) : tile(make(s, std::make_index_sequence<P + 1>{})) {}
    template <size_t... I>
    static std::array<Buffer<T>, P + 1> make(const GridSweep& s, std::index_sequence<I...>) {
      const int64_t elements = std::min(TURNED_ROWS, s.rows_) * TURNED_COLUMNS;
      return {Buffer<T>((I < P ? s.direct_[std::min(I, P - 1)] : s.direct_out_) ? 0 : elements)...};
    }
  };

  const T* row(size_t p, int64_t r, int64_t column) const {
    return data<T>(*in_[p]) + (flat_ ? r * in_[p]->sample : in_[p]->positions.offset(r * positions_)) + column;
  }

  // f(row of the tile, b, s, how many) for the runs of rows that lie in one sample.
  template <class F>
  void for_samples(int64_t row, int64_t rows, const F& f) const {
    for (int64_t i = 0; i < rows;) {
      const int64_t b = (row + i) / g_.S, s = (row + i) % g_.S, n = std::min(rows - i, g_.S - s);
      f(i, b, s, n);
      i += n;
    }
  }

  void fetch(size_t p, int64_t row, int64_t rows, const Block& k, T* tile) const {
    const ChannelsInput& in = *in_[p];
    for_samples(row, rows, [&](int64_t i, int64_t b, int64_t s, int64_t n) {
      const T* from = data<T>(in) + b * in.sample + k.column * in.channel;
      T* to = tile + i * TURNED_COLUMNS;
      if (in.space.dense()) return transpose(from + s, in.channel, k.columns, n, to, TURNED_COLUMNS);
      for (int64_t j = 0; j < n; ++j) {
        const T* at = from + in.space.offset(s + j);
        for (int64_t c = 0; c < k.columns; ++c) to[j * TURNED_COLUMNS + c] = at[c * in.channel];
      }
    });
  }

  void put(const T* tile, int64_t row, int64_t rows, const Block& k, T* out) const {
    for_samples(row, rows, [&](int64_t i, int64_t b, int64_t s, int64_t n) {
      transpose(tile + i * TURNED_COLUMNS, TURNED_COLUMNS, n, k.columns, out + (b * g_.C + k.column) * g_.S + s, g_.S);
    });
  }

  // The rows of a piece in the order in which they are taken. Rows that are read in place come from the four quarters of the
  // piece in turn: the four that are taken together are four streams, each of them one after the other in memory.
  struct Order {
    int64_t first, quarter;
    int64_t operator()(int64_t i) const { return first + (i < 4 * quarter ? i % 4 * quarter + i / 4 : i); }
  };
  Order order(int64_t piece, bool in_place) const {
    const int64_t first = piece * piece_, rows = std::min(piece_, rows_ - first);
    return {first, in_place ? quarter(rows) : 0};
  }
  // A quarter of so many rows, or a little less: streams that lie whole pages apart would meet in the same sets of a cache.
  int64_t quarter(int64_t rows) const {
    constexpr int64_t PAGE = 4096;
    const int64_t bytes = columns_ * static_cast<int64_t>(sizeof(T));
    int64_t best = rows / 4, best_apart = -1;
    for (int64_t q = rows / 4; q > rows / 8 && q > rows / 4 - 8; --q) {
      const auto apart = [&](int64_t off) { return std::min(off % PAGE, PAGE - off % PAGE); };
      const int64_t a = std::min(apart(q * bytes), int64_t{1024}) + std::min(apart(2 * q * bytes), int64_t{1024});
      if (a > best_apart) best = q, best_apart = a;
    }
    return best;
  }

  // f(std::integral_constant<size_t, R>, i, at) for the rows [begin, begin + rows) of the order, a tile, R at a time; at[r][p]
  // is the p-th of the first Q inputs of row i + r of the tile.
  template <size_t Q, class F>
  void for_rows(const Tiles& tiles, Order order, int64_t begin, int64_t rows, const Block& k, const F& f,
                bool one_by_one = false) const {
    for (size_t p = 0; p < Q; ++p)
      if (!direct_[p]) fetch(p, order.first + begin, rows, k, tiles.tile[p]);
    const auto at = [&](size_t p, int64_t i) {
      return direct_[p] ? this->row(p, order(begin + i), k.column) : tiles.tile[p] + i * TURNED_COLUMNS;
    };
    const auto some = [&](auto R, int64_t i) {
      std::array<std::array<const T*, Q>, R> places;
      for (size_t r = 0; r < R; ++r)
        for (size_t p = 0; p < Q; ++p) places[r][p] = at(p, i + static_cast<int64_t>(r));
      f(R, i, places);
    };
    int64_t i = 0;
    for (; i + 4 <= rows && !one_by_one; i += 4) some(std::integral_constant<size_t, 4>{}, i);
    for (; i < rows; ++i) some(std::integral_constant<size_t, 1>{}, i);
  }

  // ------------------------------------------------------------ sums

  // Pointers by value, here and below: a vector that is written could be part of an array of them that lies elsewhere, and they
  // would be read again for each.
  template <class Terms, bool PLAIN, size_t R>
  static void add_rows(std::array<std::array<const T*, Terms::P>, R> at, int64_t n, bool first,
                       std::array<const A*, Terms::K> constants, A* s, A* q, [[maybe_unused]] Marks<T> marks = {}) {
    for_vectors<V>(n, [&](int64_t i, int64_t count) FN_LAMBDA {
      std::array<V, Terms::K> c;
      if constexpr (!PLAIN) repeat<Terms::K>([&](auto k) FN_LAMBDA { c[k] = load(constants[k] + i, count); });
      std::array<V, 2> sum[R];
      repeat<R>([&](auto r) FN_LAMBDA {
        auto v = load_inputs<T, Terms::P>(at[r], i, count);
        if constexpr (MARKED) v[0] = load_marked<T, 1>(marks, at[r][0] + i, count)[0];
        if constexpr (PLAIN)
          sum[r] = typename Terms::Plain{}(r, i, count, v);
        else
          sum[r] = Terms::terms(v, c, count);
      });
      if constexpr (R == 4) repeat<2>([&](auto k) FN_LAMBDA { sum[0][k] = (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]); });
      store(s + i, first ? sum[0][0] : load(s + i) + sum[0][0]);
      store(q + i, first ? sum[0][1] : load(q + i) + sum[0][1]);
    });
  }

  // The sums of one piece of rows, in s and q.
  template <class Terms>
  void piece_sums(const Tiles& tiles, int64_t piece, const Block& k, const std::array<const A*, Terms::K>& constants, double* s,
                  double* q) const {
    if constexpr (PLAIN_FIRST<T> && Terms::K == 1)
      if (std::all_of(constants[0], constants[0] + k.columns, [](A a) { return a == 0; }))
        return piece_sums<Terms, true>(tiles, piece, k, constants, s, q);
    piece_sums<Terms, false>(tiles, piece, k, constants, s, q);
  }
  template <class Terms, bool PLAIN>
  void piece_sums(const Tiles& tiles, int64_t piece, const Block& k, const std::array<const A*, Terms::K>& constants, double* s,
                  double* q) const {
    const int64_t rows = std::min(piece_, rows_ - piece * piece_), n = k.columns;
    const Order ordered = order(piece, read_in_place_);
    alignas(64) A tile[2][MAX_COLUMNS];  // whole vectors
    for (int64_t begin = 0; begin < rows; begin += summed_rows_) {
      for_rows<Terms::P>(tiles, ordered, begin, std::min(summed_rows_, rows - begin), k,
                         [&](auto R, int64_t i, const auto& at) {
                           add_rows<Terms, PLAIN, R>(at, n, i == 0, constants, tile[0], tile[1], marks_);
                         });
      if (begin == 0)
        for (int64_t i = 0; i < n; ++i) s[i] = tile[0][i], q[i] = tile[1][i];
      else
        for (int64_t i = 0; i < n; ++i) s[i] += tile[0][i], q[i] += tile[1][i];
    }
  }

  static double sum_of(const double* s, int64_t n) {
    if (n == 1) return *s;
    Doubles sum(0);
    for_vectors<Doubles>(n, [&](int64_t i, int64_t count) FN_LAMBDA { sum = sum + load(s + i, count); });
    return total(sum);
  }

  // Settles channels [begin, begin + n) from the sums of their columns, which are spent; false where some are still open.
  template <class Settle>
  bool settle_all(int64_t begin, int64_t n, double* s, double* q, std::vector<char>& settled, const Settle& settle) const {
    bool all = true;
    for (int64_t j = 1; j < positions_; ++j)
      for (int64_t c = 0; c < n; ++c) s[c] += s[j * n + c], q[c] += q[j * n + c];
    for (int64_t c = 0; c < n; ++c) {
      if (settled[c]) continue;
      settled[c] = settle(begin + c, {sum_of(s + c * fold_, fold_), sum_of(q + c * fold_, fold_)});
      all = all && settled[c];
    }
    return all;
  }

  template <class Terms, class Settle, class Before>
  void sum_block(const Tiles& tiles, int64_t index, const std::array<A*, Terms::K>& of, const Settle& settle,
                 const Before& before) const {
    const Block k = block(index);
    std::vector<char> settled(k.channels, 0);
    std::vector<double> sums(2 * k.columns);
    alignas(64) double partial[2][MAX_COLUMNS];
    if constexpr (Terms::GUESS) guess(k, of[0]);
    for (bool open = true; open;) {
      std::fill(sums.begin(), sums.end(), 0.0);
      const auto constants = columns<Terms::K>(k, of);
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        before(index, piece);
        piece_sums<Terms>(tiles, piece, k, constants.all(), partial[0], partial[1]);
        for (int q = 0; q < 2; ++q)
          for (int64_t i = 0; i < k.columns; ++i) sums[q * k.columns + i] += partial[q][i];
      }
      open = !settle_all(k.channel, k.channels, sums.data(), sums.data() + k.columns, settled, settle);
    }
  }

  void guess(const Block& k, A* shift) const {
    if (PLAIN_FIRST<T>) {
      std::fill_n(shift + k.channel, k.channels, A(0));
      return;
    }
    const ChannelsInput& in = *in_[0];
    for (int64_t c = k.channel; c < k.channel + k.channels; ++c) {
      const T* at = data<T>(in) + c * in.channel;
      shift[c] = near<A>(g_.count(), [&](int64_t i) { return at[in.positions.offset(i)]; });
    }
  }

  // ------------------------------------------------------------ elements

  // The constants of J vectors of each row, for whichever row.
  template <size_t K, size_t J>
  struct Same {
    std::array<V, K> constants[J];
    FN_INLINE const std::array<V, K>& operator[](size_t k) const { return constants[k % J]; }
  };

  template <class Value, size_t R>
  static void apply_rows(Value value, std::array<std::array<const T*, P>, R> at, int64_t n,
                         std::array<const A*, Value::K> constants, std::array<T*, R> out, bool stream,
                         [[maybe_unused]] Marks<T> marks = {}) {
    constexpr size_t TOGETHER = Value::TOGETHER ? R : 1;  // rows
    // A whole cache line, which can go past the caches; more constants than that do not stay in registers. Bits take less time
    // two lots at once.
    constexpr bool LINE = std::is_same_v<T, float> && lanes<V> == 8 && !Value::TOGETHER;
    constexpr int64_t AT_ONCE = LINE ? 2 : LOT<T> * (TAKES_NOTE<Value> ? 2 : 1);
    for_groups<V, AT_ONCE>(n, [&](auto J, int64_t i, int64_t count) FN_LAMBDA {
      Same<Value::K, J> constant;
      repeat<J>([&](auto j) FN_LAMBDA {
        repeat<Value::K>([&](auto k) FN_LAMBDA { constant.constants[j][k] = load(constants[k] + i + j * lanes<V>, count); });
      });
      repeat<R / TOGETHER>([&](auto group) FN_LAMBDA {
        InputGroup<T, P, TOGETHER * J> in;
        repeat<TOGETHER>([&](auto r) FN_LAMBDA {
          const auto& from = at[group * TOGETHER + r];
          const auto row = load_group<T, P, J>(from, i, count);
          repeat<J>([&](auto j) FN_LAMBDA { in[r * J + j] = row[j]; });
          if constexpr (MARKED) {
            const auto dz = pass_marked<T, J>(marks, from[0] + i, count, stream);
            repeat<J>([&](auto j) FN_LAMBDA { in[r * J + j][0] = dz[j]; });
          }
        });
        const auto all = value(in, constant);
        repeat<TOGETHER>([&](auto r) FN_LAMBDA {
          std::array<V, J> v;
          repeat<J>([&](auto j) FN_LAMBDA { v[j] = all[r * J + j]; });
          put_group<T, J>(out[group * TOGETHER + r] + i, v, count, stream);
          note(value, out[group * TOGETHER + r] + i, v, count);
        });
      });
    });
  }

  template <class Value>
  void apply_piece(const Tiles& tiles, int64_t piece, const Block& k, const Value& value,
                   const Constants<A, Value::K>& constants, T* out, bool stream) const {
    const int64_t all = std::min(piece_, rows_ - piece * piece_);
    // Rows far apart that are written past the caches: 4 at once take up to 1.6 times as long as one after the other.
    const bool one_by_one = flat_ && stream;
    const Order ordered = order(piece, read_in_place_ && direct_out_ && !one_by_one);
    const auto expanded = columns<Value::K, LOTS_STORED<T>>(k, constants);
    for (int64_t begin = 0; begin < all; begin += TURNED_ROWS) {
      const int64_t rows = std::min(TURNED_ROWS, all - begin);
      T* tile = tiles.tile[P];
      for_rows<P>(tiles, ordered, begin, rows, k, [&](auto R, int64_t i, const auto& at) {
        std::array<T*, R> to;
        for (size_t r = 0; r < R; ++r) {
          const int64_t index = i + static_cast<int64_t>(r);
          to[r] = direct_out_ ? out + ordered(begin + index) * columns_ + k.column : tile + index * TURNED_COLUMNS;
        }
        apply_rows<Value, R>(value, at, k.columns, expanded.all(), to, stream, marks_);
      }, one_by_one);
      if (!direct_out_) put(tile, ordered.first + begin, rows, k, out);
    }
  }

  template <class, size_t, bool>
  friend class GridSweep;

  Channels g_;
  Inputs<P> in_;
  bool flat_, direct_out_, read_in_place_;
  std::array<bool, P> direct_;
  int64_t fold_, positions_, rows_, columns_, width_, blocks_, piece_, pieces_, summed_rows_;
  Marks<T> marks_{};
};

}  // namespace fastnorm::cpu
