// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words for
// every number of a counter, the same ones wherever they are asked for. Includes no framework.
#pragma once

#include <cstdint>

#include "norm_math.h"

namespace fastnorm {

// A word in the lower half of 64 bits, whatever is above it; the CPU has several at once, with functions of the same names.
FN_HD uint64_t product(uint64_t word, uint32_t factor) { return static_cast<uint64_t>(static_cast<uint32_t>(word)) * factor; }
FN_HD uint64_t upper(uint64_t product) { return product >> 32; }
FN_HD uint64_t all(uint64_t, uint32_t word) { return word; }

// The key, and the one of the next round.
struct PhiloxKey {
  uint32_t k0, k1;
  explicit FN_HD PhiloxKey(uint64_t seed) : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  FN_HD void next() {
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
};
constexpr int PHILOX_ROUNDS = 10;

template <class W>
FN_HD void philox_round(W (&c)[4], PhiloxKey key) {
  constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
  const W p0 = product(c[0], M0), p1 = product(c[2], M1);
  c[0] = upper(p1) ^ c[1] ^ all(p1, key.k0);
  c[1] = p1;
  c[2] = upper(p0) ^ c[3] ^ all(p0, key.k1);
  c[3] = p0;
}

// From the counter's two halves in c[0] and c[1], and zeros, to the words.
template <class W>
FN_HD void philox(W (&c)[4], uint64_t seed) {
  PhiloxKey key(seed);
  for (int round = 0; round < PHILOX_ROUNDS; ++round, key.next()) philox_round(c, key);
}

}  // namespace fastnorm
