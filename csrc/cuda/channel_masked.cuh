// Channels (B, C, S) of which some positions do not count: channel.cuh's sweeps with a mask beside what they read.
#pragma once

#include "channel.cuh"

namespace fastnorm::cuda {

template <class T>
struct MaskedStatistics {
  Shares g;
  View<const T> x;
  Mask mask;
  Acc<T>* partial;  // (5, P, C)
};

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1)
    channel_masked_stats_kernel(const __grid_constant__ MaskedStatistics<T> p) {
  Sweep<V, LAST> w(p.g);
  Statistics<Acc<T>> s[LAST ? V : 1];
  statistics<T, V, LAST>(p.x, w, s, p.mask);
  keep_statistics<Acc<T>, V, LAST>(p.partial, w, s, true);
}

template <class T>
struct MaskedChannelBackward : ChannelBackward<T> {
  static constexpr bool MASKED = true;

  Mask mask;
};

template <class T, int V, bool LAST>
__global__ void __launch_bounds__(CHANNEL_THREADS, 1)
    channel_masked_grad_kernel(const __grid_constant__ MaskedChannelBackward<T> p) {
  derive<T, V, LAST>(p);
}

}  // namespace fastnorm::cuda
