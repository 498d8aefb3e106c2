#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace rankwise::text {

// A SentencePiece model, by the library of that name. Debian's build of it carries and exports a protobuf of its own,
// older than the one gRPC links, so it lives in a plugin that is opened with a symbol scope of its own. Standard types
// only: the library's headers cannot meet Abseil's. An error is a message; empty means none.
class SentencePieceModel {
 public:
  enum class Kind : uint8_t { kNormal, kControl, kUnknown, kByte };

  // Opens the plugin, once per process, from the program's own folder. Null when it cannot be opened; `error` says why.
  static std::unique_ptr<SentencePieceModel> Create(std::string& error);
  virtual ~SentencePieceModel() = default;

  // Loads the bytes of a .model file.
  virtual std::string Load(std::string_view serialized) = 0;
  // Appends the ids. May be called from several threads.
  virtual std::string Encode(std::string_view text, std::vector<int>& ids) const = 0;
  virtual std::string DecodeIds(const std::vector<int>& ids) const = 0;
  virtual std::string DecodePieces(const std::vector<std::string>& pieces) const = 0;

  virtual int size() const = 0;
  // Requires: 0 <= id < size().
  virtual Kind kind(int id) const = 0;
  virtual const std::string& name(int id) const = 0;
  // -1 when the model has none.
  virtual int Find(std::string_view name) const = 0;
  virtual int bos_id() const = 0;
  virtual int eos_id() const = 0;
};

}  // namespace rankwise::text
