// The eager path at torch's own cost: what functional.py and autograd.py do in Python for every backend, in C++ for the CPU's
// kernels and for replayed ones.
// Raw CPython entries and a C++ autograd node: an 8 x 64 call is a few microseconds, so each crossing counts.
#include "eager.h"

#include <ATen/autocast_mode.h>

#include "checks.h"
#include "replay.h"
#include "whole_call.h"

namespace fastnorm {
namespace {

PyObject *layer_norm_formula = nullptr, *batch_norm_formula = nullptr;
PyObject* config = nullptr;  // fastnorm.config
std::atomic<bool> native_serves[2] = {};  // on the CPU, on CUDA

// Inference tensors cannot be saved for backward: torch says so before anything has happened.
bool savable(const Tensor& x, const Maybe& weight) { return !x.is_inference() && !(weight && weight->is_inference()); }

bool wants_grad(const Tensor& x, const Maybe& weight, const Maybe& bias) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || (weight && weight->requires_grad()) || (bias && bias->requires_grad()));
}

// ---------------------------------------------------------------- autograd
// Statistics of a call without a graph: forgotten at its end.
class ScratchStatistics {
 public:
  Statistics make(const Tensor& x, int64_t n) {
    if (!x.is_cpu()) return there_.make(x, n);
    const int64_t each = n * (x.scalar_type() == at::kDouble ? 8 : 4);  // bytes
    all_.resize_for_overwrite(static_cast<size_t>(3 * each + 7) / 8);
    return {all_.data(), reinterpret_cast<char*>(all_.data()) + 2 * each};
  }

 private:
  c10::SmallVector<double, 32> all_;
  SavedStatistics there_;
};

// The two that serve: one contract, with `saved` for a call with a graph.
struct Native {
  static Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype,
                            SavedStatistics* saved) {
    ScratchStatistics scratch;
    return fastnorm::row_forward(x, weight, bias, eps, N, dtype, [&] {
      return saved ? saved->make(x, x.numel() / N) : scratch.make(x, x.numel() / N);
    });
  }
  static Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o,
                                SavedStatistics* saved) {
    ScratchStatistics scratch;
    return fastnorm::channel_forward(x, weight, bias, o, [&] {
      return saved ? saved->make(x, x.size(1)) : scratch.make(x, x.size(1));
    });
  }
  static constexpr auto row_bwd = fastnorm::row_bwd;
  static constexpr auto channel_bwd = fastnorm::channel_bwd;
};

struct Replayed {
  static constexpr auto row_forward = replay::row_forward;
  static constexpr auto channel_forward = replay::channel_forward;
  static constexpr auto row_bwd = replay::row_bwd;
  static constexpr auto channel_bwd = replay::channel_bwd;
};

// What backward has to know beside the saved tensors, in few entries, for each has its price; of bias, whose values it does not
// need, the dtype, where that is not the weight's.
void remember(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias, const SavedStatistics& s,
              double eps) {
  ctx->save_for_backward({x, weight.value_or(Tensor()), s.mean, s.rstd});
  ctx->saved_data["eps"] = eps;
  if (bias && bias->scalar_type() != (weight ? *weight : x).scalar_type())
    ctx->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
}

// Which gradients are wanted; absent parameters have an edge that leads nowhere.
Need needed(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
  Need need{ctx->needs_input_grad(0), std::nullopt, std::nullopt};
  if (ctx->needs_input_grad(1)) std::get<1>(need) = weight.scalar_type();
  if (!ctx->needs_input_grad(2)) return need;
  const auto other = ctx->saved_data.find("bias");
  std::get<2>(need) = other != ctx->saved_data.end() ? static_cast<at::ScalarType>(other->second.toInt())
                                                     : (weight.defined() ? weight : x).scalar_type();
  return need;
}

template <class T, class... Args>
Tensor apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Args&... args) {
  const auto node = node_of<T>({&x, there(weight), there(bias)});
  Tensor y;
  {
    const at::AutoGradMode no_grad(false);
    y = T::forward(&node->ctx_, x, weight, bias, args...);
  }
  comes_from(node, y);
  node->save_variables_to_ctx();
  return y;
}

template <class Backend>
struct FastnormLayerNorm : torch::autograd::Function<FastnormLayerNorm<Backend>> {
  static constexpr bool is_traceable = true;  // compiled autograd: all that backward reads is saved, the formula is torch's
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N,
                        MaybeType dtype) {
    SavedStatistics s;
    Tensor y = Backend::row_forward(x, weight, bias, eps, N, dtype, &s);
    remember(ctx, x, weight, bias, s, eps);
    ctx->saved_data["N"] = N;  // compiled autograd asks again with symbols in the place of sizes
    const Maybe& parameter = weight ? weight : bias;
    if (parameter && parameter->dim() > 1) ctx->saved_data["shape"] = parameter->sizes().vec();
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[3];
    const Need need = needed(ctx, x, weight);
    const int64_t N = ctx->saved_data["N"].toInt();
    const auto [dx, dweight, dbias] = differentiable(dy[0])
                                          ? call_formula<Grads>(layer_norm_formula, dy[0], x, given(weight), N,
                                                                ctx->saved_data["eps"].toDouble(), need)
                                                            : Backend::row_bwd(dy[0], x, given(weight), saved[2], rstd, need);
    const auto shape = ctx->saved_data.find("shape");
    const auto sizes = shape == ctx->saved_data.end() ? std::vector<int64_t>{N} : shape->second.toIntVector();
    return {dx.value_or(Tensor()), shaped(dweight, sizes), shaped(dbias, sizes)};
  }
};

