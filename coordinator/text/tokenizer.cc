#include "coordinator/text/tokenizer.h"

#include <filesystem>
#include <limits>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/text/bpe_tokenizer.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/model_settings.h"
#include "coordinator/text/sentencepiece_tokenizer.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

bool IsFile(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_folder) {
  std::error_code error;
  const std::string own_dir = absl::StrCat(model_folder, "/triton_models/tokenizer");
  const std::string model_dir = std::filesystem::is_directory(own_dir, error) ? own_dir : model_folder;
  RW_ASSIGN_OR_RETURN(const ModelSettings settings, ReadModelSettings(model_dir));
  const std::string json_path = absl::StrCat(model_dir, "/tokenizer.json");
  const std::string model_path = absl::StrCat(model_dir, "/tokenizer.model");
  const BpeFilePaths bpe_paths{.vocabulary = absl::StrCat(model_dir, "/vocab.json"),
                               .merges = absl::StrCat(model_dir, "/merges.txt")};
  std::string path;
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer;
  if (IsFile(json_path)) {
    path = json_path;
    tokenizer = LoadTokenizerJson(path, settings);
  } else if (IsFile(model_path)) {
    path = model_path;
    RW_ASSIGN_OR_RETURN(const std::string contents, ReadTextFile(path, size_t{256} << 20));
    tokenizer = IsRankFile(contents) ? LoadRankFile(contents, settings) : LoadSentencePiece(contents, settings);
  } else if (IsFile(bpe_paths.vocabulary) && IsFile(bpe_paths.merges)) {
    path = bpe_paths.vocabulary;
    tokenizer = LoadVocabularyAndMerges(bpe_paths, settings);
  } else {
    return absl::NotFoundError(
        absl::StrCat(model_dir, " holds no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt"));
  }
  if (tokenizer.ok()) return tokenizer;
  return absl::Status(tokenizer.status().code(), absl::StrCat(path, ": ", tokenizer.status().message()));
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(const std::string& text, const EncodeOptions& options) const {
  if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()) / 4)
    return absl::InvalidArgumentError(absl::StrCat("text of ", text.size(), " bytes is too long"));
  RW_RETURN_IF_ERROR(ValidateUtf8(text));
  std::vector<int32_t> ids;
  if (options.add_bos.value_or(parts_.adds_bos)) {
    if (!parts_.bos_id) return absl::InvalidArgumentError("BOS is asked for, but the model has none");
    ids.push_back(*parts_.bos_id);
  }
  for (const AddedTokenMatcher::Segment& segment : parts_.added.Split(text, options.parse_special)) {
    if (segment.token) {
      ids.push_back(*segment.token);
      continue;
    }
    const bool begins_text = segment.text.data() == text.data();
    RW_RETURN_IF_ERROR(EncodeSegment({segment.text, begins_text, options.parse_special}, ids));
  }
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  IncrementalDetokenizer detokenizer(this, {.skip_special = skip_special});
  std::string text;
  for (const int32_t id : ids) text += detokenizer.Append(id);
  return text + detokenizer.Flush();
}

std::string Tokenizer::TokenText(int32_t id) const { return ToValidUtf8(piece(id).bytes); }

}  // namespace rankwise::text
