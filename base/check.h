#pragma once

#include <string>
#include <string_view>

namespace rankwise {

// Prints where and what, then aborts. For broken invariants of our own; the outside world gets a Status.
[[noreturn]] void CheckFailed(const char* file, int line, std::string_view condition, std::string_view message);

}  // namespace rankwise

// On in release builds too. The message is evaluated only on failure: RW_CHECK(n > 0, absl::StrCat("n=", n)).
#define RW_CHECK(condition, ...)                                                                       \
  do {                                                                                                 \
    if (!(condition)) [[unlikely]]                                                                     \
      ::rankwise::CheckFailed(__FILE__, __LINE__, #condition, ::std::string(__VA_OPT__(__VA_ARGS__))); \
  } while (false)
