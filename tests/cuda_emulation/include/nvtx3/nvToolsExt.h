#pragma once

#include "tests/cuda_emulation/emulator.h"

inline int nvtxRangePushA(const char* name) { return rankwise::cuda_emulation::EnterRange(name); }
inline int nvtxRangePop() { return rankwise::cuda_emulation::LeaveRange(); }
