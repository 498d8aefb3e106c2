#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace rankwise::eval {

// One configuration of a comparison, as the command line names it.
struct Compared {
  std::string name;       // [A-Za-z0-9._-]+, not beginning with a dot: it names a folder
  std::string kv;         // of a cluster to start
  std::string kv_scales;  // folder; empty without int8
  std::string endpoint;   // of a server that runs
};

// A comma-separated list. With a model to start: [NAME=]FORMAT[:SCALES_DIR], FORMAT as in `serve --kv`; the
// name is FORMAT when it is absent or "kv", and `scales` serves an int8 entry without a folder. Without:
// NAME=HOST:PORT. InvalidArgument names the entry; names are unique.
absl::StatusOr<std::vector<Compared>> ParseCompared(const std::string& list, bool has_model, const std::string& scales);

}  // namespace rankwise::eval
