// CUDA's language and runtime, as far as csrc/cuda uses them, for a C++ compiler and a CPU: the unchanged sources run there.
//
// Blocks run one after another. A block's threads are fibers that go on, each in its turn, until they wait at a barrier or for
// their warp, so that barriers and shuffles are exact; the turns have three orders, and a barrier that is missing gives other
// results in one of them. Shared memory is full of NaN when a block starts, and its end is watched. A warp that waits for
// threads that will never come ends the process in words. Reads and writes out of bounds, and misaligned ones, are the
// sanitizers' to find. There is no memory model: what a weaker order than the program's would do is not seen.
#pragma once
#undef _FORTIFY_SOURCE  // it takes a jump to another fiber's stack for an attack
#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// The one name by which kernels know their shared memory.
namespace fastnorm::cuda {
extern unsigned char shared_memory[];
}

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN(x) x
#else
#define EMULATOR_ASAN(x)
#endif

namespace emulator {

constexpr unsigned WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 128 << 10, MOST_SHARED = 227 << 10, DEFAULT_SHARED = 48 << 10, WATCHED = 256;
constexpr int MULTIPROCESSORS = 4;  // few, so that a block has several rows and shares of a small case

enum State : uint8_t { READY, IN_WARP, IN_BLOCK, DONE };
struct Fiber {
  jmp_buf context;
  State state = DONE;
  bool fresh = true;
  unsigned parity = 0, mask = 0;
  uint64_t slot[2];
  char* stack;
  void* fake = nullptr;
};

enum Order : int { FORWARD, REVERSE, SHUFFLED };
inline Order order = FORWARD;
inline std::mutex one_launch;
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current = -1, threads = 0;
inline std::function<void()> body;
inline std::mt19937 random{1};
inline void* scheduler_fake;
inline const void* scheduler_stack;
inline size_t scheduler_size;

[[noreturn]] inline void die(const char* why) {
  fprintf(stderr, "emulator: %s (block %u,%u,%u thread %d)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, current);
  abort();
}

// ---------------------------------------------------------------- fibers

__attribute__((noinline)) inline void leave() {
  Fiber& f = fibers[current];
  EMULATOR_ASAN(__sanitizer_start_switch_fiber(&f.fake, scheduler_stack, scheduler_size));
  if (!_setjmp(f.context)) _longjmp(scheduler, 1);
  EMULATOR_ASAN(__sanitizer_finish_switch_fiber(fibers[current].fake, &scheduler_stack, &scheduler_size));
}

inline void wait(State state) {
  if (current < 0) die("a device function is called by the host");
  fibers[current].state = state;
  leave();
}

inline void run_fiber() {
  EMULATOR_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size));
  for (;;) {
    body();
    wait(DONE);
  }
}

__attribute__((noinline)) inline void resume(int thread) {
  Fiber& f = fibers[thread];
  current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
  EMULATOR_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, f.stack, STACK));
  if (!_setjmp(scheduler)) {
    if (!f.fresh) _longjmp(f.context, 1);
    f.fresh = false;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = f.stack;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, run_fiber, 0);
    setcontext(&start);
  }
  EMULATOR_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr));
}

inline void make_fibers(size_t n) {
  fibers.reserve(MOST_THREADS);  // a fiber's context stays where it is
  while (fibers.size() < n) {
    fibers.emplace_back();
    void* const stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) die("no memory for a thread's stack");
    fibers.back().stack = static_cast<char*>(stack);
  }
}

// first, first + 1, ... in the order of turns.
inline std::vector<int> turns(int first, int n) {
  std::vector<int> v(n);
  for (int i = 0; i < n; ++i) v[i] = first + (order == REVERSE ? n - 1 - i : i);
  if (order == SHUFFLED) std::shuffle(v.begin(), v.end(), random);
  return v;
}

// ---------------------------------------------------------------- blocks

// A warp goes on until its threads have ended or wait for the block.
inline void run_warp(int warp) {
  const int first = warp * WARP, n = std::min<int>(WARP, threads - first);
  const auto waiting = [&](State state) {
    unsigned lanes = 0;
    for (int i = 0; i < n; ++i) lanes |= static_cast<unsigned>(fibers[first + i].state == state) << i;
    return lanes;
  };
  for (;;) {
    for (const int i : turns(first, n))
      if (fibers[i].state == READY) resume(i);
    const unsigned here = waiting(IN_WARP);
    if (!here) return;
    for (int i = 0; i < n; ++i) {
      if (!(here >> i & 1)) continue;
      Fiber& f = fibers[first + i];
      current = first + i;
      const unsigned missing = f.mask & (n == WARP ? ~0u : (1u << n) - 1) & ~here;
      if (missing & waiting(IN_BLOCK)) die("a warp operation waits for threads that wait at a barrier of the block");
      if (missing) die("a warp operation waits for threads that have ended");
      f.state = READY;
    }
  }
}

