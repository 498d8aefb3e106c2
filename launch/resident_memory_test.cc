#include "launch/resident_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace rankwise::launch {
namespace {

TEST(ResidentMemoryTest, FieldsAreWholeLines) {
  const std::string text = "Pss_Anon:  9 kB\nAnonymous:     112 kB\nAnonHugePages: 3 kB\n";
  EXPECT_EQ(*KilobyteField(text, "Anonymous"), 112 * 1024);
  EXPECT_FALSE(KilobyteField(text, "Anon").ok());
  EXPECT_FALSE(KilobyteField("Anonymous: -1 kB\n", "Anonymous").ok());
  EXPECT_FALSE(KilobyteField("Anonymous: many kB\n", "Anonymous").ok());
}

TEST(ResidentMemoryTest, CountsTouchedPagesAndNoOthers) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  const auto before = ReadResidentMemory(getpid());
  ASSERT_TRUE(before.ok()) << before.status();
  auto* pages =
      static_cast<char*>(mmap(nullptr, 2 * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(pages, MAP_FAILED);
  madvise(pages, 2 * kBytes, MADV_NOHUGEPAGE);
  std::memset(pages, 1, kBytes);
  const auto after = ReadResidentMemory(getpid());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_NEAR(static_cast<double>(after->anonymous - before->anonymous), kBytes, 1 << 20);
  munmap(pages, 2 * kBytes);
}

TEST(ResidentMemoryTest, NoProcessIsNotFound) {
  EXPECT_EQ(ReadResidentMemory(1 << 30).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace rankwise::launch
