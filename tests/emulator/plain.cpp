// launch.cu for a library of row.cu and channel.cu alone: what else it hands on is null, and a call of it ends the process.
#include "../../csrc/cuda/functions.h"

#define LEFT_OUT(name) extern __attribute__((weak)) Function<decltype(Kernels::name)> name

namespace fastnorm::cuda {
LEFT_OUT(row_fused_fwd);
LEFT_OUT(row_fused_bwd);
LEFT_OUT(channel_fused_fwd);
LEFT_OUT(channel_fused_bwd);
LEFT_OUT(group_fwd);
LEFT_OUT(group_bwd);
LEFT_OUT(position_fwd);
LEFT_OUT(position_bwd);
LEFT_OUT(channel_masked_stats);
LEFT_OUT(channel_masked_grad);
LEFT_OUT(row_masked_fwd);
LEFT_OUT(row_masked_bwd);
LEFT_OUT(branch_fwd);
LEFT_OUT(branch_bwd);
}  // namespace fastnorm::cuda

#include "../../csrc/cuda/launch.cu"
