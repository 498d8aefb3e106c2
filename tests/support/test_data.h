#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace rankwise::testing {

// A file or folder of the optional test data (RANKWISE_TEST_DATA, else beside the checkout); empty when it is not
// there, and then the test skips.
inline std::string TestData(const std::string& name) {
  const char* set = std::getenv("RANKWISE_TEST_DATA");
  const std::string root = set != nullptr ? set : RANKWISE_SOURCE_DIR "/../shared/data";
  const std::string path = root + "/" + name;
  return std::filesystem::exists(path) ? path : "";
}

// A folder of the repository.
inline std::string SourcePath(const std::string& name) { return std::string(RANKWISE_SOURCE_DIR "/") + name; }

}  // namespace rankwise::testing
