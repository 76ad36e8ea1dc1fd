// Backward of batch norm with what comes after it, y = act(z + residual).
//
// It makes dz a part at a time, in the memory of dresidual or of dx, and the sums of that part follow while it is in cache;
// from then on it is the plain backward. Only relu's without a residual is not kept: made anew in the second pass, it takes
// less time than it takes to write it.
#include "channel.h"
#include "epilogue.h"
#include "kept.h"

namespace fastnorm::cpu {
namespace {

template <class T, size_t P_>
struct Slope {  // dz, from Standardize's constants; a residual is the last input where P has room for it
  static constexpr size_t P = P_, K = 3;
  static constexpr bool TOGETHER = true;
  using V = Vec<T>;
  Epilogue epilogue;

  template <size_t J, class C>
  FN_INLINE std::array<V, J> operator()(const InputGroup<T, P, J>& in, const C& c) const {
    std::array<V, J> dy, z;
    repeat<J>([&](auto j) FN_LAMBDA {
      dy[j] = in[j][0];
      z[j] = before_end<T, 1>(in[j], c[j]);
    });
    grad_all<AMONG_ROWS>(epilogue, dy, z);
    return z;
  }
};

template <class T>
struct ReluTerms {  // dz and dz * (x - high), from the same
  static constexpr size_t P = 2, K = 3;
  static constexpr bool GUESS = false;
  using V = Vec<T>;
  FN_INLINE static std::array<V, 2> terms(const std::array<V, 2>& v, const std::array<V, 3>& c, int64_t) {
    const V d = v[1] - c[0], dz = relu_grad(v[0], affine(d, c[1], c[2]));
    return {dz, dz * d};
  }
};
template <class T>
struct ReluGradient {  // dx; after those constants Gradient's last two, in training
  static constexpr size_t P = 2, K = 5;
  static constexpr bool TOGETHER = false;
  using V = Vec<T>;
  bool training;

  template <size_t J, class C>
  FN_INLINE std::array<V, J> operator()(const InputGroup<T, 2, J>& in, const C& c) const {
    std::array<V, J> dx;
    repeat<J>([&](auto j) FN_LAMBDA {
      const V d = in[j][1] - c[j][0], dz = relu_grad(in[j][0], affine(d, c[j][1], c[j][2]));
      dx[j] = training ? grad_input(dz, d, c[j][1], c[j][3], c[j][4]) : dz * c[j][1];
    });
    return dx;
  }
};

// A result of x's shape, dense or dense (B, S, C).
ChannelsInput dense_channels(Channels g, ConstArray of) {
  const int64_t step = g.last ? g.C : 1;
  ChannelsInput in;
  static_cast<ConstArray&>(in) = of;
  in.sample = g.C * g.S;
  in.channel = g.last ? 1 : g.S;
  in.space.push(g.S, step);
  in.positions.push(g.B, in.sample);
  in.positions.push(g.S, step);
  return in;
}

template <class T>
struct FusedBackward {
  using A = Acc<T>;
  Channels g;
  ConstArray weight, bias;
  const A *mean, *rstd;
  bool training;
  T* dx;
  Array dweight, dbias;

  template <size_t K>
  void set_constants(const Constants<A, K>& constants) const {
    const auto w = Widened<A>::or_else(weight, g.C, 1), b = Widened<A>::or_else(bias, g.C, 0);
    for (int64_t c = 0; c < g.C; ++c) standardize_constants(constants, c, mean[c], mean[g.C + c], rstd[c], w[c], b[c]);
  }
  bool sums_needed() const { return (training && dx) || dweight.data || dbias.data; }

  void relu(const ChannelsInput& dy, const ChannelsInput& x) const {
    const Constants<A, 5> constants(g.C);
    set_constants(constants);
    const auto settle = [&](int64_t c, const std::array<double, 2>& sums) {
      const double n = static_cast<double>(g.count()), low = static_cast<double>(mean[g.C + c]);
      const double sum_dz_x_hat = (sums[1] - low * sums[0]) * static_cast<double>(rstd[c]);
      if (dweight.data) set_element(dweight, c, sum_dz_x_hat);
      if (dbias.data) set_element(dbias, c, sums[0]);
      const double c1_rstd = sum_dz_x_hat / n * static_cast<double>(rstd[c]);
      constants[3][c] = static_cast<A>(c1_rstd);
      constants[4][c] = static_cast<A>(sums[0] / n - low * c1_rstd);
      return true;
    };
    const std::array<A*, 3> of{constants[0], constants[1], constants[2]};
    const ReluGradient<T> gradient{training};
    with_sweep<T, 2>(g, {&dy, &x}, [&](const auto& sweep) {
      if (dx && sums_needed())
        sweep.template both<ReluTerms<T>>(of, settle, gradient, constants, dx);
      else if (dx)
        sweep.apply(gradient, constants, dx);
      else
        sweep.template sum<ReluTerms<T>>(of, settle);
    });
  }

