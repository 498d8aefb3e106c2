#pragma once

#include <cstdint>

namespace rankwise::comm {

// What a rank can be in, for error messages and for those who watch it. Travels between ranks as its number.
enum class Collective : uint32_t { kNone, kAllReduceSum, kGather, kBroadcast, kGatherMessages, kBarrier };

// As the method of Communicator is called; "?" for a number that is none.
inline const char* Name(Collective collective) {
  constexpr const char* kNames[] = {"no collective", "AllReduceSum",   "Gather",
                                    "Broadcast",     "GatherMessages", "Barrier"};
  const auto index = static_cast<uint32_t>(collective);
  return index < sizeof kNames / sizeof *kNames ? kNames[index] : "?";
}

}  // namespace rankwise::comm
