#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"

namespace rankwise::weights {

struct FolderOptions {
  bool replaces = false;  // an existing folder that holds `marker`; otherwise AlreadyExists
  std::string marker;     // a file, relative to the folder, that tells our own folders from others
};

// Writes `destination` whole or not at all: `fill` gets a new folder beside it, which takes its place when `fill`
// succeeds and is removed when it does not. A folder that is replaced goes only when the new one is in its place.
// AlreadyExists without `replaces`, FailedPrecondition where the marker is missing: both before `fill` is called.
absl::Status WriteFolder(const std::string& destination, const FolderOptions& options,
                         const std::function<absl::Status(const std::string& folder)>& fill);

// What a model folder has beside its weights and their index: tokenizer models and JSON files. Those that `folder` has
// already stay as they are.
absl::Status CopyTokenizerFiles(const std::string& model_dir, const std::string& folder);

}  // namespace rankwise::weights
