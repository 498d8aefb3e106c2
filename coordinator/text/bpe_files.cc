#include <algorithm>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/text/bpe_tokenizer.h"
#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/json_file.h"

namespace rankwise::text {
namespace {

// Names of the 256 special tokens, in the order of their ids: llama/tokenizer.py of meta-llama/llama3.
constexpr int32_t kLlama3SpecialCount = 256;
constexpr int32_t kLlama3BeginOfText = 0;
constexpr int32_t kLlama3EndOfText = 1;
constexpr int32_t kLlama3EndOfTurn = 9;
std::string Llama3SpecialName(int32_t index) {
  switch (index) {
    case kLlama3BeginOfText:
      return "<|begin_of_text|>";
    case kLlama3EndOfText:
      return "<|end_of_text|>";
    case 6:
      return "<|start_header_id|>";
    case 7:
      return "<|end_header_id|>";
    case kLlama3EndOfTurn:
      return "<|eot_id|>";
    default:
      return absl::StrCat("<|reserved_special_token_", index < 6 ? index - 2 : index < 9 ? 4 : index - 5, "|>");
  }
}

// A line of a rank file: base64, a space, a decimal rank.
struct RankedToken {
  std::string bytes;
  int32_t rank = 0;
};
std::optional<RankedToken> ParseRankLine(absl::string_view line) {
  constexpr size_t kMaxTokenBytes = 1024;  // Llama 3's longest are 128 spaces
  const std::pair<absl::string_view, absl::string_view> fields = absl::StrSplit(line, absl::MaxSplits(' ', 1));
  RankedToken token;
  if (!absl::Base64Unescape(fields.first, &token.bytes)) return std::nullopt;
  if (token.bytes.empty() || token.bytes.size() > kMaxTokenBytes) return std::nullopt;
  if (!absl::SimpleAtoi(fields.second, &token.rank)) return std::nullopt;
  if (token.rank < 0 || token.rank >= kTokenIdLimit - kLlama3SpecialCount) return std::nullopt;
  return token;
}

// The default special tokens, except where the settings give the id or the name another meaning (Llama 3.1 does).
std::vector<AddedToken> RankFileSpecialTokens(int32_t first_id, const ModelSettings& settings) {
  std::vector<AddedToken> tokens;
  for (int32_t i = 0; i < kLlama3SpecialCount; ++i) {
    AddedToken token{.id = first_id + i, .content = Llama3SpecialName(i), .special = true};
    const bool is_settled =
        std::any_of(settings.added_tokens.begin(), settings.added_tokens.end(),
                    [&](const auto& other) { return other.id == token.id || other.content == token.content; });
    if (!is_settled) tokens.push_back(std::move(token));
  }
  return tokens;
}

// A byte-level vocabulary that lacks bytes would refuse some text only when it comes.
absl::Status CheckAllBytes(const BpeModel& model) {
  for (int byte = 0; byte < 256; ++byte)
    if (!model.Find(ToByteSymbols(std::string(1, static_cast<char>(byte)))))
      return absl::InvalidArgumentError(absl::StrCat("byte ", byte, " has no token"));
  return absl::OkStatus();
}

}  // namespace

bool IsRankFile(const std::string& contents) {
  const size_t end = contents.find('\n');
  return end != std::string::npos && ParseRankLine(absl::string_view(contents).substr(0, end)).has_value();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadRankFile(const std::string& contents, const ModelSettings& settings) {
  TokenizerParts parts;
  BpeComponents components;
  int64_t line_number = 0;
  for (const absl::string_view line : absl::StrSplit(contents, '\n')) {
    ++line_number;
    if (line.empty()) continue;
    const std::optional<RankedToken> token = ParseRankLine(line);
    if (!token) return absl::InvalidArgumentError(absl::StrCat("line ", line_number, " is no base64 token and rank"));
    RW_RETURN_IF_ERROR(components.model.AddToken(ToByteSymbols(token->bytes), token->rank));
    RW_RETURN_IF_ERROR(parts.vocabulary.Add(token->rank, {PieceKind::kByte, token->bytes}));
  }
  RW_RETURN_IF_ERROR(CheckAllBytes(components.model));
  components.model.AddMergesByRank();
  components.model.set_options({.ignore_merges = true});
  RW_ASSIGN_OR_RETURN(components.pre_tokenizer, PreTokenizer::ByteLevelWords(kLlama3Pattern, false));

  const int32_t first_special = parts.vocabulary.size();
  components.added_tokens = RankFileSpecialTokens(first_special, settings);
  parts.adds_bos = true;
  parts.bos_id = first_special + kLlama3BeginOfText;
  parts.eos_ids = {first_special + kLlama3EndOfText, first_special + kLlama3EndOfTurn};
  return MakeBpeTokenizer(std::move(parts), std::move(components), settings);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadVocabularyAndMerges(const BpeFilePaths& paths,
                                                                   const ModelSettings& settings) {
  const std::string& name = settings.tokenizer_class;
  const bool is_qwen2 = name == "Qwen2Tokenizer" || name == "Qwen2TokenizerFast";
  if (!is_qwen2 && !name.empty() && name != "GPT2Tokenizer" && name != "GPT2TokenizerFast")
    return absl::UnimplementedError(absl::StrCat("tokenizer_class '", name, "' with vocab.json is not supported"));
  RW_ASSIGN_OR_RETURN(const nlohmann::json vocabulary, ReadJsonFile(paths.vocabulary));
  RW_ASSIGN_OR_RETURN(const std::string merges, ReadTextFile(paths.merges, size_t{256} << 20));

  TokenizerParts parts;
  BpeComponents components;
  RW_RETURN_IF_ERROR(AddVocabulary(vocabulary, {.is_byte_level = true}, components.model, parts.vocabulary));
  RW_RETURN_IF_ERROR(CheckAllBytes(components.model));
  int64_t line_number = 0;
  for (absl::string_view line : absl::StrSplit(merges, '\n')) {
    ++line_number;
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.empty() || line.substr(0, 8) == "#version") continue;
    const std::vector<std::string> pair = absl::StrSplit(line, ' ');
    if (pair.size() != 2)
      return absl::InvalidArgumentError(absl::StrCat(paths.merges, ": line ", line_number, " is no pair of tokens"));
    RW_RETURN_IF_ERROR(components.model.AddMerge(pair[0], pair[1]));
  }
  if (is_qwen2) components.normalizer = Normalizer::Nfc();
  RW_ASSIGN_OR_RETURN(components.pre_tokenizer,
                      PreTokenizer::ByteLevelWords(is_qwen2 ? kQwen2Pattern : kGpt2Pattern, settings.add_prefix_space));
  return MakeBpeTokenizer(std::move(parts), std::move(components), settings);
}

}  // namespace rankwise::text
