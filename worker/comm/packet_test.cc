#include "worker/comm/packet.h"

#include <gtest/gtest.h>

#include <limits>

namespace rankwise::comm {
namespace {

TEST(PacketTest, SizeAndHeadAgree) {
  for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{4023}, int64_t{4024}, int64_t{4025}, int64_t{1} << 26}) {
    const Packet packet{.message_bytes = size};
    const auto bytes = MessageBytes(packet, 8 + std::min<int64_t>(size, 4024));
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ(*bytes, size);
  }
}

TEST(PacketTest, GarbageIsRefused) {
  struct Garbage {
    int64_t message_bytes;
    int64_t received_bytes;
  };
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  for (const Garbage& garbage : std::vector<Garbage>{{0, 0},
                                                     {0, 7},
                                                     {0, 9},
                                                     {1, 8},
                                                     {-1, 7},
                                                     {-1, 8},
                                                     {std::numeric_limits<int64_t>::min(), 8},
                                                     {4025, 4031},
                                                     {(int64_t{1} << 26) + 1, 4032},
                                                     {kLargest, 4032}}) {
    const Packet packet{.message_bytes = garbage.message_bytes};
    const auto bytes = MessageBytes(packet, garbage.received_bytes);
    EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInternal)
        << garbage.message_bytes << " " << garbage.received_bytes;
  }
}

}  // namespace
}  // namespace rankwise::comm
