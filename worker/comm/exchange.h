#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// Collective: the texts of all ranks in rank order, on all ranks. If any rank brings an error instead, all return the
// first one; its message names the rank unless all ranks say the same. A text has no line breaks; an error's become
// blanks.
absl::StatusOr<std::vector<std::string>> Exchange(const absl::StatusOr<std::string>& own, Communicator& communicator,
                                                  absl::Duration timeout);

// Collective: OK when every rank is.
absl::Status Agree(const absl::Status& own, Communicator& communicator, absl::Duration timeout);

}  // namespace rankwise::comm
