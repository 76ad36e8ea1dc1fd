// The eager path at torch's own cost: what functional.py and autograd.py do in Python for every backend, in C++ for the CPU's
// kernels and for replayed ones.
// Raw CPython entries and a C++ autograd node: an 8 x 64 call is a few microseconds, so each crossing counts.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "checks.h"
#include "contract.h"
#include "replay.h"

namespace fastnorm {
namespace {

namespace py = pybind11;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

PyObject *layer_norm_formula = nullptr, *batch_norm_formula = nullptr;
PyObject* config = nullptr;  // fastnorm.config
std::atomic<bool> native_serves[2] = {};  // on the CPU, on CUDA

// ---------------------------------------------------------------- the gate

// Subtracting key sets would leave the bits of the devices in.
bool within(DispatchKeySet keys, DispatchKeySet usual) { return (keys.raw_repr() & ~usual.raw_repr()) == 0; }

// Nobody looks at the operators of this thread: no functorch transform, dispatch mode, tracer or torch function mode.
bool unwatched() {
  static const DispatchKeySet usual({DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  return within(c10::impl::tls_local_dispatch_key_set().included_, usual) && !at::impl::torch_function_mode_enabled();
}

// A dense tensor with its own memory: no wrapper, no batching, no lazy conjugation or negation, no tangent.
bool plain(const Tensor& t) {
  static const DispatchKeySet cpu(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  static const DispatchKeySet cuda(
      {DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  return within(t.key_set(), t.is_cuda() ? cuda : cpu) && !t._fw_grad(/*level=*/0).defined();
}

bool readable(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return plain(t) && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble);
}

// An argument as a tensor that the kernels read, beside x and of the shape given; none for None. False where it is anything
// else.
bool parse(PyObject* object, Maybe& t, const Tensor& x, at::IntArrayRef sizes) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return readable(*t) && t->device() == x.device() && t->sizes() == sizes;
}

// A counter of batches beside x; none for None.
bool parse_counter(PyObject* object, Maybe& t, const Tensor& x) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return plain(*t) && t->scalar_type() == at::kLong && t->dim() == 0 && t->device() == x.device() && !t->is_inference();
}

bool parse(PyObject* object, Tensor& x) {
  if (!THPVariable_CheckExact(object)) return false;
  x = THPVariable_Unpack(object);
  return readable(x) && x.numel() > 0;
}

bool parse(PyObject* object, double& value) {
  if (PyFloat_CheckExact(object)) {
    value = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) return false;
  value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) PyErr_Clear();  // too large for a double: torch says so
  return value == value && value != -1.0;
}

bool parse(PyObject* object, c10::SmallVector<int64_t, 4>& shape) {
  const bool tuple = PyTuple_Check(object);
  if (!tuple && !PyList_Check(object)) return false;
  const Py_ssize_t n = tuple ? PyTuple_GET_SIZE(object) : PyList_GET_SIZE(object);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* size = tuple ? PyTuple_GET_ITEM(object, i) : PyList_GET_ITEM(object, i);
    if (!PyLong_CheckExact(size)) return false;
    int overflow = 0;
    shape.push_back(PyLong_AsLongLongAndOverflow(size, &overflow));
    if (overflow != 0) return false;
  }
  return n > 0;
}

// Inference tensors cannot be saved for backward: torch says so before anything has happened.
bool savable(const Tensor& x, const Maybe& weight) { return !x.is_inference() && !(weight && weight->is_inference()); }

bool wants_grad(const Tensor& x, const Maybe& weight, const Maybe& bias) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || (weight && weight->requires_grad()) || (bias && bias->requires_grad()));
}

// ---------------------------------------------------------------- autograd

Maybe given(const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; }

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

// Backward has to be made of torch's operators: it is itself differentiated, watched, or given no plain tensor.
bool differentiable(const Tensor& dy) { return at::GradMode::is_enabled() || !unwatched() || !plain(dy); }

