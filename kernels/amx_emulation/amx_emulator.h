#pragma once

#include <cstdint>

// The machine code of AMX-TILE and AMX-INT8 on an x86-64 CPU without them: an instruction that the CPU refuses (SIGILL)
// is decoded and carried out on matrix registers of the thread's own, as Intel's manual (Software Developer's Manual,
// volume 2, LDTILECFG to TILEZERO) has it. What would fault there ends the process here, with a line that says why:
// registers without a shape, shapes that do not match, one register used twice. Other instructions stay illegal.
// About two microseconds each, and a product as long as its 16,384 multiplications.
namespace rankwise::amx_emulation {

// Takes SIGILL over, for all threads of this process and for good. Any thread may call it, and again.
void Install();

// Since the process began, of all threads.
int64_t ProductCount();

// Whether the calling thread has shapes set: TILERELEASE is due.
bool IsInUse();

}  // namespace rankwise::amx_emulation
