#pragma once

#include <memory>

#include "kernels/backend.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// For ranks whose devices cannot reach each other, such as two ranks on one GPU: sums values in memory of `backend` by
// way of the host, in the host communicator's order. Everything else is the host's own. Borrows both.
std::unique_ptr<Communicator> CreateStagedCommunicator(Communicator& host, kernels::Backend& backend);

}  // namespace rankwise::comm
