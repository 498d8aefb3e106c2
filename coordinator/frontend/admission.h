#pragma once

#include "absl/status/statusor.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.pb.h"
#include "proto/worker.pb.h"

namespace rankwise::frontend {

inline constexpr size_t kMaxPromptBytes = 4 << 20;

// A client's request, checked and tokenised.
struct Admission {
  worker::v1::Submit sequence;  // of sample 0; max_tokens and seed are set
  uint32_t samples = 1;
};

// What can be told without the model: ranges and counts. InvalidArgument names field, value and limit.
absl::Status CheckRequest(const rankwise::v1::GenerateRequest& request);

// InvalidArgument as above; FailedPrecondition for text without a tokenizer. `tokenizer` may be null. Text that cannot
// fit the context is refused before it is tokenised. Requires: CheckRequest is OK. max_tokens of 0 becomes what the
// context has room for; a missing seed becomes `fresh_seed`.
absl::StatusOr<Admission> Admit(const rankwise::v1::GenerateRequest& request,
                                const rankwise::v1::GetModelInfoResponse& model, const text::Tokenizer* tokenizer,
                                uint64_t fresh_seed);

}  // namespace rankwise::frontend
