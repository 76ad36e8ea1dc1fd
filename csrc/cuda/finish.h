// The host's side of finish.cuh.
#pragma once

#include "finish.cuh"
#include "launch.h"

namespace fastnorm::cuda {

// Columns side by side in a block; the other threads share the rows of partial results.
inline int finish_width(int64_t columns) { return std::min(WARP, bit_ceil(columns)); }

template <class A>
Error finish(const Place& place, Finish<A> p) {
  p.width = finish_width(p.N);
  return launch(place, &finish_kernel<A>, static_cast<unsigned>(ceil_div(p.N, p.width)), FINISH_THREADS,
                4 * FINISH_THREADS * sizeof(A), p);
}

template <class A>
Error merge_shares(const Place& place, Merge<A> p) {
  p.width = finish_width(p.settled.C);
  return launch(place, &merge_kernel<A>, static_cast<unsigned>(ceil_div(p.settled.C, p.width)), FINISH_THREADS,
                FINISH_THREADS * sizeof(Statistics<A>), p);
}

}  // namespace fastnorm::cuda
