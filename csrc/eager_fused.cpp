// Whole calls of fused norms: gate, autograd and kernel in one, as eager.cpp has them for the plain ones.
#include <algorithm>

#include "checks.h"
#include "eager.h"
#include "whole_call.h"

namespace fastnorm {
namespace {

PyObject *rows_formula = nullptr, *batch_norm_formula = nullptr;

struct Ending {
  std::string activation;
  double alpha = 0;
  bool plain() const { return activation == "identity"; }
};

bool parse_ending(PyObject* activation, PyObject* alpha, Ending& ending) {
  if (!PyUnicode_CheckExact(activation) || !parse(alpha, ending.alpha)) return false;
  ending.activation = PyUnicode_AsUTF8(activation);
  return true;
}

// A tensor of x's shape and dtype, or None.
bool parse_beside(PyObject* object, Maybe& t, const Tensor& x) {
  return parse(object, t, x, x.sizes()) && (!t || t->scalar_type() == x.scalar_type());
}

using Inputs = std::initializer_list<const Tensor*>;
bool wants_grad(Inputs inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor* t) { return t && t->requires_grad(); });
}

// Inference tensors cannot be saved for backward: torch says so before anything has happened.
bool savable(Inputs inputs) {
  return std::none_of(inputs.begin(), inputs.end(), [](const Tensor* t) { return t && t->is_inference(); });
}

// Backward needs z again only where there is an activation: without one neither bias nor residual comes back.
void remember(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
              const Tensor& mean, const Tensor& rstd, const Ending& ending, double eps) {
  const auto again = [&](const Maybe& t) { return ending.plain() ? Tensor() : t.value_or(Tensor()); };
  ctx->save_for_backward({x, weight.value_or(Tensor()), again(bias), again(residual), mean, rstd});
  ctx->saved_data["activation"] = ending.activation;
  ctx->saved_data["alpha"] = ending.alpha;
  ctx->saved_data["eps"] = eps;
  if (bias) ctx->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
}

Ending ending_of(AutogradContext* ctx) {
  return {ctx->saved_data["activation"].toStringRef(), ctx->saved_data["alpha"].toDouble()};
}

// `first`: the place of weight among the inputs; bias and residual follow it.
FusedNeed needed(AutogradContext* ctx, bool dx, const Tensor& weight, const Ending& ending, size_t first) {
  FusedNeed need{dx, std::nullopt, std::nullopt, ctx->needs_input_grad(first + 2) && !ending.plain()};
  if (ctx->needs_input_grad(first)) std::get<1>(need) = weight.scalar_type();
  if (ctx->needs_input_grad(first + 1)) std::get<2>(need) = static_cast<at::ScalarType>(ctx->saved_data["bias"].toInt());
  return need;
}

Tensor or_none(const Maybe& t) { return t.value_or(Tensor()); }

struct RowOptions {
  const Ending& ending;
  double eps;
  int64_t N;
  bool centre;
};

