#include "base/digest.h"

#define XXH_STATIC_LINKING_ONLY  // the state by value
#include <xxhash.h>

#include <algorithm>

#include "absl/strings/str_format.h"

namespace rankwise {
namespace {

std::string Hex(uint64_t digest) { return absl::StrFormat("%016x", digest); }

}  // namespace

std::string Digest(std::string_view bytes) { return Hex(XXH3_64bits(bytes.data(), bytes.size())); }

struct DigestStream::State {
  XXH3_state_t hash;
};

DigestStream::DigestStream() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->hash); }
DigestStream::~DigestStream() = default;

void DigestStream::Add(std::string_view bytes) { XXH3_64bits_update(&state_->hash, bytes.data(), bytes.size()); }

void DigestStream::AddEnds(std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const size_t count = std::min(text.size(), kEndBytes);
  Add(text.substr(0, count));
  Add(text.substr(text.size() - count));
}

std::string DigestStream::Finish() const { return Hex(XXH3_64bits_digest(&state_->hash)); }

}  // namespace rankwise