inline void run_block(size_t shared_bytes) {
  unsigned char* const shared = fastnorm::cuda::shared_memory;
  EMULATOR_ASAN(__asan_unpoison_memory_region(shared, MOST_SHARED + WATCHED));
  memset(shared, 0xff, shared_bytes + WATCHED);
  EMULATOR_ASAN(__asan_poison_memory_region(shared + shared_bytes, WATCHED));
  for (int i = 0; i < threads; ++i) fibers[i].state = READY;
  for (bool more = true; more;) {
    for (const int warp : turns(0, (threads + WARP - 1) / WARP)) run_warp(warp);
    more = false;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state == IN_BLOCK) fibers[i].state = READY, more = true;
  }
  EMULATOR_ASAN(__asan_unpoison_memory_region(shared, MOST_SHARED + WATCHED));
  for (size_t i = 0; i < WATCHED; ++i)
    if (shared[shared_bytes + i] != 0xff) die("a block wrote beyond the shared memory that its launch asked for");
}

// ---------------------------------------------------------------- warps

// v as `source` of the warp has it; a thread's own where that takes no part.
template <class T>
T exchange(unsigned mask, T v, int source) {
  static_assert(sizeof(T) <= 8);
  const int lane = current % WARP, first = current - lane;
  if (!(mask >> lane & 1)) die("the calling thread is not in the mask of its warp operation");
  Fiber& f = fibers[current];
  const unsigned p = f.parity ^= 1;
  memcpy(&f.slot[p], &v, sizeof v);
  f.mask = mask;
  wait(IN_WARP);
  if (source >= 0 && source < static_cast<int>(WARP) && (mask >> source & 1) && first + source < threads)
    memcpy(&v, &fibers[first + source].slot[p], sizeof v);
  return v;
}

// Whether any of the threads from `first` on says so, each of which has left its word in the slot p.
inline int any(int first, int n, unsigned p) {
  int found = 0;
  for (int i = first; i < std::min(first + n, threads); ++i) found |= fibers[i].state != DONE && fibers[i].slot[p] != 0;
  return found;
}

inline int vote(State scope, int first, int n, unsigned mask, int predicate) {
  Fiber& f = fibers[current];
  const unsigned p = f.parity ^= 1;
  f.slot[p] = predicate != 0;
  f.mask = mask;
  wait(scope);
  return any(first, n, p);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::IN_BLOCK); }
inline int __syncthreads_or(int predicate) {
  return emulator::vote(emulator::IN_BLOCK, 0, emulator::threads, 0, predicate);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other) {
  return emulator::exchange(mask, v, (emulator::current % emulator::WARP) ^ other);
}
inline int __any_sync(unsigned mask, int predicate) {
  const int first = emulator::current - emulator::current % static_cast<int>(emulator::WARP);
  return emulator::vote(emulator::IN_WARP, first, emulator::WARP, mask, predicate);
}

inline void __stwb(uint4* to, uint4 v) { *to = v; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---------------------------------------------------------------- types of 16 bits, rounded to nearest even

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return {static_cast<uint16_t>(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
  _Float16 narrow;
  memcpy(&narrow, &v, sizeof narrow);
  return static_cast<float>(narrow);
}
inline __half __float2half_rn(float v) {
  const _Float16 narrow = static_cast<_Float16>(v);
  __half h;
  memcpy(&h, &narrow, sizeof h);
  return h;
}

// ---------------------------------------------------------------- the runtime

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid device ordinal";
  }
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::MULTIPROCESSORS;
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  using namespace emulator;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t n = uint64_t{block.x} * block.y * block.z;
  if (n == 0 || n > MOST_THREADS || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > DEFAULT_SHARED) return cudaErrorInvalidValue;
  static thread_local bool launching = false;
  if (std::exchange(launching, true)) die("a launch by device code");
  const std::lock_guard lock(one_launch);
  gridDim = grid;
  blockDim = block;
  threads = static_cast<int>(n);
  make_fibers(n);
  body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(config->dynamicSmemBytes);
      }
  body = nullptr;
  current = -1;
  launching = false;
  return cudaSuccess;
}
