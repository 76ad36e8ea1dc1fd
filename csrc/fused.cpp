// The fused functions of the contract over tensors: a norm with what surrounds it.
#include <array>
#include <cmath>

#include "tensors.h"

namespace fastnorm {
namespace {

Epilogue epilogue(const std::string& activation, double alpha) {
  constexpr std::array<const char*, 9> NAMES{"identity",  "relu",    "leaky_relu", "silu", "gelu",
                                             "gelu_tanh", "sigmoid", "tanh",       "elu"};
  for (size_t i = 0; i < NAMES.size(); ++i)
    if (activation == NAMES[i]) return {static_cast<Activation>(i), alpha};
  TORCH_CHECK_VALUE(false, "fastnorm has no activation ", activation);
}

// The rows of a tensor of x's shape, in x's dtype; `keep` owns what the kernels read.
RowsInput rows_beside(const Maybe& t, const char* name, int64_t N, const Tensor& x, Tensor& keep) {
  if (!t) return {};
  check_beside(*t, name, x);
  TORCH_CHECK(t->sizes() == x.sizes(), name, " should have x's shape ", text(x.sizes()), ", got ", text(t->sizes()));
  const Tensor same = as(*t, x.scalar_type());
  RowsInput in = rows_input(same, name, N, x, keep);
  if (!keep.defined()) keep = same;
  return in;
}

// The parts of weight and bias, which are alike; see Rows.
int64_t parts(const Maybe& weight, const Maybe& bias, Rows g) {
  const int64_t n = weight ? weight->numel() : bias ? bias->numel() : g.N;
  TORCH_CHECK(n % g.N == 0 && n > 0 && g.M % (n / g.N) == 0, "weight or bias with ", text(n), " elements has no parts for ",
              text(g.M), " rows of ", text(g.N));
  return n / g.N;
}

FusedGrads given(Maybe dx, Maybe dweight, Maybe dbias, Maybe dresidual, const FusedNeed& need) {
  return {std::move(dx), wanted(std::move(dweight), std::get<1>(need)), wanted(std::move(dbias), std::get<2>(need)),
          std::move(dresidual)};
}

// What channel_fused_fwd keeps for each element in the place of a residual; whole words are read of it.
int64_t bytes_of_bits(int64_t n) { return (n + 7) / 8 + 8; }

// Groups of the channels of x, M of them in all its samples.
Groups groups_of(const Tensor& x, int64_t M) {
  const int64_t B = x.size(0), C = channels_of(x);
  TORCH_CHECK(M > 0 && M % B == 0 && C % (M / B) == 0, text(C), " channels of ", text(B), " samples are not ", text(M),
              " groups");
  return {B, C, x.numel() / (B * C), C / (M / B)};
}

Positions positions_of(const Tensor& x) {
  const int64_t C = channels_of(x);
  return {x.size(0), C, x.numel() / (x.size(0) * C)};
}

// A tensor of x's shape in x's dtype, dense; `keep` owns a copy.
ConstArray dense_beside(const Tensor& t, const char* name, const Tensor& x, Tensor& keep) {
  check_beside(t, name, x);
  TORCH_CHECK(t.sizes() == x.sizes(), name, " should have x's shape ", text(x.sizes()), ", got ", text(t.sizes()));
  keep = as(t, x.scalar_type()).contiguous();
  return input(keep, name, x);
}

// The rows that scales are for.
Rows branch_rows(const Tensor& x, const Maybe& row_scale, const Maybe& column_scale) {
  check_served(x);
  const int64_t n = x.numel(), R = row_scale ? row_scale->numel() : 1, last = x.dim() > 0 && n > 0 ? x.size(-1) : 1;
  const int64_t N = column_scale ? column_scale->numel() : R > 0 && n % (R * last) == 0 ? last : n;
  TORCH_CHECK(n > 0 && R > 0 && N > 0 && n % (R * N) == 0, text(n), " elements are not rows for ", text(R),
              " row scales and columns for ", text(N), " column scales");
  return {n / N, N, R};
}

// `keep` owns the bytes of the mask.
RowMask row_mask(const Tensor& mask, Rows g, const Tensor& x, Tensor& keep) {
  check_beside(mask, "mask", x);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.dim() == 2 && mask.numel() > 0 && g.M % mask.size(0) == 0 &&
                  g.N % mask.size(1) == 0,
              "a mask of shape ", text(mask.sizes()), " is none for ", text(g.M), " rows of ", text(g.N));
  keep = mask.contiguous();
  return {keep.const_data_ptr<bool>(), mask.size(0), mask.size(1)};
}

// A scale in x's accumulate dtype, dense; `keep` owns a copy.
const void* scale_of(const Maybe& t, const char* name, const Tensor& x, Tensor& keep) {
  if (!t) return nullptr;
  check_beside(*t, name, x);
  keep = as(*t, accumulate_type(x)).contiguous();
  return keep.const_data_ptr();
}

// `keep` owns a copy of the seed.
Dropout dropout(double p, const Maybe& seed, const Tensor& x, Tensor& keep) {
  TORCH_CHECK(p >= 0 && p <= 1, "a probability is between 0 and 1");
  if (p == 0) return {};
  TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong, "the seed should be one int64");
  check_beside(*seed, "seed", x);
  keep = seed->contiguous();
  if (p == 1) return {keep.const_data_ptr<int64_t>(), 0, 0};
  constexpr double WORDS = 4294967296.0;
  return {keep.const_data_ptr<int64_t>(), static_cast<uint32_t>(std::min(std::nearbyint(p * WORDS), WORDS - 1)), 1 / (1 - p)};
}

}  // namespace

