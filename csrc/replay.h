// Calls of a backend whose kernels are launched from Python, replayed without Python.
//
// What such a call launches depends on shapes, strides, dtypes, alignments and options alone. The first call of a kind runs in
// Python. From the second on there is a plan: what memory to take, and which kernels to launch with which arguments. A replay
// costs the host what torch's own operators do; Python and Triton's front end cost it five times as much.
#pragma once

#include <c10/core/DeviceType.h>
#include <torch/csrc/utils/pybind.h>

#include "contract.h"

namespace fastnorm::replay {

// Whether whole calls on this device are replayed.
bool serves(c10::DeviceType device);

// Opens a device. `functions`: the contract's row_fwd, row_bwd, channel_fwd, channel_bwd in Python. `record(function, args,
// wanted)` returns function's results and, if it is wanted and there is one, the plan. `launch` is the address of
// cuLaunchKernelEx, or of a function like it; `stream`, of a function that gives a device's current stream, or 0 where there
// are no streams.
void serve(c10::DeviceType device, const pybind11::dict& functions, const pybind11::object& record, uintptr_t launch,
           uintptr_t stream);
// Closes every device. Backward passes of earlier calls are still served.
void close();
// Every plan is made anew, and replays are counted anew.
void forget();
// Of a device: kinds of calls that are remembered, plans among them, replayed calls.
std::tuple<int64_t, int64_t, int64_t> counts(c10::DeviceType device);

// The contract, with `saved` for statistics that outlive the call; without it they live in scratch memory.
Tensor row_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, int64_t N, MaybeType dtype,
                   SavedStatistics* saved);
Grads row_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, const Need& need);
Tensor channel_forward(const Tensor& x, const Maybe& weight, const Maybe& bias, const BatchOptions& o, SavedStatistics* saved);
Grads channel_bwd(const Tensor& dy, const Tensor& x, const Maybe& weight, const Tensor& mean, const Tensor& rstd, bool training,
                  const Need& need);

}  // namespace fastnorm::replay
