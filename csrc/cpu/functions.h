// What row_*.cpp, channel*.cpp, group.cpp, position.cpp and branch.cpp implement: the functions of ../kernels.h, which ask for
// no place.
#pragma once

#include "../kernels.h"

namespace fastnorm::cpu {

void row_fwd(Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd);
void row_bwd(Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias);

void channel_stats(Channels g, const ChannelsInput& x, void* mean, void* deviation);
void channel_apply(Channels g, const ChannelsInput& x, const void* mean, const void* rstd, ConstArray weight, ConstArray bias,
                   Array y);
void channel_sums(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean, const void* rstd, void* sum_dz,
                  void* sum_dz_x_hat);
void channel_grad(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const void* mean, const void* rstd,
                  ConstArray weight, const void* c1, const void* c2, Array dx);
void channel_fwd(Channels g, const ChannelsInput& x, ConstArray weight, ConstArray bias, Array running_mean, Array running_var,
                 int64_t* tracked, bool training, double momentum, double eps, Array y, void* mean, void* rstd);
void channel_bwd(Channels g, const ChannelsInput& dy, const ChannelsInput& x, ConstArray weight, const void* mean,
                 const void* rstd, bool training, Array dx, Array dweight, Array dbias);

void row_fused_fwd(Rows g, const RowsInput& x, const RowsInput& addend, const RowsInput& residual, ConstArray weight,
                   ConstArray bias, Epilogue epilogue, bool centre, double eps, Array h, Array y, void* mean, void* rstd);
void row_fused_bwd(Rows g, const RowsInput& dy, const RowsInput& dh, const RowsInput& x, const RowsInput& residual,
                   ConstArray weight, ConstArray bias, Epilogue epilogue, bool centre, const void* mean, const void* rstd,
                   Array dx, Array dweight, Array dbias, Array dresidual);
void channel_fused_fwd(Channels g, const ChannelsInput& x, const ChannelsInput& residual, ConstArray weight, ConstArray bias,
                       Epilogue epilogue, Array running_mean, Array running_var, int64_t* tracked, bool training,
                       double momentum, double eps, Array y, uint8_t* kept, void* mean, void* rstd);
void channel_fused_bwd(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const ChannelsInput& residual,
                       const uint8_t* kept, ConstArray weight, ConstArray bias, Epilogue epilogue, const void* mean,
                       const void* rstd, bool training, Array dx, Array dweight, Array dbias, Array dresidual);
void group_fwd(Groups g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps, Array y, void* mean,
               void* rstd);
void group_bwd(Groups g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, const void* mean,
               const void* rstd, Array dx, Array dweight, Array dbias);
void position_fwd(Positions g, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue, double eps, Array y,
                  void* mean, void* rstd);
void position_bwd(Positions g, ConstArray dy, ConstArray x, ConstArray weight, ConstArray bias, Epilogue epilogue,
                  const void* mean, const void* rstd, Array dx, Array dweight, Array dbias);
void channel_masked_stats(Channels g, const ChannelsInput& x, const bool* mask, void* count, void* mean, void* deviation);
void channel_masked_grad(Channels g, const ChannelsInput& dy, const ChannelsInput& x, const bool* mask, const void* mean,
                         const void* rstd, ConstArray weight, const void* c1, const void* c2, Array dx);
void row_masked_fwd(Rows g, RowMask mask, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y,
                    void* mean, void* rstd);
void row_masked_bwd(Rows g, RowMask mask, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean,
                    const void* rstd, Array dx, Array dweight, Array dbias);
void branch_fwd(Rows g, ConstArray x, ConstArray addend, const void* row_scale, const void* column_scale, Dropout dropout,
                Array h);
void branch_bwd(Rows g, ConstArray dh, ConstArray x, const void* row_scale, const void* column_scale, Dropout dropout, Array dx,
                Array dcolumn_scale);

}  // namespace fastnorm::cpu