template <class Backend>
struct FastnormBatchNorm : torch::autograd::Function<FastnormBatchNorm<Backend>> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o) {
    SavedStatistics s;
    Tensor y = Backend::channel_forward(x, weight, bias, o, &s);
    remember(ctx, x, weight, bias, s, o.eps);
    ctx->saved_data["training"] = o.training;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &rstd = saved[3];
    const Need need = needed(ctx, x, weight);
    const bool training = ctx->saved_data["training"].toBool();
    const auto [dx, dweight, dbias] = differentiable(dy[0])
                                          ? call_formula<Grads>(batch_norm_formula, dy[0], x, given(weight), mean, rstd,
                                                                training, ctx->saved_data["eps"].toDouble(), need)
                                          : Backend::channel_bwd(dy[0], x, given(weight), mean, rstd, training, need);
    return {dx.value_or(Tensor()), dweight.value_or(Tensor()), dbias.value_or(Tensor())};
  }
};

// ---------------------------------------------------------------- entries

// Which of the two serves x's device, if one does.
enum class Serving { nobody, native, replayed };
Serving serving(const Tensor& x) {
  if (natively(x)) return Serving::native;
  return replay::serves(x.device().type()) ? Serving::replayed : Serving::nobody;
}

template <class Backend>
Tensor layer_norm_on(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype) {
  return wants_grad(x, weight, bias) ? apply<FastnormLayerNorm<Backend>>(x, weight, bias, eps, N, dtype)
                                     : Backend::row_forward(x, weight, bias, eps, N, dtype, nullptr);
}

template <class Backend>
Tensor batch_norm_on(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o) {
  return wants_grad(x, weight, bias) ? apply<FastnormBatchNorm<Backend>>(x, weight, bias, o)
                                     : Backend::channel_forward(x, weight, bias, o, nullptr);
}

PyObject* layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  Maybe weight, bias;
  double eps = 0;
  c10::SmallVector<int64_t, 4> shape;
  if (count != 5 || !unwatched() || !parse(args[0], x) || !parse(args[1], shape) || !parse(args[2], weight, x, shape) ||
      !parse(args[3], bias, x, shape) || !parse(args[4], eps))
    Py_RETURN_NONE;
  const auto sizes = x.sizes();
  if (sizes.size() < shape.size() || sizes.slice(sizes.size() - shape.size()) != at::IntArrayRef(shape)) Py_RETURN_NONE;
  const int64_t N = c10::multiply_integers(shape);
  const Serving by = serving(x);
  if (by == Serving::nobody || (wants_grad(x, weight, bias) && !savable(x, weight))) Py_RETURN_NONE;
  const MaybeType dtype = autocast_dtype(x);
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = (by == Serving::native ? layer_norm_on<Native> : layer_norm_on<Replayed>)(x, weight, bias, eps, N, dtype);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor x;
  if (count < 8 || count > 9 || !unwatched() || !parse(args[0], x) || x.dim() < 2 || !PyBool_Check(args[5])) Py_RETURN_NONE;
  Maybe running_mean, running_var, weight, bias, counter;
  const auto C = x.sizes().slice(1, 1);
  BatchOptions o{running_mean, running_var, args[5] == Py_True, 0, 0, counter};
  if (!parse(args[1], running_mean, x, C) || !parse(args[2], running_var, x, C) || !parse(args[3], weight, x, C) ||
      !parse(args[4], bias, x, C) || !parse(args[6], o.momentum) || !parse(args[7], o.eps) ||
      (count == 9 && !parse_counter(args[8], counter, x)) ||
      !buffers_fit(running_mean, running_var, o.training))
    Py_RETURN_NONE;
  if (!(o.eps >= 0) || (o.training && (o.eps == 0 || x.numel() == C[0]))) Py_RETURN_NONE;
  const Serving by = serving(x);
  if (by == Serving::nobody || (wants_grad(x, weight, bias) && !savable(x, weight))) Py_RETURN_NONE;
  Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = (by == Serving::native ? batch_norm_on<Native> : batch_norm_on<Replayed>)(x, weight, bias, o);
    if (counter) counter->unsafeGetTensorImpl()->bump_version();
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

}  // namespace

bool natively(const Tensor& x) { return native_serves[x.is_cpu() ? 0 : 1]; }

MaybeType autocast_dtype(const Tensor& x) {
  if (!x.is_cuda() || !at::isReducedFloatingType(x.scalar_type()) || !at::autocast::is_autocast_enabled(at::kCUDA))
    return std::nullopt;
  return py::handle(config).attr("autocast_keeps_dtype").cast<bool>() ? std::nullopt : MaybeType(at::kFloat);
}

PyMethodDef eager_functions[] = {
    {"layer_norm", method(layer_norm), METH_FASTCALL, nullptr},
    {"batch_norm", method(batch_norm), METH_FASTCALL, nullptr},
    {"fused_rows", method(fused_rows), METH_FASTCALL, nullptr},
    {"fused_batch_norm", method(fused_batch_norm), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

void set_config(PyObject* choices) { Py_XSETREF(config, Py_NewRef(choices)); }

void set_differentiable(PyObject* layer_norm_backward, PyObject* batch_norm_backward, PyObject* fused_rows_backward,
                        PyObject* fused_batch_norm_backward) {
  Py_XSETREF(layer_norm_formula, Py_NewRef(layer_norm_backward));
  Py_XSETREF(batch_norm_formula, Py_NewRef(batch_norm_backward));
  set_fused_differentiable(fused_rows_backward, fused_batch_norm_backward);
}

void serve_natively(c10::DeviceType device, bool on) { native_serves[device == c10::DeviceType::CPU ? 0 : 1] = on; }

}  // namespace fastnorm
