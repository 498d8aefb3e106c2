#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "worker/weights/model_config.h"

namespace rankwise::model {

// Angles for positions [0, position_count), the formulas of Hugging Face transformers' modeling_rope_utils in double.
// Dynamic NTK is fixed at position_count (not at the growing length of each request), so that a row's K does not depend
// on what came later: the invariance of a request needs that.
kernels::RopeTable MakeRopeTable(const weights::RopeConfig& rope, int64_t position_count);

}  // namespace rankwise::model
