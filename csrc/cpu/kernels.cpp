// The CPU's row in the table of devices.
#include "functions.h"

namespace fastnorm::cpu {
namespace {

// `function`, which needs no place and does not fail.
template <auto function>
struct Anywhere;
template <class... Args, void (*function)(Args...)>
struct Anywhere<function> {
  static const char* call(const Place&, Args... args) {
    function(args...);
    return nullptr;
  }
};

}  // namespace

const Kernels KERNELS = {
    Anywhere<row_fwd>::call,
    Anywhere<row_bwd>::call,
    Anywhere<channel_stats>::call,
    Anywhere<channel_apply>::call,
    Anywhere<channel_sums>::call,
    Anywhere<channel_grad>::call,
    Anywhere<channel_fwd>::call,
    Anywhere<channel_bwd>::call,
    Anywhere<row_fused_fwd>::call,
    Anywhere<row_fused_bwd>::call,
    Anywhere<channel_fused_fwd>::call,
    Anywhere<channel_fused_bwd>::call,
    Anywhere<group_fwd>::call,
    Anywhere<group_bwd>::call,
    Anywhere<position_fwd>::call,
    Anywhere<position_bwd>::call,
    Anywhere<channel_masked_stats>::call,
    Anywhere<channel_masked_grad>::call,
    Anywhere<row_masked_fwd>::call,
    Anywhere<row_masked_bwd>::call,
    Anywhere<branch_fwd>::call,
    Anywhere<branch_bwd>::call,
    false,
};

}  // namespace fastnorm::cpu
