// Pieces of a batch norm of which some positions do not count.
#include "channel_ops.h"

namespace fastnorm::cpu {
namespace {

// The element of channel c at position i, b * S + s.
template <class T>
Acc<T> at(const ChannelsInput& in, int64_t c, int64_t i) {
  return static_cast<Acc<T>>(data<T>(in)[c * in.channel + in.positions.offset(i)]);
}

}  // namespace

void channel_masked_stats(Channels g, const ChannelsInput& x, const bool* mask, void* count, void* mean, void* deviation) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    int64_t n = 0;
    for (int64_t i = 0; i < g.count(); ++i) n += mask[i];
    *as<A>(count) = static_cast<A>(n);
    parallel_for(g.C, g.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0, m2 = 0;
        for (int64_t i = 0; i < g.count(); ++i) sum += mask[i] ? static_cast<double>(at<T>(x, c, i)) : 0;
        const double centre = n ? sum / static_cast<double>(n) : 0;
        for (int64_t i = 0; i < g.count(); ++i) {
          const double d = mask[i] ? static_cast<double>(at<T>(x, c, i)) - centre : 0;
          m2 += d * d;
        }
        const Pair<A> pair(centre);
        as<A>(mean)[c] = pair.high;
        as<A>(mean)[g.C + c] = pair.low;
        as<A>(deviation)[c] = static_cast<A>(n ? std::sqrt(m2 / static_cast<double>(n)) : 0);
      }
    });
  });
}

void channel_masked_grad(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const bool* mask, const void* mean,
                         const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    parallel_for(g.C, g.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const A w = weight.data ? static_cast<A>(element(weight, c)) : A(1), r = as<A>(rstd)[c];
        for (int64_t i = 0; i < g.count(); ++i) {
          const A x_hat = (at<T>(x, c, i) - as<A>(mean)[c] - as<A>(mean)[g.C + c]) * r;
          const A away = mask[i] ? as<A>(c2)[c] + x_hat * as<A>(c1)[c] : A(0);
          const int64_t b = i / g.S, s = i % g.S, to = g.last ? i * g.C + c : (b * g.C + c) * g.S + s;
          as<T>(dx.data)[to] = static_cast<T>((at<T>(dy, c, i) * w - away) * r);
        }
      }
    });
  });
}

}  // namespace fastnorm::cpu
