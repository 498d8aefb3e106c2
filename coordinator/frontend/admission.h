#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.pb.h"
#include "proto/worker.pb.h"

namespace rankwise::frontend {

inline constexpr size_t kMaxPromptBytes = 4 << 20;
inline constexpr uint32_t kMaxSamples = 64;

// A client's request, checked and tokenised: one sequence per sample.
struct Admission {
  std::vector<worker::v1::Submit> sequences;
  uint32_t prompt_tokens = 0;
};

// InvalidArgument naming field, value and limit; FailedPrecondition for text without a tokenizer. `tokenizer` may be null.
// max_tokens of 0 becomes what the context has room for; a missing seed becomes `fresh_seed`.
absl::StatusOr<Admission> Admit(const rankwise::v1::GenerateRequest& request, const rankwise::v1::GetModelInfoResponse& model,
                                const text::Tokenizer* tokenizer, uint64_t fresh_seed);

}  // namespace rankwise::frontend