  // dz is dy where z's bit is set: dy and bits are in y's order. It is made a part at a time and read again from there, or made
  // in both passes, where that is as fast.
  void kept(const ChannelsInput& dy, const ChannelsInput& x, const uint8_t* bits, T* dresidual) const {
    bool done = false;
    if (training && dx)
      with_sweep<T, 2>(g, {&dy, &x}, [&](const auto& sweep) {
        if constexpr (std::decay_t<decltype(sweep)>::TAKES_MARKS) {
          if (!sweep.takes_marks()) return;
          done = true;
          backward<T>(g, dy, weight, mean, rstd, training, dx, dweight, dbias, [&](const auto& passes) {
            passes(sweep.marked({data<T>(dy), bits, dresidual}), Nothing{});
          });
        }
      });
    if (!done) kept_in_parts(data<T>(dy), x, bits, dresidual);
  }

  void kept_in_parts(const T* dy, const ChannelsInput& x, const uint8_t* bits, T* dresidual) const {
    const Buffer<T> own(dresidual || dx ? 0 : g.C * g.count());
    T* to = dresidual ? dresidual : dx ? dx : own;
    const ChannelsInput dz = dense_channels(g, {to, dtype_of<T>});
    const auto keep = [&](int64_t i, int64_t n) { keep_marked(dy, bits, i, n, to); };
    const auto keep_all = [&] {
      constexpr int64_t PART = 16384;
      const int64_t n = g.C * g.count();
      parallel_for(ceil_div(n, PART), PART, [&](int64_t begin, int64_t end) {
        keep(begin * PART, std::min(n, end * PART) - begin * PART);
      });
    };
    if (!sums_needed()) keep_all();
    backward<T>(g, dz, weight, mean, rstd, training, dx, dweight, dbias, [&](const auto& passes) {
      with_sweep<T, 2>(g, {&dz, &x}, [&](const auto& sweep) {
        if (sweep.in_runs()) return passes(sweep, sweep.runs(keep));
        keep_all();
        passes(sweep, Nothing{});
      });
    });
  }

  template <class Value>
  void others(const Inputs<Value::P>& in, const Value& slope, T* dresidual) const {
    constexpr size_t P = Value::P;
    const Buffer<T> own(dresidual || dx ? 0 : g.C * g.count());
    T* to = dresidual ? dresidual : dx ? dx : own;
    const ChannelsInput dz = dense_channels(g, {to, dtype_of<T>});
    const Constants<A, 3> constants(g.C);
    set_constants(constants);
    if (!sums_needed()) with_sweep<T, P>(g, in, [&](const auto& sweep) { sweep.apply(slope, constants, to); });
    backward<T>(g, dz, weight, mean, rstd, training, dx, dweight, dbias, [&](const auto& passes) {
      with_sweep<T, P>(g, in, [&](const auto& sweep) {
        passes(sweep.over(Inputs<2>{&dz, in[1]}), sweep.maker(slope, constants, to));
      });
    });
  }
};

}  // namespace

void channel_fused_bwd(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const ChannelsInput& residual,
                       const uint8_t* kept, ConstArray weight, ConstArray bias, Epilogue epilogue, const void* mean,
                       const void* rstd, bool training, Array dx, Array dweight, Array dbias, Array dresidual) {
  if (epilogue.activation == Activation::identity && !dresidual.data)
    return channel_bwd(g, dy, x, weight, mean, rstd, training, dx, dweight, dbias);
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const FusedBackward<T> run{g, weight, bias, as<A>(mean), as<A>(rstd), training, as<T>(dx.data), dweight, dbias};
    if (kept)
      run.kept(dy, x, kept, as<T>(dresidual.data));
    else if (residual.data)
      run.others({&dy, &x, &residual}, Slope<T, 3>{epilogue}, as<T>(dresidual.data));
    else if (epilogue.activation == Activation::relu && !dresidual.data)
      run.relu(dy, x);
    else
      run.others({&dy, &x}, Slope<T, 2>{epilogue}, as<T>(dresidual.data));
  });
}

}  // namespace fastnorm::cpu
