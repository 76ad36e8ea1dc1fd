// Batch norm with what comes after it, y = act(z + residual).
//
// In backward relu's dz costs so little that both passes make it anew. Any other is made once, in the memory of dresidual or of
// dx, and the plain backward reads it there.
#include "channel.h"
#include "epilogue.h"

namespace fastnorm::cpu {
namespace {

// All of these have the first three constants of Standardize; a residual is the last input, where P has room for it.

template <class T, size_t P_>
struct Activated {  // y
  static constexpr size_t P = P_, K = 3, OUTPUTS = 1;
  static constexpr bool TOGETHER = true;
  using V = Vec<T>;
  Epilogue epilogue;

  template <size_t J, class C>
  FN_INLINE void operator()(const InputGroup<T, P, J>& in, const C& c, OutputGroup<T, 1, J>& out) const {
    repeat<J>([&](auto j) FN_LAMBDA {
      out[0][j] = Standardize<T>::value({in[j][0]}, c[j]);
      if constexpr (P == 2) out[0][j] = out[0][j] + in[j][1];
    });
    activate_all(epilogue, out[0]);
  }
};

// z + residual of dy, x and the residual, from x - high
template <class V, size_t P>
FN_INLINE V preactivation(const std::array<V, P>& v, V d, V slope, V intercept) {
  const V z = affine(d, slope, intercept);
  if constexpr (P == 3)
    return z + v[2];
  else
    return z;
}

template <class T, size_t P_>
struct Slope {  // dz of any activation
  static constexpr size_t P = P_, K = 3, OUTPUTS = 1;
  static constexpr bool TOGETHER = true;
  using V = Vec<T>;
  Epilogue epilogue;

  template <size_t J, class C>
  FN_INLINE void operator()(const InputGroup<T, P, J>& in, const C& c, OutputGroup<T, 1, J>& out) const {
    std::array<V, J> dy;
    repeat<J>([&](auto j) FN_LAMBDA {
      dy[j] = in[j][0];
      out[0][j] = preactivation(in[j], in[j][1] - c[j][0], c[j][1], c[j][2]);
    });
    grad_all(epilogue, dy, out[0]);
  }
};

// Relu's backward: high, rstd * weight, bias - low * rstd * weight
template <class T, size_t P_>
struct ReluTerms {  // dz and dz * (x - high)
  static constexpr size_t P = P_, K = 3;
  static constexpr bool GUESS = false;
  using V = Vec<T>;
  FN_INLINE static std::array<V, 2> terms(const std::array<V, P>& v, const std::array<V, 3>& c, int64_t) {
    const V d = v[1] - c[0], dz = relu_grad(v[0], preactivation(v, d, c[1], c[2]));
    return {dz, dz * d};
  }
};
template <class T, size_t P_>
struct ReluGradient {  // dx and dz; and after those constants Gradient's last two
  static constexpr size_t P = P_, K = 5, OUTPUTS = 2;
  static constexpr bool TOGETHER = false;
  using V = Vec<T>;
  bool training;

  template <size_t J, class C>
  FN_INLINE void operator()(const InputGroup<T, P, J>& in, const C& c, OutputGroup<T, 2, J>& out) const {
    repeat<J>([&](auto j) FN_LAMBDA {
      const V d = in[j][1] - c[j][0];
      out[1][j] = relu_grad(in[j][0], preactivation(in[j], d, c[j][1], c[j][2]));
      out[0][j] = training ? grad_input(out[1][j], d, c[j][1], c[j][3], c[j][4]) : out[1][j] * c[j][1];
    });
  }
};

// What of x's shape is dense, or dense (B, S, C).
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

// The backward of one call.
template <class T, size_t P>
struct FusedBackward {
  using A = Acc<T>;
  Channels g;
  Inputs<P> in;
  ConstArray weight, bias;
  Epilogue epilogue;
  A *mean, *rstd;
  bool training;
  Array dx, dweight, dbias, dresidual;

  template <size_t K>
  void set_constants(const Constants<A, K>& constants) const {
    const auto w = Widened<A>::or_else(weight, g.C, 1), b = Widened<A>::or_else(bias, g.C, 0);
    for (int64_t c = 0; c < g.C; ++c) standardize_constants(constants, c, mean[c], mean[g.C + c], rstd[c], w[c], b[c]);
  }

  void relu() const {
    const Constants<A, 5> constants(g.C);
    set_constants(constants);
    const bool through_statistics = training && dx.data, sums_needed = through_statistics || dweight.data || dbias.data;
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
    const std::array<T*, 2> out{as<T>(dx.data), as<T>(dresidual.data)};
    const ReluGradient<T, P> gradient{training};
    with_sweep<T, P>(g, in, [&](const auto& sweep) {
      if (!sums_needed)
        sweep.apply(gradient, constants, out);
      else if (out[0] || out[1])
        sweep.template both<ReluTerms<T, P>>(of, settle, gradient, constants, out);
      else
        sweep.template sum<ReluTerms<T, P>>(of, settle);
    });
  }

  void others() const {
    if (epilogue.activation == Activation::identity && !dresidual.data) return after(*in[0]);
    const Array there = dresidual.data ? dresidual : dx;
    const Buffer<T> own(there.data ? 0 : g.C * g.count());
    T* dz = there.data ? as<T>(there.data) : own;
    const Constants<A, 3> constants(g.C);
    set_constants(constants);
    with_sweep<T, P>(g, in, [&](const auto& sweep) { sweep.apply(Slope<T, P>{epilogue}, constants, {dz}); });
    after(dense_channels(g, {dz, dtype_of<T>}));
  }
  void after(const ChannelsInput& dz) const { channel_bwd(g, dz, *in[1], weight, mean, rstd, training, dx, dweight, dbias); }

  void operator()() const { epilogue.activation == Activation::relu ? relu() : others(); }
};

}  // namespace

void channel_fused_fwd(Channels g, const ChannelsInput& x, const ChannelsInput& residual, ConstArray weight, ConstArray bias,
                       Epilogue epilogue, Array running_mean, Array running_var, int64_t* tracked, bool training,
                       double momentum, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    const auto run = [&](const auto& in, const auto& value) {
      forward<T>(g, in, value, weight, bias, running_mean, running_var, tracked, training, momentum, eps, as<T>(y.data),
                 as<A>(mean), as<A>(rstd));
    };
    if (residual.data)
      run(Inputs<2>{&x, &residual}, Activated<T, 2>{epilogue});
    else
      run(Inputs<1>{&x}, Activated<T, 1>{epilogue});
  });
}

void channel_fused_bwd(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const ChannelsInput& residual,
                       ConstArray weight, ConstArray bias, Epilogue epilogue, const void* mean, const void* rstd, bool training,
                       Array dx, Array dweight, Array dbias, Array dresidual) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    A *m = as<A>(mean), *r = as<A>(rstd);
    if (residual.data)
      FusedBackward<T, 3>{g, {&dy, &x, &residual}, weight, bias, epilogue, m, r, training, dx, dweight, dbias, dresidual}();
    else
      FusedBackward<T, 2>{g, {&dy, &x}, weight, bias, epilogue, m, r, training, dx, dweight, dbias, dresidual}();
  });
}

}  // namespace fastnorm::cpu
