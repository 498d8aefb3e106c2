#include "coordinator/text/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace rankwise::text {

SentencePieceModel::SentencePieceModel() : processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::string SentencePieceModel::Load(std::string_view serialized) {
  const auto status = processor_->LoadFromSerializedProto(serialized);
  return status.ok() ? "" : "not a SentencePiece model: " + status.ToString();
}

std::string SentencePieceModel::Encode(std::string_view text, std::vector<int>& ids) const {
  std::vector<int> encoded;
  const auto status = processor_->Encode(text, &encoded);
  ids.insert(ids.end(), encoded.begin(), encoded.end());
  return status.ok() ? "" : status.ToString();
}

std::string SentencePieceModel::DecodeIds(const std::vector<int>& ids) const { return processor_->DecodeIds(ids); }

std::string SentencePieceModel::DecodePieces(const std::vector<std::string>& pieces) const {
  std::string text;
  const auto status = processor_->Decode(pieces, &text);
  return status.ok() ? text : "";
}

int SentencePieceModel::size() const { return processor_->GetPieceSize(); }

SentencePieceModel::Kind SentencePieceModel::kind(int id) const {
  if (processor_->IsControl(id)) return Kind::kControl;
  if (processor_->IsUnknown(id)) return Kind::kUnknown;
  return processor_->IsByte(id) ? Kind::kByte : Kind::kNormal;
}

const std::string& SentencePieceModel::name(int id) const { return processor_->IdToPiece(id); }

int SentencePieceModel::Find(std::string_view name) const {
  const int id = processor_->PieceToId(name);
  return id >= 0 && id < size() && processor_->IdToPiece(id) == name ? id : -1;
}

int SentencePieceModel::bos_id() const { return processor_->bos_id(); }
int SentencePieceModel::eos_id() const { return processor_->eos_id(); }

}  // namespace rankwise::text
