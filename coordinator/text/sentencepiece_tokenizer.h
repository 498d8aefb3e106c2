#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/text/model_settings.h"
#include "coordinator/text/tokenizer.h"

namespace rankwise::text {

// From the bytes of a SentencePiece .model file (BPE or unigram), encoded by the SentencePiece library. Adds BOS unless
// the settings say otherwise, as the Hugging Face classes for such files do. Text between added tokens is encoded piece
// by piece.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& serialized,
                                                             const ModelSettings& settings);

}  // namespace rankwise::text