struct FastnormFusedRows : torch::autograd::Function<FastnormFusedRows> {
  static constexpr bool is_traceable = true;  // compiled autograd: all that backward reads is saved, the formula is torch's
  static std::pair<Tensor, Maybe> forward(AutogradContext* ctx, const Tensor& x, const Maybe& addend, const Maybe& weight,
                                          const Maybe& bias, const Maybe& residual, const RowOptions& o) {
    auto [y, h, mean, rstd] = row_fused_fwd(x, addend, weight, bias, residual, o.ending.activation, o.ending.alpha, o.eps, o.N,
                                            o.centre);
    remember(ctx, h ? *h : x, weight, bias, residual, mean, rstd, o.ending, o.eps);
    ctx->set_materialize_grads(false);
    ctx->saved_data["N"] = o.N;
    ctx->saved_data["centre"] = o.centre;
    const Maybe& parameter = weight ? weight : bias;
    if (parameter && parameter->dim() > 1) ctx->saved_data["shape"] = parameter->sizes().vec();
    return {y, h};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const Tensor dy = dys[0], dh = dys.size() > 1 ? dys[1] : Tensor();
    if (!dy.defined()) return {dh, dh, Tensor(), Tensor(), Tensor()};  // only h is used
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Ending ending = ending_of(ctx);
    const bool to_x = ctx->needs_input_grad(0), to_addend = ctx->needs_input_grad(1), to_residual = ctx->needs_input_grad(4);
    const FusedNeed need = needed(ctx, to_x || to_addend, weight, ending, 2);
    const int64_t N = ctx->saved_data["N"].toInt();
    const bool centre = ctx->saved_data["centre"].toBool();
    const Maybe w = given(weight), bias = given(saved[2]), residual = given(saved[3]), added = given(dh);
    const auto [dx, dweight, dbias, dz] =
        differentiable(dy) || (added && differentiable(dh))
            ? call_formula<FusedGrads>(rows_formula, dy, added, x, w, bias, residual, ending.activation, ending.alpha,
                                       ctx->saved_data["eps"].toDouble(), N, centre, need)
            : row_fused_bwd(dy, added, x, residual, w, bias, ending.activation, ending.alpha, saved[4], saved[5], need, centre);
    const auto shape = ctx->saved_data.find("shape");
    const auto sizes = shape == ctx->saved_data.end() ? std::vector<int64_t>{N} : shape->second.toIntVector();
    return {or_none(dx), to_addend ? or_none(dx) : Tensor(), shaped(dweight, sizes), shaped(dbias, sizes),
            to_residual && ending.plain() ? dy : or_none(dz)};
  }
};

struct FastnormFusedBatchNorm : torch::autograd::Function<FastnormFusedBatchNorm> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                        const Ending& ending, const BatchOptions& o) {
    auto [y, mean, rstd, kept] = channel_fused_fwd(x, weight, bias, residual, ending.activation, ending.alpha, o.running_mean,
                                                   o.running_var, o.training, o.momentum, o.eps, o.num_batches_tracked, true);
    remember(ctx, x, weight, bias, kept, mean, rstd, ending, o.eps);
    ctx->saved_data["training"] = o.training;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = dys[0], &x = saved[0], &weight = saved[1], &mean = saved[4], &rstd = saved[5];
    const Ending ending = ending_of(ctx);
    const FusedNeed need = needed(ctx, ctx->needs_input_grad(0), weight, ending, 1);
    const bool training = ctx->saved_data["training"].toBool(), to_residual = ctx->needs_input_grad(3);
    const Maybe w = given(weight), bias = given(saved[2]), kept = given(saved[3]);
    const auto [dx, dweight, dbias, dz] =
        differentiable(dy) ? call_formula<FusedGrads>(batch_norm_formula, dy, x, w, bias, kept, ending.activation,
                                                      ending.alpha, mean, rstd, training,
                                                      ctx->saved_data["eps"].toDouble(), need)
                           : channel_fused_bwd(dy, x, kept, w, bias, ending.activation, ending.alpha, mean, rstd, training,
                                               need);
    return {or_none(dx), or_none(dweight), or_none(dbias), to_residual && ending.plain() ? dy : or_none(dz)};
  }
};

std::pair<Tensor, Maybe> rows_with_grad(const Tensor& x, const Maybe& addend, const Maybe& weight, const Maybe& bias,
                                        const Maybe& residual, const RowOptions& o) {
  const auto node = node_of<FastnormFusedRows>({&x, there(addend), there(weight), there(bias), there(residual)});
  std::pair<Tensor, Maybe> results;
  {
    const at::AutoGradMode no_grad(false);
    results = FastnormFusedRows::forward(&node->ctx_, x, addend, weight, bias, residual, o);
  }
  comes_from(node, results.first);
  if (results.second && (x.requires_grad() || addend->requires_grad())) comes_from(node, *results.second);
  node->save_variables_to_ctx();
  return results;
}

