#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

// sentencepiece_processor.h defines absl::string_view its own way, so it cannot meet Abseil in one source file: here
// are standard types only. An error is a message; empty means none.

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace rankwise::text {

class SentencePieceModel {
 public:
  enum class Kind : uint8_t { kNormal, kControl, kUnknown, kByte };

  SentencePieceModel();
  ~SentencePieceModel();

  // Loads the bytes of a .model file.
  std::string Load(std::string_view serialized);
  // Appends the ids. May be called from several threads.
  std::string Encode(std::string_view text, std::vector<int>& ids) const;
  std::string DecodeIds(const std::vector<int>& ids) const;
  std::string DecodePieces(const std::vector<std::string>& pieces) const;

  int size() const;
  // Requires: 0 <= id < size().
  Kind kind(int id) const;
  const std::string& name(int id) const;
  // -1 when the model has none.
  int Find(std::string_view name) const;
  int bos_id() const;
  int eos_id() const;

 private:
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
};

}  // namespace rankwise::text
