#pragma once

#include <string>
#include <utility>
#include <vector>

#include "proto/inference.pb.h"

namespace rankwise::wire {

// What the tokens of a request depend on besides the request itself, by name: the model, its KV cache, the arithmetic,
// and the TP degree where bits differ with it. Only groups that have all of it in common go on with each other's
// streams, and only runs that have go on with each other's files. The same names in the same order for every model.
std::vector<std::pair<std::string, std::string>> Numerics(const rankwise::v1::GetModelInfoResponse& model);
std::string NumericsLine(const rankwise::v1::GetModelInfoResponse& model);  // "fingerprint …, kv_format int8, …"

}  // namespace rankwise::wire