std::tuple<Tensor, Maybe, Tensor, Tensor> row_fused_fwd(const Tensor& x, const Maybe& addend, const Maybe& weight,
                                                        const Maybe& bias, const Maybe& residual,
                                                        const std::string& activation, double alpha, double eps, int64_t N,
                                                        bool centre) {
  On on(x);
  TORCH_CHECK(N > 0 && x.numel() > 0 && x.numel() % N == 0, "x with ", text(x.numel()), " elements is not rows of ", text(N));
  Tensor keep, keep_addend, keep_residual, w, b;
  Rows g{x.numel() / N, N};
  g.P = parts(weight, bias, g);
  const RowsInput in = rows_input(x, "x", N, x, keep), a = rows_beside(addend, "addend", N, x, keep_addend),
                  r = rows_beside(residual, "residual", N, x, keep_residual);
  const Maybe h = addend ? Maybe(empty_result(x, x.scalar_type())) : std::nullopt;
  Tensor y = empty_result(x, x.scalar_type());
  SavedStatistics saved;
  const Statistics s = saved.make(x, g.M);
  on(&Kernels::row_fused_fwd, g, in, a, r, parameter(on, weight, "weight", g.P * N, x, w),
     parameter(on, bias, "bias", g.P * N, x, b), epilogue(activation, alpha), centre, eps, maybe(h), output(y), s.mean, s.rstd);
  return {y, h, saved.mean, saved.rstd};
}

FusedGrads row_fused_bwd(const Tensor& dy, const Maybe& dh, const Tensor& x, const Maybe& residual, const Maybe& weight,
                         const Maybe& bias, const std::string& activation, double alpha, const Tensor& mean,
                         const Tensor& rstd, const FusedNeed& need, bool centre) {
  On on(x);
  const int64_t M = rstd.numel();
  TORCH_CHECK(M > 0 && x.numel() > 0 && x.numel() % M == 0, "x with ", text(x.numel()), " elements is not ", text(M), " rows");
  Rows g{M, x.numel() / M};
  g.P = parts(weight, bias, g);
  Tensor keep, keep_dy, keep_dh, keep_residual, w, b;
  const RowsInput in = rows_input(x, "x", g.N, x, keep), dy_in = rows_beside(dy, "dy", g.N, x, keep_dy),
                  dh_in = rows_beside(dh, "dh", g.N, x, keep_dh), r = rows_beside(residual, "residual", g.N, x, keep_residual);
  const auto result = [&](bool wanted) { return wanted ? Maybe(empty_result(x, x.scalar_type())) : std::nullopt; };
  const Maybe dx = result(std::get<0>(need)), dresidual = result(std::get<3>(need));
  const int64_t n = g.P * g.N;
  const Maybe dweight = empty_grad(on, x, std::get<1>(need), n), dbias = empty_grad(on, x, std::get<2>(need), n);
  on(&Kernels::row_fused_bwd, g, dy_in, dh_in, in, r, parameter(on, weight, "weight", n, x, w),
     parameter(on, bias, "bias", n, x, b), epilogue(activation, alpha), centre, statistic(mean, "mean", x, 2 * M),
     statistic(rstd, "rstd", x, M), maybe(dx), maybe(dweight), maybe(dbias), maybe(dresidual));
  return given(dx, dweight, dbias, dresidual, need);
}

