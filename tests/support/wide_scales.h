#pragma once

#include <string>
#include <vector>

namespace rankwise::testing {

// int8 scales of a model, the shipped one by default, wide enough for all its K and V: what is tested does not depend
// on how good they are. Every head and every channel has its own. One folder for each TP degree, removed at the end.
class WideScales {
 public:
  // Failures are the test's.
  explicit WideScales(const std::vector<int>& degrees, const std::string& model = "");
  ~WideScales();
  WideScales(const WideScales&) = delete;
  WideScales& operator=(const WideScales&) = delete;

  std::string FolderOf(int tp) const;

 private:
  const std::string parent_;
};

}  // namespace rankwise::testing
