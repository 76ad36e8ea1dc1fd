// What the other .cu files implement, and launch.cu hands on: the functions of ../kernels.h.
#pragma once

#include <type_traits>

#include "../kernels.h"

namespace fastnorm::cuda {

template <class F>
using Function = std::remove_pointer_t<F>;

Function<decltype(Kernels::row_fwd)> row_fwd;
Function<decltype(Kernels::row_bwd)> row_bwd;
Function<decltype(Kernels::channel_stats)> channel_stats;
Function<decltype(Kernels::channel_apply)> channel_apply;
Function<decltype(Kernels::channel_sums)> channel_sums;
Function<decltype(Kernels::channel_grad)> channel_grad;
Function<decltype(Kernels::channel_fwd)> channel_fwd;
Function<decltype(Kernels::channel_bwd)> channel_bwd;
Function<decltype(Kernels::row_fused_fwd)> row_fused_fwd;
Function<decltype(Kernels::row_fused_bwd)> row_fused_bwd;
Function<decltype(Kernels::channel_fused_fwd)> channel_fused_fwd;
Function<decltype(Kernels::channel_fused_bwd)> channel_fused_bwd;
Function<decltype(Kernels::group_fwd)> group_fwd;
Function<decltype(Kernels::group_bwd)> group_bwd;
Function<decltype(Kernels::position_fwd)> position_fwd;
Function<decltype(Kernels::position_bwd)> position_bwd;
Function<decltype(Kernels::channel_masked_stats)> channel_masked_stats;
Function<decltype(Kernels::channel_masked_grad)> channel_masked_grad;
Function<decltype(Kernels::row_masked_fwd)> row_masked_fwd;
Function<decltype(Kernels::row_masked_bwd)> row_masked_bwd;
Function<decltype(Kernels::branch_fwd)> branch_fwd;
Function<decltype(Kernels::branch_bwd)> branch_bwd;

}  // namespace fastnorm::cuda
