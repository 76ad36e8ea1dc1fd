// Sums of rows by a block each, with one bug of choice: what each of them comes to is in ../test_emulator.py.
#include <cuda_runtime.h>

#include <cstring>
#include <string>

namespace fastnorm::cuda {
extern __shared__ __align__(16) unsigned char shared_memory[];
}

constexpr int ROWS = 3, N = 256, THREADS = 128, WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

enum Bug {
  NONE,
  NO_BARRIER,
  NO_SECOND_BARRIER,
  NOT_WRITTEN,
  EARLY_EXIT,
  DIVERGENT,
  OUT_OF_BOUNDS,
  MISALIGNED,
  TOO_LITTLE_SHARED,
  TOO_MANY_THREADS,
  BUGS
};
const char* const NAMES[] = {"none",      "no barrier",    "no second barrier", "not written",       "early exit",
                             "divergent", "out of bounds", "misaligned",        "too little shared", "too many threads"};

float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
  return v;
}

// The sum over the block and then that of the squares, through the same shared memory.
template <int BUG>
__global__ void sums_kernel(const float* x, float* sums, float* squares) {
  float* const place = reinterpret_cast<float*>(fastnorm::cuda::shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const row = x + blockIdx.x * N;
  if (BUG == EARLY_EXIT && threadIdx.x >= 40) return;
  if (BUG == DIVERGENT && threadIdx.x < 7) __syncthreads();
  float v[2] = {0, 0};
  for (int i = threadIdx.x; i < N + (BUG == OUT_OF_BOUNDS && blockIdx.x == ROWS - 1); i += THREADS) {
    v[0] += row[i];
    v[1] += row[i] * row[i];
  }
  for (int i = 0; i < 2; ++i) {
    const float mine = warp_sum(v[i]);
    if (lane == 0 && !(BUG == NOT_WRITTEN && warp == 1)) place[warp] = mine;
    if (BUG != NO_BARRIER) __syncthreads();
    float total = 0;
    for (int w = 0; w < WARPS + (BUG == TOO_LITTLE_SHARED); ++w) total += w < WARPS ? place[w] : (place[w] = 0);
    v[i] = total;
    if (BUG != NO_SECOND_BARRIER) __syncthreads();
  }
  if (BUG == MISALIGNED) v[0] += reinterpret_cast<const uint4*>(x + 1)[0].x;
  if (threadIdx.x == THREADS - 1) sums[blockIdx.x] = v[0], squares[blockIdx.x] = v[1];
}

template <int BUG>
int run() {
  std::vector<float> x(ROWS * N, 2.f), sums(ROWS, -1.f), squares(ROWS, -1.f);
  cudaLaunchConfig_t config;
  config.gridDim = ROWS;
  config.blockDim = BUG == TOO_MANY_THREADS ? 2048 : THREADS;
  config.dynamicSmemBytes = WARPS * sizeof(float);
  const float* const from = x.data();
  const cudaError_t status = cudaLaunchKernelEx(&config, &sums_kernel<BUG>, from, sums.data(), squares.data());
  if (status != cudaSuccess) return printf("%s\n", cudaGetErrorString(status)), 3;
  for (int i = 0; i < ROWS; ++i)
    if (sums[i] != 2.f * N || squares[i] != 4.f * N) return printf("wrong: %g %g\n", sums[i], squares[i]), 1;
  return printf("right\n"), 0;
}

template <int... BUG>
int run(const std::string& name, std::integer_sequence<int, BUG...>) {
  int status = 2;
  ((name == NAMES[BUG] ? status = run<BUG>() : 0), ...);
  return status;
}

// planted ORDER BUG
int main(int, char** arguments) {
  emulator::order = static_cast<emulator::Order>(atoi(arguments[1]));
  return run(arguments[2], std::make_integer_sequence<int, BUGS>());
}