std::tuple<Tensor, Tensor, Tensor, Maybe> channel_fused_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                                            const Maybe& residual, const std::string& activation,
                                                            double alpha, const Maybe& running_mean, const Maybe& running_var,
                                                            bool training, double momentum, double eps,
                                                            const Maybe& num_batches_tracked, bool keep) {
  TORCH_CHECK(running_mean.has_value() == running_var.has_value() && (training || running_mean),
              "running_mean and running_var are given together, and always in evaluation");
  On on(x);
  const Shaped d(x);
  const int64_t C = d.g.C;
  const Running m(on, running_mean, "running_mean", C, x), v(on, running_var, "running_var", C, x);
  int64_t* tracked = nullptr;
  if (num_batches_tracked) {
    check_beside(*num_batches_tracked, "num_batches_tracked", x);
    check_numel(*num_batches_tracked, "num_batches_tracked", 1);
    if (training) tracked = num_batches_tracked->mutable_data_ptr<int64_t>();
  }
  Tensor keep_residual, w, b, y = d.empty_like();
  const ChannelsInput r = residual ? d.beside(*residual, "residual", keep_residual) : ChannelsInput{};
  SavedStatistics saved;
  const Statistics s = saved.make(x, C);
  const Epilogue end = epilogue(activation, alpha);
  Maybe kept = keep ? residual : std::nullopt;
  uint8_t* bits = nullptr;
  if (kept && end.activation == Activation::relu && !on.gpu()) {
    kept = empty(x, {bytes_of_bits(x.numel())}, at::kByte);
    bits = kept->mutable_data_ptr<uint8_t>();
  }
  on(&Kernels::channel_fused_fwd, d.g, d.in, r, parameter(on, weight, "weight", C, x, w), parameter(on, bias, "bias", C, x, b),
     end, m.array(), v.array(), tracked, training, momentum, eps, output(y), bits, s.mean, s.rstd);
  if (training) m.write_back(), v.write_back();
  return {y, saved.mean, saved.rstd, kept};
}

FusedGrads channel_fused_bwd(const Tensor& dy_, const Tensor& x, const Maybe& kept, const Maybe& weight, const Maybe& bias,
                             const std::string& activation, double alpha, const Tensor& mean, const Tensor& rstd,
                             bool training, const FusedNeed& need) {
  On on(x);
  Shaped d(x);
  const int64_t C = d.g.C;
  Tensor keep_residual, w, b;
  const Epilogue end = epilogue(activation, alpha);
  const bool in_bits = kept && kept->scalar_type() == at::kByte;
  TORCH_CHECK(!in_bits || (end.activation == Activation::relu && !on.gpu() && kept->numel() == bytes_of_bits(x.numel())),
              "bits of z are kept for relu, by the kernels that read them");
  const Tensor dy = in_bits ? dy_.contiguous(d.format) : dy_;  // in the order of the bits
  const ChannelsInput dy_in = d.gradient(dy),
                      r = kept && !in_bits ? d.beside(*kept, "residual", keep_residual) : ChannelsInput{};
  const auto result = [&](bool wanted) { return wanted ? Maybe(d.empty_like()) : std::nullopt; };
  const Maybe dx = result(std::get<0>(need)), dresidual = result(std::get<3>(need));
  const Maybe dweight = empty_grad(on, x, std::get<1>(need), C), dbias = empty_grad(on, x, std::get<2>(need), C);
  on(&Kernels::channel_fused_bwd, d.g, dy_in, d.in, r, in_bits ? kept->const_data_ptr<uint8_t>() : nullptr,
     parameter(on, weight, "weight", C, x, w), parameter(on, bias, "bias", C, x, b), end, statistic(mean, "mean", x, 2 * C),
     statistic(rstd, "rstd", x, C), training, maybe(dx), maybe(dweight), maybe(dbias), maybe(dresidual));
  return given(dx, dweight, dbias, dresidual, need);
}

