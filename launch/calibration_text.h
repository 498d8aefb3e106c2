#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

// From local text files to the token windows that calibration runs through the model.
namespace rankwise::launch {

// How windows are cut, after the data loaders of LMDeploy 0.2.
enum class SamplingRule : uint8_t {
  kStream,     // ptb, wikitext2, files: one token stream, random windows
  kDocuments,  // c4: a random window of a random document that is long enough
  kBlocks,     // pileval: shuffled documents of at most 512 tokens, joined, cut end to end
};

struct CalibrationSource {
  std::string name;  // as given
  SamplingRule rule = SamplingRule::kStream;
  std::vector<std::string> documents;  // UTF-8; a stream is their tokens, joined with an empty line
};

// `dataset` is ptb, c4, wikitext2 or pileval, looked for in `data_folder`, or a comma-separated list of files: plain
// text, or JSONL with a "text" in each record when the name ends in .jsonl. NotFound says where it looked and how to
// get the files.
absl::StatusOr<CalibrationSource> ReadCalibrationSource(const std::string& dataset, const std::string& data_folder);

struct WindowOptions {
  int64_t samples = 128;
  int64_t window_tokens = 2048;
  uint64_t seed = 0;
};

struct Windows {
  std::vector<std::vector<int32_t>> tokens;  // each exactly window_tokens
  std::string notice;                        // what the user should know about them; may be empty
};

using Encode = std::function<absl::StatusOr<std::vector<int32_t>>(const std::string& text)>;

// The same source, tokenizer and options give the same windows everywhere. InvalidArgument when the text has not even
// one.
absl::StatusOr<Windows> CutWindows(const CalibrationSource& source, const Encode& encode, const WindowOptions& options);

// Every token of the vocabulary once, in an order drawn by the seed, in windows that all begin with `prefix` (what a
// tokenizer puts before every text). The last one is filled up with tokens seen before. Requires window_tokens >
// prefix.size() and a vocabulary.
std::vector<std::vector<int32_t>> VocabularyWindows(int64_t vocab_size, const std::vector<int32_t>& prefix,
                                                    const WindowOptions& options);

}  // namespace rankwise::launch
