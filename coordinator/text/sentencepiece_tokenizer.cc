#include "coordinator/text/sentencepiece_tokenizer.h"

#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/json_file.h"
#include "coordinator/text/sentencepiece_model.h"

namespace rankwise::text {
namespace {

constexpr char kSpaceSymbol[] = "\xE2\x96\x81";  // ▁
// A second normalizer_spec { add_dummy_prefix: false } behind a serialized ModelProto: protobuf merges it into the
// first (field 3, 2 bytes long; its field 3 is 0).
constexpr std::string_view kWithoutDummyPrefix("\x1A\x02\x18\x00", 4);

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(TokenizerParts parts, std::unique_ptr<SentencePieceModel> model,
                         std::unique_ptr<SentencePieceModel> continuation)
      : Tokenizer(std::move(parts)), model_(std::move(model)), continuation_(std::move(continuation)) {}

 private:
  absl::Status EncodeSegment(const Segment& segment, std::vector<int32_t>& ids) const override {
    const SentencePieceModel& model = segment.begins_text || !continuation_ ? *model_ : *continuation_;
    const std::string error = model.Encode(segment.text, ids);
    return error.empty() ? absl::OkStatus() : absl::InternalError(absl::StrCat("SentencePiece: ", error));
  }

  std::unique_ptr<SentencePieceModel> model_;
  std::unique_ptr<SentencePieceModel> continuation_;  // for text behind an added token; may be null
};

absl::StatusOr<Piece> MakePiece(const SentencePieceModel& model, int id) {
  const std::string& name = model.name(id);
  switch (model.kind(id)) {
    case SentencePieceModel::Kind::kControl:
      return Piece{PieceKind::kSpecial, name};
    case SentencePieceModel::Kind::kUnknown:
      return Piece{PieceKind::kLiteral, model.DecodeIds({id})};
    case SentencePieceModel::Kind::kByte: {
      const std::optional<uint8_t> byte = ParseByteToken(name);
      if (!byte) return absl::InvalidArgumentError(absl::StrCat("byte piece '", name, "' of id ", id, " is malformed"));
      return Piece{PieceKind::kByte, std::string(1, static_cast<char>(*byte))};
    }
    case SentencePieceModel::Kind::kNormal:
      break;
  }
  return Piece{PieceKind::kText, absl::StrReplaceAll(name, {{kSpaceSymbol, " "}})};
}

// The file format says this in flags that the library does not show, so it is asked by example.
LeadingSpace FindLeadingSpaceRule(const SentencePieceModel& model) {
  const std::string piece = absl::StrCat(kSpaceSymbol, "a");
  if (model.DecodePieces({piece}) != "a") return LeadingSpace::kKeep;
  return model.DecodePieces({kSpaceSymbol, piece}) == "a" ? LeadingSpace::kDropOneOfEachPiece : LeadingSpace::kDropOne;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& serialized,
                                                             const ModelSettings& settings) {
  std::string plugin_error;
  auto model = SentencePieceModel::Create(plugin_error);
  if (model == nullptr) return absl::UnimplementedError(plugin_error);
  if (const std::string error = model->Load(serialized); !error.empty()) return absl::InvalidArgumentError(error);
  if (model->size() <= 0 || model->size() > kTokenIdLimit)
    return absl::InvalidArgumentError(absl::StrCat("a vocabulary of ", model->size(), " pieces"));

  TokenizerParts parts;
  parts.rules = {
      .leading_space = FindLeadingSpaceRule(*model), .replaces_each_byte = true, .special_ends_character = true};
  for (int id = 0; id < model->size(); ++id) {
    RW_ASSIGN_OR_RETURN(Piece piece, MakePiece(*model, id));
    RW_RETURN_IF_ERROR(parts.vocabulary.Add(id, std::move(piece)));
  }
  if (model->bos_id() >= 0) parts.bos_id = model->bos_id();
  if (model->eos_id() >= 0) parts.eos_ids = {model->eos_id()};
  parts.adds_bos = parts.bos_id.has_value();

  VocabularyBase base;
  base.may_rename = true;
  base.lookup = [&model](const std::string& name) -> std::optional<int32_t> {
    const int id = model->Find(name);
    return id < 0 ? std::nullopt : std::optional<int32_t>(id);
  };
  RW_ASSIGN_OR_RETURN(const std::vector<AddedToken> added, ApplySettings(settings, base, parts));
  for (const AddedToken& token : added) parts.added.Add(token.content, token);

  std::unique_ptr<SentencePieceModel> continuation;
  if (!settings.legacy && parts.rules.leading_space != LeadingSpace::kKeep) {
    continuation = SentencePieceModel::Create(plugin_error);
    const std::string error = continuation->Load(absl::StrCat(serialized, std::string(kWithoutDummyPrefix)));
    if (!error.empty()) return absl::InvalidArgumentError(error);
  }
  return std::make_unique<SentencePieceTokenizer>(std::move(parts), std::move(model), std::move(continuation));
}

}  // namespace rankwise::text
