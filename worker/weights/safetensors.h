#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mapped_file.h"

namespace rankwise::weights {

// One tensor inside a mapped file: bounds, shape and size agree.
struct StoredTensor {
  std::string dtype;  // as in the file: "F32", "F16", "BF16", "I64" …
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // not aligned
  int64_t bytes = 0;
};

// A .safetensors file, not trusted: u64 header length, JSON header, data. Every tensor lies inside the file, has the
// bytes its dtype and shape ask for, and overlaps no other.
class SafetensorsFile {
 public:
  // InvalidArgument naming file, tensor and value.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  // Empty when the file says nothing of it.
  std::string Metadata(const std::string& key) const;

 private:
  explicit SafetensorsFile(MappedFile file) : file_(std::move(file)) {}
  absl::Status Parse();

  MappedFile file_;
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Bytes of one element, or 0 for a dtype that safetensors does not have.
int64_t SafetensorsDTypeBytes(const std::string& dtype);

// The header of a file with these tensors, laid out in the order given: what precedes the data.
struct TensorHeader {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
};
std::string SafetensorsHeader(const std::vector<TensorHeader>& tensors,
                              const std::map<std::string, std::string>& metadata);

}  // namespace rankwise::weights
