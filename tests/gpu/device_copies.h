#pragma once

#include <memory>

#include "kernels/backend.h"

namespace rankwise::kernels {

// A backend whose ops take host memory, as the suites of kernels/ call them: each op's operands are copied to the
// device, to allocations of exactly their size, and what it wrote is copied back. Errors of kernels are
// also printed; those of the copies end the process.
std::unique_ptr<Backend> MakeDeviceCopies(std::unique_ptr<Backend> device);

}  // namespace rankwise::kernels
