#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::weights {

// A TurboMind workspace of layout 0.2 as a checkpoint: Hugging Face's orientation and order of heads, for any plan the
// model allows, whatever tp its files are cut for; padded rows of the vocabulary are left out. Every file, of all
// ranks, must be there with the size that config.ini, and manifest.json if there is one, give. The content of those
// that a rank reads is compared by Verify; the other ranks compare theirs. Errors name the file.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenWorkspace(const std::string& folder);

}  // namespace rankwise::weights
