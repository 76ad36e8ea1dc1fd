// The emulated GPU's shared memory, and the order of its threads' turns.
#include "emulator.h"

namespace fastnorm::cuda {
__align__(16) unsigned char shared_memory[emulator::MOST_SHARED + emulator::WATCHED];
}

extern "C" __attribute__((visibility("default"))) void emulator_order(int order) {
  emulator::order = static_cast<emulator::Order>(order);
}
