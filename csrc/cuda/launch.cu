// What the library of CUDA kernels gives to who loads it: its functions, and the sources that it was compiled from.
#include "functions.h"

#define FASTNORM_STRING(x) #x
#define FASTNORM_QUOTE(x) FASTNORM_STRING(x)

namespace fastnorm::cuda {

const Kernels KERNELS = {
    row_fwd,     row_bwd,     channel_stats, channel_apply, channel_sums,      channel_grad,      channel_fwd,
    channel_bwd, row_fused_fwd, row_fused_bwd, channel_fused_fwd, channel_fused_bwd, group_fwd, group_bwd,
    position_fwd, position_bwd, channel_masked_stats, channel_masked_grad, row_masked_fwd, row_masked_bwd, branch_fwd,
    branch_bwd, true,
};

}  // namespace fastnorm::cuda

extern "C" {
__attribute__((visibility("default"))) const fastnorm::Kernels* fastnorm_kernels() { return &fastnorm::cuda::KERNELS; }
// build.py looks for this string in the file before it loads it.
__attribute__((visibility("default"))) extern const char fastnorm_build_key[] = FASTNORM_QUOTE(FASTNORM_BUILD_KEY);
}
