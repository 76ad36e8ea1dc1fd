// What Python sees: the backend contract as plain functions, and the whole calls of eager.cpp.
// pybind11 functions and not registered operators, because a call through the dispatcher costs about 1.6 us more.
#include <torch/csrc/utils/pybind.h>

#include "contract.h"
#include "eager.h"
#include "replay.h"

#define FASTNORM_STRING(x) #x
#define FASTNORM_QUOTE(x) FASTNORM_STRING(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastnorm;
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.attr("build_key") = FASTNORM_QUOTE(FASTNORM_BUILD_KEY);  // build.py looks for this string in the file before it loads it
  m.def("row_fwd", &row_fwd, no_gil, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("N"),
        py::arg("dtype") = py::none());
  m.def("row_bwd", &row_bwd, no_gil);
  m.def("channel_stats", &channel_stats, no_gil);
  m.def("channel_apply", &channel_apply, no_gil);
  m.def("channel_sums", &channel_sums, no_gil);
  m.def("channel_grad", &channel_grad, no_gil);
  m.def("channel_fwd", &channel_fwd, no_gil, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("running_mean"),
        py::arg("running_var"), py::arg("training"), py::arg("momentum"), py::arg("eps"),
        py::arg("num_batches_tracked") = py::none());
  m.def("channel_bwd", &channel_bwd, no_gil);
  m.def("row_fused_fwd", &row_fused_fwd, no_gil, py::arg("x"), py::arg("addend"), py::arg("weight"), py::arg("bias"),
        py::arg("residual"), py::arg("activation"), py::arg("alpha"), py::arg("eps"), py::arg("N"), py::arg("centre") = true);
  m.def("row_fused_bwd", &row_fused_bwd, no_gil, py::arg("dy"), py::arg("dh"), py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("alpha"), py::arg("mean"), py::arg("rstd"),
        py::arg("need"), py::arg("centre") = true);
  m.def("channel_fused_fwd", &channel_fused_fwd, no_gil, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("activation"), py::arg("alpha"), py::arg("running_mean"), py::arg("running_var"), py::arg("training"),
        py::arg("momentum"), py::arg("eps"), py::arg("num_batches_tracked") = py::none(), py::arg("keep") = false);
  m.def("channel_fused_bwd", &channel_fused_bwd, no_gil);
  m.def("group_fwd", &group_fwd, no_gil);
  m.def("group_bwd", &group_bwd, no_gil);
  m.def("position_fwd", &position_fwd, no_gil);
  m.def("position_bwd", &position_bwd, no_gil);
  m.def("channel_masked_stats", &channel_masked_stats, no_gil);
  m.def("channel_masked_grad", &channel_masked_grad, no_gil);
  m.def("row_masked_fwd", &row_masked_fwd, no_gil);
  m.def("row_masked_bwd", &row_masked_bwd, no_gil);
  m.def("branch_fwd", &branch_fwd, no_gil);
  m.def("branch_bwd", &branch_bwd, no_gil);
  if (PyModule_AddFunctions(m.ptr(), eager_functions) != 0) throw py::error_already_set();
  m.def("set_config", [](const py::object& config) { set_config(config.ptr()); });
  m.def("set_differentiable",
        [](py::object layer_norm, py::object batch_norm, py::object fused_rows, py::object fused_batch_norm) {
          set_differentiable(layer_norm.ptr(), batch_norm.ptr(), fused_rows.ptr(), fused_batch_norm.ptr());
        });
  const auto type = [](const std::string& device) { return c10::Device(device).type(); };
  m.def("serve_natively", [type](const std::string& device, bool on) { serve_natively(type(device), on); });
  m.def("set_kernels", [type](const std::string& device, uintptr_t kernels, uintptr_t stream) {
    set_kernels(type(device), reinterpret_cast<const Kernels*>(kernels), stream);
  });
  m.def("serve_replays",
        [type](const std::string& device, const py::dict& functions, const py::object& record, uintptr_t launch,
               uintptr_t stream) { replay::serve(type(device), functions, record, launch, stream); });
  m.def("close_replays", &replay::close);
  m.def("forget_replays", &replay::forget);
  m.def("count_replays", [type](const std::string& device) { return replay::counts(type(device)); });
}