// Some versions of torch count the owners of a node in it, others beside it.
template <class T>
auto make_node() {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<T>(new T, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<T>();
}

template <typename... Args>
Grads call_formula(PyObject* formula, Args&&... args) {
  const py::gil_scoped_acquire gil;
  try {
    return py::handle(formula)(std::forward<Args>(args)...).template cast<Grads>();
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;  // the engine hands this one on as the Python exception that it is
    error.persist();
    throw error;
  }
}

// T::apply(x, weight, bias, args...), for functions of one fresh result: without wrapping, views, dirty inputs and metadata of
// the inputs: 0.6 us less.
template <class T, class... Args>
Tensor apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Args&... args) {
  namespace autograd = torch::autograd;
  const auto edge = [](const Maybe& t) { return t ? autograd::impl::gradient_edge(*t) : autograd::Edge(); };
  const auto node = make_node<autograd::CppNode<T>>();
  node->set_next_edges({edge(x), edge(weight), edge(bias)});
  node->is_variable_input_.assign(3, true);
  node->set_ctx_grad_fn(node);
  Tensor y;
  {
    const at::AutoGradMode no_grad(false);
    y = T::forward(&node->ctx_, x, weight, bias, args...);
  }
  autograd::impl::set_gradient_edge(y, {node, node->add_input_metadata(y)});
  node->output_info_.emplace_back(y);
  node->save_variables_to_ctx();
  return y;
}

Tensor shaped(const Maybe& d, at::IntArrayRef shape) { return !d ? Tensor() : shape.size() == 1 ? *d : d->view(shape); }

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
    const auto [dx, dweight, dbias] = differentiable(dy[0]) ? call_formula(layer_norm_formula, dy[0], x, given(weight), N,
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
                                          ? call_formula(batch_norm_formula, dy[0], x, given(weight), mean, rstd, training,
                                                         ctx->saved_data["eps"].toDouble(), need)
                                          : Backend::channel_bwd(dy[0], x, given(weight), mean, rstd, training, need);
    return {dx.value_or(Tensor()), dweight.value_or(Tensor()), dbias.value_or(Tensor())};
  }
};

// ---------------------------------------------------------------- entries

// Which of the two serves x's device, if one does.
enum class Serving { nobody, native, replayed };
Serving serving(const Tensor& x) {
  if (native_serves[x.is_cpu() ? 0 : 1]) return Serving::native;
  return replay::serves(x.device().type()) ? Serving::replayed : Serving::nobody;
}

// CUDA's autocast computes layer_norm in float32. The kernels do so anyway, so all it changes is y's dtype.
MaybeType autocast_dtype(const Tensor& x) {
  if (!x.is_cuda() || !at::isReducedFloatingType(x.scalar_type()) || !at::autocast::is_autocast_enabled(at::kCUDA))
    return std::nullopt;
  return py::handle(config).attr("autocast_keeps_dtype").cast<bool>() ? std::nullopt : MaybeType(at::kFloat);
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

bool buffers_fit(const Maybe& mean, const Maybe& var, bool training) {
  if (!mean || !var) return !mean && !var && training;
  return !mean->requires_grad() && !var->requires_grad();
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

PyCFunction method(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

}  // namespace

PyMethodDef eager_functions[] = {
    {"layer_norm", method(layer_norm), METH_FASTCALL, nullptr},
    {"batch_norm", method(batch_norm), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

void set_config(PyObject* choices) { Py_XSETREF(config, Py_NewRef(choices)); }

void set_differentiable(PyObject* layer_norm_backward, PyObject* batch_norm_backward) {
  Py_XSETREF(layer_norm_formula, Py_NewRef(layer_norm_backward));
  Py_XSETREF(batch_norm_formula, Py_NewRef(batch_norm_backward));
}

void serve_natively(c10::DeviceType device, bool on) { native_serves[device == c10::DeviceType::CPU ? 0 : 1] = on; }

}  // namespace fastnorm
