// What whole calls are made of: the gate, the arguments that the kernels read, and a C++ autograd node of one call.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "contract.h"

namespace fastnorm {

namespace py = pybind11;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether the compiled kernels serve x's device.
bool natively(const Tensor& x);
// CUDA's autocast computes layer_norm in float32. The kernels do so anyway, so all it changes is y's dtype.
MaybeType autocast_dtype(const Tensor& x);

// ---------------------------------------------------------------- the gate

// Subtracting key sets would leave the bits of the devices in.
inline bool within(DispatchKeySet keys, DispatchKeySet usual) { return (keys.raw_repr() & ~usual.raw_repr()) == 0; }

// Nobody looks at the operators of this thread: no functorch transform, dispatch mode, tracer or torch function mode.
inline bool unwatched() {
  static const DispatchKeySet usual({DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  return within(c10::impl::tls_local_dispatch_key_set().included_, usual) && !at::impl::torch_function_mode_enabled();
}

// A dense tensor with its own memory: no wrapper, no batching, no lazy conjugation or negation, no tangent.
inline bool plain(const Tensor& t) {
  static const DispatchKeySet cpu(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  static const DispatchKeySet cuda(
      {DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  return within(t.key_set(), t.is_cuda() ? cuda : cpu) && !t._fw_grad(/*level=*/0).defined();
}

inline bool readable(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return plain(t) && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble);
}

// An argument as a tensor that the kernels read, beside x and of the shape given; none for None. False where it is anything
// else.
inline bool parse(PyObject* object, Maybe& t, const Tensor& x, at::IntArrayRef sizes) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return readable(*t) && t->device() == x.device() && t->sizes() == sizes;
}

// A counter of batches beside x; none for None.
inline bool parse_counter(PyObject* object, Maybe& t, const Tensor& x) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return plain(*t) && t->scalar_type() == at::kLong && t->dim() == 0 && t->device() == x.device() && !t->is_inference();
}

inline bool parse(PyObject* object, Tensor& x) {
  if (!THPVariable_CheckExact(object)) return false;
  x = THPVariable_Unpack(object);
  return readable(x) && x.numel() > 0;
}

inline bool parse(PyObject* object, double& value) {
  if (PyFloat_CheckExact(object)) {
    value = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) return false;
  value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) PyErr_Clear();  // too large for a double: torch says so
  return value == value && value != -1.0;
}

inline bool parse(PyObject* object, c10::SmallVector<int64_t, 4>& shape) {
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

inline bool buffers_fit(const Maybe& mean, const Maybe& var, bool training) {
  if (!mean || !var) return !mean && !var && training;
  return !mean->requires_grad() && !var->requires_grad();
}

// ---------------------------------------------------------------- autograd

inline Maybe given(const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; }

// Backward has to be made of torch's operators: it is itself differentiated, watched, or given no plain tensor.
inline bool differentiable(const Tensor& dy) { return at::GradMode::is_enabled() || !unwatched() || !plain(dy); }

// Some versions of torch count the owners of a node in it, others beside it.
template <class T>
auto make_node() {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<T>(new T, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<T>();
}

template <class R, typename... Args>
R call_formula(PyObject* formula, Args&&... args) {
  const py::gil_scoped_acquire gil;
  try {
    return py::handle(formula)(std::forward<Args>(args)...).template cast<R>();
  } catch (py::error_already_set& e) {
    e.restore();
    python_error error;  // the engine hands this one on as the Python exception that it is
    error.persist();
    throw error;
  }
}

// The node of T, a torch::autograd::Function, for a call with these inputs, some of which may not be there. By hand and not by
// T::apply, for results that are fresh tensors: without wrapping, views, dirty inputs and metadata of the inputs: 0.6 us less.
template <class T>
auto node_of(std::initializer_list<const Tensor*> inputs) {
  namespace autograd = torch::autograd;
  const auto node = make_node<autograd::CppNode<T>>();
  autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const Tensor* t : inputs) edges.push_back(t ? autograd::impl::gradient_edge(*t) : autograd::Edge());
  node->set_next_edges(std::move(edges));
  node->is_variable_input_.assign(inputs.size(), true);
  node->set_ctx_grad_fn(node);
  return node;
}
inline const Tensor* there(const Maybe& t) { return t ? &*t : nullptr; }

// Makes y a result of the node.
template <class N>
void comes_from(const N& node, const Tensor& y) {
  torch::autograd::impl::set_gradient_edge(y, {node, node->add_input_metadata(y)});
  node->output_info_.emplace_back(y);
}

inline Tensor shaped(const Maybe& d, at::IntArrayRef shape) { return !d ? Tensor() : shape.size() == 1 ? *d : d->view(shape); }

inline PyCFunction method(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

}  // namespace fastnorm
