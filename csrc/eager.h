// Whole calls of the public functions for plain tensors: gate, autograd and kernel in one.
#pragma once

#include <Python.h>
#include <c10/core/DeviceType.h>

namespace fastnorm {

// layer_norm(input, normalized_shape, weight, bias, eps) and
// batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps[, num_batches_tracked]):
// the result, or None where the call is not one that the kernels cover, before anything has happened. And those of fused norms:
// fused_rows(x, addend, normalized_shape, weight, bias, eps, activation, alpha, residual, centre), which gives y and h, and
// fused_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, alpha, residual,
// num_batches_tracked).
extern PyMethodDef eager_functions[];
PyObject* fused_rows(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* fused_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count);

// fastnorm.composite's functions of these names: what a backward that is itself differentiated calls.
void set_differentiable(PyObject* layer_norm_backward, PyObject* batch_norm_backward, PyObject* fused_rows_backward,
                        PyObject* fused_batch_norm_backward);
void set_fused_differentiable(PyObject* rows_backward, PyObject* batch_norm_backward);

// Whether calls on the CPU, or on CUDA, run on the compiled kernels. Where they do not, and the device is none that is
// replayed, calls are not covered.
void serve_natively(c10::DeviceType device, bool on);

// fastnorm.config
void set_config(PyObject* choices);

}  // namespace fastnorm
