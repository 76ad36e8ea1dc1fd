// A block's way through a share of the positions of its channels (B, C, S): runs of one channel, or positions whose channels
// lie side by side (LAST).
#pragma once

#include "finish.cuh"

namespace fastnorm::cuda {

constexpr int CHANNEL_THREADS = 256;
// Units of a thread whose mean its block's sums are taken about, see `statistics`.
constexpr int FIRST = 4;

// CALLED: see called_offset.
template <class T, bool CALLED = false>
struct View {
  T* data;
  int64_t sample, channel;
  Walk space, positions;  // units of several positions: one stride along the space
  bool whole;             // every unit is elements side by side, at a multiple of 16 bytes

  __device__ static __forceinline__ int64_t offset(const Walk& walk, int64_t i) {
    return CALLED ? called_offset(walk, i) : walk.offset(i);
  }
};

// (B, S), side by side: whether a position counts, as 0 or 1.
struct Mask {
  const bool* data;
  bool whole;  // at a multiple of a unit's bytes
};
// All positions do.
struct NoMask {};

struct Shares {
  int64_t B, C, S;
  int64_t P, per_share, units;  // shares of a channel, units of a share and of a channel
  int width;                    // LAST: vectors of channels side by side in a block
};

// A thread's units: V elements of one channel, or one element of V channels.
template <int V, bool LAST>
struct Sweep {
  static constexpr int CHANNELS = LAST ? V : 1;  // of a thread
  const Shares& g;
  int64_t c, share, begin, end, unit, b = 0, s = 0;
  int step, samples = 0, rest = 0;

  __device__ __forceinline__ explicit Sweep(const Shares& shares) : g(shares) {
    const int64_t block = blockIdx.x / g.P;
    share = blockIdx.x % g.P;
    begin = share * g.per_share;
    end = begin + g.per_share < g.units ? begin + g.per_share : g.units;
    c = LAST ? (block * g.width + threadIdx.x % g.width) * V : block;
    step = LAST ? blockDim.x / g.width : blockDim.x;
    if (!LAST) {
      const int64_t run = g.S / V;
      samples = static_cast<int>(step / run);
      rest = static_cast<int>(step % run);
    }
    restart();
  }
  __device__ __forceinline__ void restart() {
    unit = begin + (LAST ? threadIdx.x / g.width : threadIdx.x);
    if (LAST) return;
    b = unit / (g.S / V);
    s = unit % (g.S / V);
  }
  __device__ __forceinline__ bool inside() const { return c < g.C; }
  __device__ __forceinline__ bool more() const { return inside() && unit < end; }
  __device__ __forceinline__ void next() {
    unit += step;
    if (LAST) return;
    b += samples;
    s += rest;
    if (s >= g.S / V) s -= g.S / V, ++b;
  }
  // Where the unit begins in v, and the way from there to its element j.
  template <class T, bool CALLED>
  __device__ __forceinline__ T* begins(const View<T, CALLED>& v) const {
    return v.data + c * v.channel + (LAST ? v.offset(v.positions, unit) : b * v.sample);
  }
  template <class T, bool CALLED>
  __device__ __forceinline__ void read(const View<const T, CALLED>& v, Acc<T> (&out)[V]) const {
    const T* const from = begins(v);
    if (V > 1 && v.whole) return load<T, V>(out, from + (LAST ? 0 : s * V));
#pragma unroll
    for (int j = 0; j < V; ++j)
      out[j] = widened(from[LAST ? j * v.channel : V == 1 ? v.offset(v.space, s) : (s * V + j) * v.space.stride[0]]);
  }
  // The same on its way; none where there is no tensor.
  template <class T, bool CALLED>
  __device__ __forceinline__ Bits<T, V> fetch(const View<const T, CALLED>& v) const {
    if (!v.data) return {};
    const int64_t stride = LAST ? v.channel : v.space.stride[0];
    return cuda::fetch<T, V>(begins(v) + (LAST ? 0 : V == 1 ? v.offset(v.space, s) : s * V * stride), v.whole, stride);
  }
  // Which elements of a unit count.
  __device__ __forceinline__ void read(const Mask& mask, bool (&out)[V]) const {
    using Bytes = std::conditional_t<V == 8, uint64_t, std::conditional_t<V == 4, uint32_t, uint16_t>>;
    const bool* const from = mask.data + (LAST ? unit : b * g.S + s * V);
    if (LAST || V == 1 || !mask.whole) {
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = from[LAST ? 0 : j];
    } else {
      const Bytes bytes = *reinterpret_cast<const Bytes*>(from);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = bytes >> 8 * j & 1;
    }
  }
  __device__ __forceinline__ void read(NoMask, bool (&out)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = true;
  }
  template <class T, bool CALLED>
  __device__ __forceinline__ void write(const View<T, CALLED>& v, const Acc<T> (&values)[V]) const {
    store<T, V>(begins(v) + (LAST ? 0 : s * V), values);
  }
  // The element j of a unit belongs to this one of the thread's channels.
  __device__ static constexpr int channel(int j) { return LAST ? j : 0; }
  // Adds a unit to the sums of its channels.
  template <class A>
  __device__ static __forceinline__ void sum(A (&to)[CHANNELS], const A (&values)[V]) {
    if constexpr (LAST) {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] += values[j];
    } else {
      to[0] += pairwise_sum(values);
    }
  }
  template <class A>
  __device__ static __forceinline__ void count(A (&to)[CHANNELS], const bool (&counts)[V]) {
    A ones[V];
#pragma unroll
    for (int j = 0; j < V; ++j) ones[j] = counts[j] ? 1 : 0;
    sum(to, ones);
  }
  // Elements of each channel in the first units of this share, and in all of them.
  __device__ __forceinline__ int64_t first_units() const {
    const int64_t n = static_cast<int64_t>(step) * FIRST;
    return end - begin < n ? end - begin : n;
  }
  __device__ static constexpr int per_unit() { return LAST ? 1 : V; }
  // One thread for each channel of the block.
  __device__ __forceinline__ bool leads() const { return inside() && (LAST ? threadIdx.x < g.width : threadIdx.x == 0); }
};

// v[i] of every channel: the sums over the block, for each of its threads.
template <class A, int n, int V, bool LAST>
__device__ __forceinline__ void block_sum(A (&v)[n][Sweep<V, LAST>::CHANNELS], const Sweep<V, LAST>& w) {
  A* const place = shared<A>();
  __syncthreads();  // what is there has been read
  if constexpr (!LAST) {
    A flat[n];
#pragma unroll
    for (int i = 0; i < n; ++i) flat[i] = v[i][0];
    exact_block_sum(flat, place);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i][0] = flat[i];
  } else {
    const int row = w.g.width * V, mine = threadIdx.x % w.g.width * V, plane = blockDim.x * V;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) place[i * plane + threadIdx.x * V + j] = v[i][j];
    __syncthreads();
    for (int k = threadIdx.x; k < n * row; k += blockDim.x) {
      A* const from = place + k / row * plane + k % row;
      A total = 0, lost = 0;
      for (int h = 0; h < w.step; ++h) add(total, lost, from[h * row]);
      *from = with_lost(total, lost);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) v[i][j] = place[i * plane + mine + j];
  }
}

}  // namespace fastnorm::cuda
