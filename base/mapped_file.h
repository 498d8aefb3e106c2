#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace rankwise {

// A whole file mapped read-only. Owns the mapping; spans borrow from it. Pages come in on first touch, and ranks of one
// host that map the same file share them.
class MappedFile {
 public:
  // NotFound, PermissionDenied, or InvalidArgument for what is not a regular file; the message names the path.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile();

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  MappedFile(std::string path, std::span<const std::byte> bytes) : path_(std::move(path)), bytes_(bytes) {}

  std::string path_;
  std::span<const std::byte> bytes_;
};

// The whole of a small text file. ResourceExhausted when it is larger than `limit_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, size_t limit_bytes = size_t{1} << 30);

// Writes to a temporary name in the same folder, syncs, renames: a reader sees the old file or the new, never a part.
// `mode` is the file's, also while it is written.
absl::Status WriteFileAtomically(const std::string& path, std::string_view contents, mode_t mode = 0644);

}  // namespace rankwise