// Norms of (B, C, *) with parameters of channels that end in an activation, M of them: group norm, layer norm over channels.
template <class G, class F>
std::tuple<Tensor, Tensor, Tensor> ended_fwd(F Kernels::* function, const G& g, const Tensor& x, const Maybe& weight,
                                             const Maybe& bias, const Epilogue& epilogue, double eps) {
  On on(x);
  Tensor keep, w, b, y = empty_result(x, x.scalar_type());
  SavedStatistics saved;
  const Statistics s = saved.make(x, g.M());
  on(function, g, dense_beside(x, "x", x, keep), parameter(on, weight, "weight", g.C, x, w),
     parameter(on, bias, "bias", g.C, x, b), epilogue, eps, output(y), s.mean, s.rstd);
  return {y, saved.mean, saved.rstd};
}

template <class G, class F>
Grads ended_bwd(F Kernels::* function, const G& g, const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias,
                const Epilogue& epilogue, const Tensor& mean, const Tensor& rstd, const Need& need) {
  On on(x);
  Tensor keep, keep_dy, w, b;
  const Maybe dx = std::get<0>(need) ? Maybe(empty_result(x, x.scalar_type())) : std::nullopt;
  Maybe dweight = empty_grad(on, x, std::get<1>(need), g.C), dbias = empty_grad(on, x, std::get<2>(need), g.C);
  on(function, g, dense_beside(dy, "dy", x, keep_dy), dense_beside(x, "x", x, keep),
     parameter(on, weight, "weight", g.C, x, w), parameter(on, bias, "bias", g.C, x, b), epilogue,
     statistic(mean, "mean", x, 2 * g.M()), statistic(rstd, "rstd", x, g.M()), maybe(dx), maybe(dweight), maybe(dbias));
  return {dx, wanted(std::move(dweight), std::get<1>(need)), wanted(std::move(dbias), std::get<2>(need))};
}

std::tuple<Tensor, Tensor, Tensor> group_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                             const std::string& activation, double alpha, double eps, int64_t groups) {
  channels_of(x);
  return ended_fwd(&Kernels::group_fwd, groups_of(x, groups * x.size(0)), x, weight, bias, epilogue(activation, alpha), eps);
}

Grads group_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias, const std::string& activation,
                double alpha, const Tensor& mean, const Tensor& rstd, const Need& need) {
  channels_of(x);
  return ended_bwd(&Kernels::group_bwd, groups_of(x, rstd.numel()), dy, x, weight, bias, epilogue(activation, alpha), mean,
                   rstd, need);
}

std::tuple<Tensor, Tensor, Tensor> position_fwd(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                                const std::string& activation, double alpha, double eps) {
  return ended_fwd(&Kernels::position_fwd, positions_of(x), x, weight, bias, epilogue(activation, alpha), eps);
}

Grads position_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias, const std::string& activation,
                   double alpha, const Tensor& mean, const Tensor& rstd, const Need& need) {
  return ended_bwd(&Kernels::position_bwd, positions_of(x), dy, x, weight, bias, epilogue(activation, alpha), mean, rstd, need);
}

std::tuple<Tensor, Tensor, Tensor> row_masked_fwd(const Tensor& x, const Tensor& mask, const Maybe& weight, const Maybe& bias,
                                                  double eps, int64_t N) {
  On on(x);
  TORCH_CHECK(N > 0 && x.numel() > 0 && x.numel() % N == 0, "x with ", text(x.numel()), " elements is not rows of ", text(N));
  const Rows g{x.numel() / N, N};
  Tensor keep, keep_mask, w, b, y = empty_result(x, x.scalar_type());
  SavedStatistics saved;
  const Statistics s = saved.make(x, g.M);
  on(&Kernels::row_masked_fwd, g, row_mask(mask, g, x, keep_mask), rows_input(x, "x", N, x, keep),
     parameter(on, weight, "weight", N, x, w), parameter(on, bias, "bias", N, x, b), eps, output(y), s.mean, s.rstd);
  return {y, saved.mean, saved.rstd};
}

