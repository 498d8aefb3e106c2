#include "worker/weights/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"

namespace rankwise::weights {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library
constexpr int kDeepestHeader = 3;                  // an object of objects with arrays
constexpr int64_t kMaxBytes = int64_t{1} << 50;

// The product of the shape and the element size, or -1 when it is negative or too large to be real.
int64_t ShapeBytes(const std::vector<int64_t>& shape, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (const int64_t dim : shape) {
    if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes) || bytes > kMaxBytes) return -1;
  }
  return bytes;
}

bool IsIndex(const json& value) {
  return value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(kMaxBytes);
}

// Callback of the JSON parser: a name appears once.
class Names {
 public:
  bool operator()(int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::key && depth == 1) {
      if (!names_.insert(parsed.get<std::string>()).second) repeated = parsed.get<std::string>();
    }
    return true;
  }
  std::string repeated;

 private:
  std::set<std::string> names_;
};

absl::StatusOr<StoredTensor> ParseTensor(const json& entry, std::span<const std::byte> data) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() || !entry.contains("shape") ||
      !entry["shape"].is_array() || !entry.contains("data_offsets") || !entry["data_offsets"].is_array() ||
      entry["data_offsets"].size() != 2) {
    return absl::InvalidArgumentError("needs dtype, shape and two data_offsets");
  }
  StoredTensor tensor{.dtype = entry["dtype"].get<std::string>()};
  const int64_t element_bytes = SafetensorsDTypeBytes(tensor.dtype);
  if (element_bytes == 0) return absl::InvalidArgumentError(absl::StrCat("unknown dtype ", tensor.dtype));
  if (entry["shape"].size() > 16) return absl::InvalidArgumentError("has more than 16 dimensions");
  for (const json& dim : entry["shape"]) {
    if (!IsIndex(dim)) return absl::InvalidArgumentError(absl::StrCat("bad dimension ", dim.dump()));
    tensor.shape.push_back(dim.get<int64_t>());
  }
  const json &begin = entry["data_offsets"][0], &end = entry["data_offsets"][1];
  if (!IsIndex(begin) || !IsIndex(end) || begin.get<uint64_t>() > end.get<uint64_t>() ||
      end.get<uint64_t>() > data.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("data_offsets ", entry["data_offsets"].dump(), " lie outside ", data.size(), " bytes of data"));
  }
  tensor.bytes = end.get<int64_t>() - begin.get<int64_t>();
  if (ShapeBytes(tensor.shape, element_bytes) != tensor.bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape ", entry["shape"].dump(), " of ", tensor.dtype, " is not ", tensor.bytes, " bytes"));
  }
  tensor.data = data.data() + begin.get<uint64_t>();
  return tensor;
}

}  // namespace

int64_t SafetensorsDTypeBytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> kBytes = {
      {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},  {"I32", 4},     {"I16", 2},    {"I8", 1},
      {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1},   {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  RW_ASSIGN_OR_RETURN(MappedFile mapped, MappedFile::Open(path));
  SafetensorsFile file(std::move(mapped));
  const absl::Status parsed = file.Parse();
  if (!parsed.ok()) return absl::Status(parsed.code(), absl::StrCat(path, ": ", std::string(parsed.message())));
  return file;
}

std::string SafetensorsFile::Metadata(const std::string& key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? std::string() : found->second;
}

absl::Status SafetensorsFile::Parse() {
  const std::span<const std::byte> bytes = file_.bytes();
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(bytes.size(), " bytes are too few for a safetensors file"));
  }
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  const uint64_t limit = std::min<uint64_t>(bytes.size() - sizeof header_bytes, kMaxHeaderBytes);
  if (header_bytes > limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("header of ", header_bytes, " bytes, at most ", limit, " are possible"));
  }
  const char* text = reinterpret_cast<const char*>(bytes.data()) + sizeof header_bytes;
  if (NestsDeeperThan({text, header_bytes}, kDeepestHeader)) {
    return absl::InvalidArgumentError("header is nested too deeply");
  }
  Names names;
  const json header = json::parse(text, text + header_bytes, std::ref(names), /*allow_exceptions=*/false);
  if (!header.is_object()) return absl::InvalidArgumentError("header is not the JSON of a safetensors file");
  if (!names.repeated.empty())
    return absl::InvalidArgumentError(absl::StrCat("tensor ", names.repeated, " appears twice"));
  const std::span<const std::byte> data = bytes.subspan(sizeof header_bytes + header_bytes);
  std::vector<std::pair<const std::byte*, const std::byte*>> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (value.is_string()) metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    absl::StatusOr<StoredTensor> tensor = ParseTensor(entry, data);
    if (!tensor.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " ", std::string(tensor.status().message())));
    }
    if (tensor->bytes > 0) extents.emplace_back(tensor->data, tensor->data + tensor->bytes);
    tensors_.emplace(name, *std::move(tensor));
  }
  std::ranges::sort(extents);
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return absl::InvalidArgumentError("two tensors overlap");
  }
  return absl::OkStatus();
}

std::string SafetensorsHeader(const std::vector<TensorHeader>& tensors,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorHeader& tensor : tensors) {
    const int64_t bytes = ShapeBytes(tensor.shape, SafetensorsDTypeBytes(tensor.dtype));
    RW_CHECK(bytes >= 0, tensor.name);
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  // Metadata may name a file, and a file's name may be no UTF-8.
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + text;
}

}  // namespace rankwise::weights
