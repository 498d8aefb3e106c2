#pragma once

#include <string>

namespace rankwise {

// The folder of the running program, where its sibling programs and its plug-ins lie. Any thread.
std::string ProgramFolder();

}  // namespace rankwise
