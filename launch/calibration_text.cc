#include "launch/calibration_text.h"

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace rankwise::launch {
namespace {

constexpr char kJoint[] = "\n\n";
constexpr int64_t kPilevalDocumentTokens = 512;  // longer ones are left out

struct Named {
  absl::string_view name;
  SamplingRule rule;
  std::vector<absl::string_view>
      prefixes;  // of file names; the first that matches wins, except for documents, which pool
  absl::string_view suffix;
  absl::string_view source;
};

const std::vector<Named>& NamedDatasets() {
  static const auto& datasets = *new std::vector<Named>{
      {"ptb",
       SamplingRule::kStream,
       {"ptb.train", "ptb.valid", "ptb.test"},
       ".txt",
       "the Penn Treebank in Mikolov's preprocessing: ptb.train.txt of the simple-examples archive"},
      {"wikitext2",
       SamplingRule::kStream,
       {"wikitext2.raw.train", "wikitext2.raw.valid", "wikitext2"},
       ".txt",
       "wikitext-2-raw: wiki.train.raw, renamed to wikitext2.raw.train.txt"},
      {"c4",
       SamplingRule::kDocuments,
       {"c4"},
       ".jsonl",
       "allenai/c4: en/c4-train.00000-of-01024.json.gz, unpacked, named c4.train.jsonl"},
      {"pileval",
       SamplingRule::kBlocks,
       {"pileval", "pile.val", "val"},
       ".jsonl",
       "the Pile's val.jsonl.zst, unpacked, named pileval.jsonl"}};
  return datasets;
}

std::vector<std::string> FindFiles(const Named& dataset, const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.is_regular_file(error)) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  std::vector<std::string> found;
  for (const absl::string_view prefix : dataset.prefixes) {
    for (const std::string& name : names) {
      const bool has_room = found.empty() || dataset.rule == SamplingRule::kDocuments;
      if (has_room && absl::StartsWith(name, prefix) && absl::EndsWith(name, dataset.suffix))
        found.push_back(absl::StrCat(folder, "/", name));
    }
  }
  return found;
}

absl::Status AppendJsonLines(const std::string& path, const std::string& text, std::vector<std::string>& documents) {
  int64_t line_number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const auto record = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
    if (!record.is_object() || !record.contains("text") || !record["text"].is_string())
      return absl::InvalidArgumentError(absl::StrCat(path, ":", line_number, ": not a JSON object with a \"text\""));
    documents.push_back(record["text"].get<std::string>());
  }
  return absl::OkStatus();
}

// The rows as the Hugging Face data sets have them: ptb without the ends of lines, wikitext2 with them, and empty lines
// as rows of nothing.
void AppendRows(const std::string& text, bool keeps_ends, std::vector<std::string>& documents) {
  for (const absl::string_view line : absl::StrSplit(absl::StripSuffix(text, "\n"), '\n')) {
    const absl::string_view stripped = absl::StripAsciiWhitespace(line);
    if (!keeps_ends && stripped.empty()) continue;
    documents.push_back(keeps_ends ? (stripped.empty() ? std::string() : absl::StrCat(line, "\n"))
                                   : std::string(stripped));
  }
}

// splitmix64 (Steele, Lea, Flood 2014): the same on every platform, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // In [0, limit).
  size_t Below(size_t limit) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    __extension__ using Wide = unsigned __int128;
    return static_cast<size_t>((static_cast<Wide>(z) * limit) >> 64);
  }

 private:
  uint64_t state_;
};

template <typename T>
void Shuffle(std::vector<T>& values, Random& random) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random.Below(i)]);
}

std::vector<int32_t> RandomWindow(const std::vector<int32_t>& tokens, size_t length, Random& random) {
  const auto begin = tokens.begin() + static_cast<ptrdiff_t>(random.Below(tokens.size() - length + 1));
  return {begin, begin + static_cast<ptrdiff_t>(length)};
}

absl::StatusOr<Windows> FromStream(const CalibrationSource& source, const Encode& encode,
                                   const WindowOptions& options) {
  RW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, encode(absl::StrJoin(source.documents, kJoint)));
  const auto length = static_cast<size_t>(options.window_tokens);
  if (tokens.size() < length)
    return absl::InvalidArgumentError(absl::StrCat(source.name, " has ", tokens.size(),
                                                   " tokens, fewer than one window of ", length,
                                                   "; give more text or a smaller --calib-seqlen"));
  Windows windows;
  Random random(options.seed);
  for (int64_t i = 0; i < options.samples; ++i) windows.tokens.push_back(RandomWindow(tokens, length, random));
  if (static_cast<int64_t>(tokens.size()) < options.samples * options.window_tokens)
    windows.notice = absl::StrCat(source.name, " has ", tokens.size(), " tokens: ", options.samples, " windows of ",
                                  length, " overlap");
  return windows;
}

