#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

struct pcre2_real_code_8;
struct pcre2_real_match_context_8;

namespace rankwise::text {

struct ByteRange {
  size_t begin;
  size_t end;
};

// A compiled Unicode pattern of a tokenizer file. Those patterns are written for Oniguruma: ^ and $ hold at every line.
// FindAll may be called from several threads.
class Regex {
 public:
  // InvalidArgument names the pattern and what is wrong in it.
  static absl::StatusOr<Regex> Compile(const std::string& pattern);

  // A pattern that matches `text` itself.
  static absl::StatusOr<Regex> CompileLiteral(std::string_view text);

  // All non-empty matches from left to right, in time linear in the text for the patterns of real models; a pattern
  // that backtracks without end is cut off with ResourceExhausted. Requires: `text` is UTF-8.
  absl::StatusOr<std::vector<ByteRange>> FindAll(std::string_view text) const;

 private:
  struct FreeCode {
    void operator()(pcre2_real_code_8* code) const;
  };
  struct FreeContext {
    void operator()(pcre2_real_match_context_8* context) const;
  };

  std::unique_ptr<pcre2_real_code_8, FreeCode> code_;
  std::unique_ptr<pcre2_real_match_context_8, FreeContext> limits_;
};

}  // namespace rankwise::text
