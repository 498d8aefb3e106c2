#include <sentencepiece_processor.h>

#include "coordinator/text/sentencepiece_model.h"

namespace rankwise::text {
namespace {

class LibraryModel : public SentencePieceModel {
 public:
  std::string Load(std::string_view serialized) override {
    const auto status = processor_->LoadFromSerializedProto(serialized);
    return status.ok() ? "" : "not a SentencePiece model: " + status.ToString();
  }

  std::string Encode(std::string_view text, std::vector<int>& ids) const override {
    std::vector<int> encoded;
    const auto status = processor_->Encode(text, &encoded);
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    return status.ok() ? "" : status.ToString();
  }

  std::string DecodeIds(const std::vector<int>& ids) const override { return processor_->DecodeIds(ids); }

  std::string DecodePieces(const std::vector<std::string>& pieces) const override {
    std::string text;
    const auto status = processor_->Decode(pieces, &text);
    return status.ok() ? text : "";
  }

  int size() const override { return processor_->GetPieceSize(); }

  Kind kind(int id) const override {
    if (processor_->IsControl(id)) return Kind::kControl;
    if (processor_->IsUnknown(id)) return Kind::kUnknown;
    return processor_->IsByte(id) ? Kind::kByte : Kind::kNormal;
  }

  const std::string& name(int id) const override { return processor_->IdToPiece(id); }

  int Find(std::string_view name) const override {
    const int id = processor_->PieceToId(name);
    return id >= 0 && id < size() && processor_->IdToPiece(id) == name ? id : -1;
  }

  int bos_id() const override { return processor_->bos_id(); }
  int eos_id() const override { return processor_->eos_id(); }

 private:
  const std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_ =
      std::make_unique<sentencepiece::SentencePieceProcessor>();
};

}  // namespace
}  // namespace rankwise::text

// The plugin's one entry; the caller owns the result.
extern "C" rankwise::text::SentencePieceModel* RankwiseNewSentencePieceModel() {
  return new rankwise::text::LibraryModel();
}