Grads row_masked_bwd(const Tensor& dy, const Tensor& x, const Tensor& mask, const Maybe& weight, const Tensor& mean,
                     const Tensor& rstd, const Need& need) {
  On on(x);
  const int64_t M = rstd.numel();
  TORCH_CHECK(M > 0 && x.numel() > 0 && x.numel() % M == 0, "x with ", text(x.numel()), " elements is not ", text(M), " rows");
  const Rows g{M, x.numel() / M};
  Tensor keep, keep_dy, keep_mask, w;
  const Maybe dx = std::get<0>(need) ? Maybe(empty_result(x, x.scalar_type())) : std::nullopt;
  Maybe dweight = empty_grad(on, x, std::get<1>(need), g.N), dbias = empty_grad(on, x, std::get<2>(need), g.N);
  on(&Kernels::row_masked_bwd, g, row_mask(mask, g, x, keep_mask), rows_beside(dy, "dy", g.N, x, keep_dy),
     rows_input(x, "x", g.N, x, keep), parameter(on, weight, "weight", g.N, x, w), statistic(mean, "mean", x, 2 * M),
     statistic(rstd, "rstd", x, M), maybe(dx), maybe(dweight), maybe(dbias));
  return {dx, wanted(std::move(dweight), std::get<1>(need)), wanted(std::move(dbias), std::get<2>(need))};
}

Tensor branch_fwd(const Tensor& x, const Tensor& addend, const Maybe& row_scale, const Maybe& column_scale, double p,
                  const Maybe& seed, at::ScalarType dtype) {
  On on(x);
  Tensor keep, keep_addend, keep_seed, r, c, h = empty_result(x, dtype);
  const Rows g = branch_rows(x, row_scale, column_scale);
  check_beside(addend, "addend", x);
  TORCH_CHECK(addend.sizes() == x.sizes(), "addend should have x's shape ", text(x.sizes()), ", got ", text(addend.sizes()));
  keep = x.contiguous();
  keep_addend = readable(addend, x).contiguous();
  TORCH_CHECK(dtype == x.scalar_type() || dtype == accumulate_type(x), "h should be in x's dtype or in ", accumulate_type(x));
  on(&Kernels::branch_fwd, g, input(keep, "x", x), input(keep_addend, "addend", x), scale_of(row_scale, "row_scale", x, r),
     scale_of(column_scale, "column_scale", x, c), dropout(p, seed, x, keep_seed), output(h));
  return h;
}

std::tuple<Maybe, Maybe> branch_bwd(const Tensor& dh, const Maybe& x, const Maybe& row_scale, const Maybe& column_scale,
                                    double p, const Maybe& seed, MaybeType dx_dtype, MaybeType dcolumn_dtype) {
  On on(dh);
  TORCH_CHECK(!dcolumn_dtype || (x && column_scale), "dcolumn_scale needs x and column_scale");
  TORCH_CHECK(!x || x->sizes() == dh.sizes(), "x should have dh's shape ", text(dh.sizes()));
  const Rows g = branch_rows(dh, row_scale, column_scale);
  Tensor keep = dh.contiguous(), keep_x, keep_seed, r, c;
  if (dcolumn_dtype) keep_x = x->contiguous();
  const Maybe dx = dx_dtype ? Maybe(empty_result(dh, *dx_dtype)) : std::nullopt;
  Maybe dcolumn = empty_grad(on, dh, dcolumn_dtype, g.N);
  on(&Kernels::branch_bwd, g, input(keep, "dh", dh), dcolumn_dtype ? input(keep_x, "x", dh) : ConstArray{},
     scale_of(row_scale, "row_scale", dh, r), scale_of(column_scale, "column_scale", dh, c), dropout(p, seed, dh, keep_seed),
     maybe(dx), maybe(dcolumn));
  return {dx, wanted(std::move(dcolumn), dcolumn_dtype)};
}

}  // namespace fastnorm