absl::StatusOr<Windows> FromDocuments(const CalibrationSource& source, const Encode& encode,
                                      const WindowOptions& options) {
  const auto length = static_cast<size_t>(options.window_tokens);
  std::vector<std::optional<std::vector<int32_t>>> encoded(source.documents.size());
  std::vector<size_t> candidates(source.documents.size());  // not yet seen to be too short
  std::iota(candidates.begin(), candidates.end(), size_t{0});
  size_t longest = 0;
  Windows windows;
  Random random(options.seed);
  while (static_cast<int64_t>(windows.tokens.size()) < options.samples && !candidates.empty()) {
    const size_t drawn = random.Below(candidates.size()), index = candidates[drawn];
    if (!encoded[index]) {
      RW_ASSIGN_OR_RETURN(encoded[index], encode(source.documents[index]));
    }
    if (encoded[index]->size() >= length) {
      windows.tokens.push_back(RandomWindow(*encoded[index], length, random));
      continue;
    }
    // Never drawn again: the choice among the others is the same as if it were, and rejected.
    longest = std::max(longest, encoded[index]->size());
    encoded[index]->clear();
    candidates[drawn] = candidates.back();
    candidates.pop_back();
  }
  if (candidates.empty())
    return absl::InvalidArgumentError(absl::StrCat(
        source.name, ": none of its ", source.documents.size(), " documents has the ", length,
        " tokens of a window, the longest ", longest,
        "; give whole documents, a smaller --calib-seqlen, or the file's own name, which joins its documents"));
  if (static_cast<int64_t>(candidates.size()) < options.samples) {
    const int64_t usable = absl::c_count_if(encoded, [&](const auto& e) { return e && e->size() >= length; });
    windows.notice = absl::StrCat(source.name, ": ", options.samples, " windows come from ", usable, " documents");
  }
  return windows;
}

absl::StatusOr<Windows> FromBlocks(const CalibrationSource& source, const Encode& encode,
                                   const WindowOptions& options) {
  std::vector<size_t> order(source.documents.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  Random random(options.seed);
  Shuffle(order, random);
  std::vector<int32_t> joined;
  int64_t taken = 0;
  for (size_t i = 0; i < order.size() && taken < options.samples; ++i) {
    RW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                        encode(std::string(absl::StripAsciiWhitespace(source.documents[order[i]]))));
    if (tokens.empty() || static_cast<int64_t>(tokens.size()) > kPilevalDocumentTokens) continue;
    joined.insert(joined.end(), tokens.begin(), tokens.end());
    ++taken;
  }
  Windows windows;
  const auto length = static_cast<ptrdiff_t>(options.window_tokens);
  for (auto begin = joined.begin(); joined.end() - begin >= length; begin += length)
    windows.tokens.emplace_back(begin, begin + length);
  if (windows.tokens.empty())
    return absl::InvalidArgumentError(absl::StrCat(source.name, ": ", taken, " documents of at most ",
                                                   kPilevalDocumentTokens, " tokens join to ", joined.size(),
                                                   " tokens, fewer than one window of ", length));
  if (static_cast<int64_t>(windows.tokens.size()) < options.samples)
    windows.notice = absl::StrCat(source.name, ": ", taken, " short documents join to ", windows.tokens.size(),
                                  " windows, fewer than the ", options.samples, " asked for");
  return windows;
}

}  // namespace

absl::StatusOr<CalibrationSource> ReadCalibrationSource(const std::string& dataset, const std::string& data_folder) {
  CalibrationSource source{.name = dataset};
  std::vector<std::string> files = absl::StrSplit(dataset, ',', absl::SkipEmpty());
  const auto named = absl::c_find_if(NamedDatasets(), [&](const Named& n) { return n.name == dataset; });
  const bool is_named = named != NamedDatasets().end();
  if (is_named) {
    source.rule = named->rule;
    files = FindFiles(*named, data_folder);
    if (files.empty())
      return absl::NotFoundError(
          absl::StrCat("no files of \"", dataset, "\" in ", data_folder, "; looked for ",
                       absl::StrJoin(named->prefixes, ", ",
                                     [&](std::string* out, auto p) { absl::StrAppend(out, p, "*", named->suffix); }),
                       ". Get ", named->source,
                       ", and give its folder as --data-dir; or name any text file as --calib-dataset FILE"));
  }
  for (const std::string& file : files) {
    RW_ASSIGN_OR_RETURN(std::string text, ReadTextFile(file));
    if (absl::EndsWith(file, ".jsonl")) {
      RW_RETURN_IF_ERROR(AppendJsonLines(file, text, source.documents));
    } else if (is_named) {
      AppendRows(text, dataset == "wikitext2", source.documents);
    } else {
      source.documents.push_back(std::move(text));
    }
  }
  if (source.documents.empty())
    return absl::InvalidArgumentError(absl::StrCat("--calib-dataset \"", dataset, "\" holds no text"));
  return source;
}

absl::StatusOr<Windows> CutWindows(const CalibrationSource& source, const Encode& encode,
                                   const WindowOptions& options) {
  switch (source.rule) {
    case SamplingRule::kStream:
      return FromStream(source, encode, options);
    case SamplingRule::kDocuments:
      return FromDocuments(source, encode, options);
    case SamplingRule::kBlocks:
      return FromBlocks(source, encode, options);
  }
  return absl::InternalError("no such sampling rule");
}

std::vector<std::vector<int32_t>> VocabularyWindows(int64_t vocab_size, const std::vector<int32_t>& prefix,
                                                    const WindowOptions& options) {
  RW_CHECK(vocab_size > 0 && options.window_tokens > static_cast<int64_t>(prefix.size()));
  std::vector<int32_t> tokens(vocab_size);
  std::iota(tokens.begin(), tokens.end(), 0);
  Random random(options.seed);
  Shuffle(tokens, random);
  std::vector<std::vector<int32_t>> windows;
  for (size_t next = 0; next < tokens.size();) {
    std::vector<int32_t>& window = windows.emplace_back(prefix);
    while (static_cast<int64_t>(window.size()) < options.window_tokens)
      window.push_back(tokens[next++ % tokens.size()]);
  }
  return windows;
}

}  // namespace rankwise::launch