Tensor batch_norm_with_grad(const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& residual,
                            const Ending& ending, const BatchOptions& o) {
  const auto node = node_of<FastnormFusedBatchNorm>({&x, there(weight), there(bias), there(residual)});
  Tensor y;
  {
    const at::AutoGradMode no_grad(false);
    y = FastnormFusedBatchNorm::forward(&node->ctx_, x, weight, bias, residual, ending, o);
  }
  comes_from(node, y);
  node->save_variables_to_ctx();
  return y;
}

}  // namespace

PyObject* fused_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  Maybe addend, weight, bias, residual;
  double eps = 0;
  Ending ending;
  c10::SmallVector<int64_t, 4> shape;
  if (count != 10 || !unwatched() || !parse(args[0], x) || !natively(x) || !parse_beside(args[1], addend, x) ||
      !parse(args[2], shape) || !parse(args[3], weight, x, shape) || !parse(args[4], bias, x, shape) || !parse(args[5], eps) ||
      !parse_ending(args[6], args[7], ending) || !parse_beside(args[8], residual, x) || !PyBool_Check(args[9]) ||
      autocast_dtype(x))
    Py_RETURN_NONE;
  const auto sizes = x.sizes();
  if (sizes.size() < shape.size() || sizes.slice(sizes.size() - shape.size()) != at::IntArrayRef(shape)) Py_RETURN_NONE;
  const Inputs inputs{&x, there(addend), there(weight), there(bias), there(residual)};
  const bool grad = wants_grad(inputs);
  if (grad && !savable(inputs)) Py_RETURN_NONE;
  const RowOptions o{ending, eps, c10::multiply_integers(shape), args[9] == Py_True};
  std::pair<Tensor, Maybe> results;
  {
    const py::gil_scoped_release no_gil;
    if (grad) {
      results = rows_with_grad(x, addend, weight, bias, residual, o);
    } else {
      auto [y, h, mean, rstd] =
          row_fused_fwd(x, addend, weight, bias, residual, ending.activation, ending.alpha, eps, o.N, o.centre);
      results = {y, h};
    }
  }
  PyObject* h = results.second ? THPVariable_Wrap(*results.second) : Py_NewRef(Py_None);
  return Py_BuildValue("NN", THPVariable_Wrap(results.first), h);
  END_HANDLE_TH_ERRORS
}

PyObject* fused_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  if (count != 12 || !unwatched() || !parse(args[0], x) || !natively(x) || x.dim() < 2 || !PyBool_Check(args[5]))
    Py_RETURN_NONE;
  Maybe running_mean, running_var, weight, bias, residual, counter;
  Ending ending;
  const auto C = x.sizes().slice(1, 1);
  BatchOptions o{running_mean, running_var, args[5] == Py_True, 0, 0, counter};
  if (!parse(args[1], running_mean, x, C) || !parse(args[2], running_var, x, C) || !parse(args[3], weight, x, C) ||
      !parse(args[4], bias, x, C) || !parse(args[6], o.momentum) || !parse(args[7], o.eps) ||
      !parse_ending(args[8], args[9], ending) || !parse_beside(args[10], residual, x) ||
      !parse_counter(args[11], counter, x) || !buffers_fit(running_mean, running_var, o.training))
    Py_RETURN_NONE;
  if (!(o.eps >= 0) || (o.training && (o.eps == 0 || x.numel() == C[0]))) Py_RETURN_NONE;
  const Inputs inputs{&x, there(weight), there(bias), there(residual)};
  const bool grad = wants_grad(inputs);
  if (grad && !savable(inputs)) Py_RETURN_NONE;
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = grad ? batch_norm_with_grad(x, weight, bias, residual, ending, o)
             : std::get<0>(channel_fused_fwd(x, weight, bias, residual, ending.activation, ending.alpha, running_mean,
                                             running_var, o.training, o.momentum, o.eps, counter, false));
    if (counter) counter->unsafeGetTensorImpl()->bump_version();
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

void set_fused_differentiable(PyObject* rows_backward, PyObject* batch_norm_backward) {
  Py_XSETREF(rows_formula, Py_NewRef(rows_backward));
  Py_XSETREF(batch_norm_formula, Py_NewRef(batch_norm_backward));
}

}  // namespace fastnorm
