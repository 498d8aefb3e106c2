#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace rankwise {

// 64-bit XXH3 as 16 hex digits: against accidents, not against attackers. The same on every host.
std::string Digest(std::string_view bytes);

// The digest of pieces that are added one after the other: that of their concatenation. One thread.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();

  void Add(std::string_view bytes);
  // The first and the last 4096 bytes, or all of fewer, twice: a sample of what is too long to read at start.
  void AddEnds(std::span<const std::byte> bytes);
  std::string Finish() const;

  static constexpr size_t kEndBytes = 4096;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rankwise
