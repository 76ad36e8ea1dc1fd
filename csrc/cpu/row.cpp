// Rows (M, N): layer norm on the CPU.
//
// A block of rows is read from memory once. The first pass takes each row's sums; the second goes over the block again, in
// cache now, a few vectors of columns at a time: weight, bias and the sums of their gradients stay in registers for all rows of
// the block. A row's arithmetic depends on N alone: it is the same in every batch and in every place of it.
#include "row_backward.h"
#include "row_forward.h"

namespace fastnorm::cpu {

void row_fwd(Rows g, const RowsInput& x, ConstArray weight, ConstArray bias, double eps, Array y, void* mean, void* rstd) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowForward<T>{g, weight, bias, eps, as<T>(y.data), as<A>(mean), as<A>(rstd)}(x);
  });
}

void row_bwd(Rows g, const RowsInput& dy, const RowsInput& x, ConstArray weight, const void* mean, const void* rstd, Array dx,
             Array dweight, Array dbias) {
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = Acc<T>;
    RowBackward<T>{g, weight, as<A>(mean), as<A>(rstd), as<T>(dx.data), dweight, dbias}(dy, x);
  });
}

}  // namespace fastnorm::cpu
