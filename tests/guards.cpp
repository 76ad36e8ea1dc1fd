// torch's CPU buffers between guard zones: bytes that are NaN in every floating dtype, and that a check compares afterwards.
// ASAN's own zones do not do, because gcc instruments no masked vector instruction; here a masked write shows in the zone, and
// what a masked read gets is NaN. Every other access to the zones stops at once where this is compiled with ASAN.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define UNCHECKED __attribute__((no_sanitize("address")))
#else
#define ASAN_POISON_MEMORY_REGION(p, n) (void)0
#define UNCHECKED
#endif

namespace {

constexpr size_t ZONE = 4096;  // bytes; a multiple of torch's alignment
constexpr unsigned char FILL = 0xFF;

std::mutex& mutex = *new std::mutex;  // neither is destroyed: a buffer may outlive every static object
std::map<unsigned char*, size_t>& live = *new std::map<unsigned char*, size_t>;
int64_t changed_in_the_dead = 0;

// How many bytes of a zone have changed, and the zone as it was.
UNCHECKED int64_t restore(unsigned char* zone) {
  int64_t changed = 0;
  for (size_t i = 0; i < ZONE; ++i) {
    changed += zone[i] != FILL;
    zone[i] = FILL;
  }
  return changed;
}

int64_t restore_around(unsigned char* p, size_t n) { return restore(p - ZONE) + restore(p + n); }

void release(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto buffer = live.find(static_cast<unsigned char*>(data));
  changed_in_the_dead += restore_around(buffer->first, buffer->second);
  std::free(buffer->first - ZONE);
  live.erase(buffer);
}

struct Guards final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const size_t size = (ZONE + n + ZONE + c10::gAlignment - 1) / c10::gAlignment * c10::gAlignment;
    unsigned char* p = static_cast<unsigned char*>(std::aligned_alloc(c10::gAlignment, size)) + ZONE;
    restore_around(p, n);
    ASAN_POISON_MEMORY_REGION(p - ZONE, ZONE);
    ASAN_POISON_MEMORY_REGION(p + n, ZONE);
    const std::lock_guard<std::mutex> lock(mutex);
    live[p] = n;
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

Guards guards;
c10::Allocator* usual = nullptr;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void guards_install() {
  usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&guards);
}
void guards_remove() { c10::SetCPUAllocator(usual); }

// The bytes of all zones that have changed since this was last asked.
int64_t guards_changed() {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t changed = std::exchange(changed_in_the_dead, 0);
  for (const auto& [p, n] : live) changed += restore_around(p, n);
  return changed;
}

// What the sanitizers have to stop, given the wrong i.
float element(const float* p, int64_t i) { return p[i]; }
int32_t successor(int32_t i) { return i + 1; }
}
