// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words for
// every number of a counter, the same ones wherever they are asked for. Includes no framework.
#pragma once

#include <cstdint>

#include "norm_math.h"

namespace fastnorm {

// What dropout needs: word i % 4 of counter i / 4 decides over element i, which is kept from `least` on; `scale` is 1 / (1 - p).
struct Dropout {
  const int64_t* seed = nullptr;  // in the device's memory; null: everything is kept, and scale is 1
  uint32_t least = 0;
  double scale = 1;
};

struct Words {
  uint32_t w[4];
};

FN_HD Words philox(uint64_t seed, uint64_t counter) {
  constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(M0) * c0, p1 = static_cast<uint64_t>(M1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += W0;
    k1 += W1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastnorm
