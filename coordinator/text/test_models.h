#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/tokenizer.h"
#include "nlohmann/json.hpp"

// Model folders for the tests of this folder.
namespace rankwise::text {

// A model folder that lives as long as this.
class ModelFolder {
 public:
  ModelFolder() {
    std::string name = testing::TempDir() + "/rankwise_model_XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~ModelFolder() { std::filesystem::remove_all(path_); }
  ModelFolder(const ModelFolder&) = delete;
  ModelFolder& operator=(const ModelFolder&) = delete;

  void Write(const std::string& name, const std::string& contents) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << contents;
  }
  void Write(const std::string& name, const nlohmann::json& contents) const { Write(name, contents.dump()); }
  void Link(const std::string& name, const std::string& target) const {
    std::filesystem::create_symlink(target, path_ + "/" + name);
  }

  const std::string& path() const { return path_; }
  absl::StatusOr<std::unique_ptr<Tokenizer>> Load() const { return Tokenizer::Load(path_); }

 private:
  std::string path_;
};

// Where the real tokenizers are, or empty.
inline std::string TestData() {
  const char* set = std::getenv("RANKWISE_TEST_DATA");
  const std::string path = set != nullptr ? set : RANKWISE_SOURCE_DIR "/../shared/data";
  return std::filesystem::is_directory(path) ? path : "";
}

inline std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// A byte-level tokenizer.json: ids 0..255 are the bytes, 256 on what `merges` yield, then <|end|> (special) and <tool>.
inline nlohmann::json ByteLevelModel(const std::vector<std::pair<std::string, std::string>>& merges) {
  nlohmann::json vocabulary, merge_list = nlohmann::json::array();
  int32_t next_id = 0;
  for (; next_id < 256; ++next_id) vocabulary[ToByteSymbols(std::string(1, static_cast<char>(next_id)))] = next_id;
  for (const auto& [left, right] : merges) {
    vocabulary[ToByteSymbols(left + right)] = next_id++;
    merge_list.push_back(ToByteSymbols(left) + " " + ToByteSymbols(right));
  }
  const auto added = [&](const char* content, bool special) {
    return nlohmann::json{{"id", next_id++}, {"content", content}, {"special", special},  {"normalized", false},
                          {"lstrip", false}, {"rstrip", false},    {"single_word", false}};
  };
  return {{"added_tokens", {added("<|end|>", true), added("<tool>", false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merge_list}}}};
}

// A tokenizer.json in SentencePiece style: <unk>, <s>, </s>, 256 bytes from id 3, then letters and merges.
inline nlohmann::json ByteFallbackModel() {
  nlohmann::json vocabulary{{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int byte = 0; byte < 256; ++byte) vocabulary[ByteTokenName(static_cast<uint8_t>(byte))] = 3 + byte;
  int32_t next_id = 259;
  for (const char* piece : {"▁", "a", "b", "c", "é", "ab", "▁ab", "▁▁"}) vocabulary[piece] = next_id++;
  const auto special = [](int32_t id, const char* content) {
    return nlohmann::json{{"id", id}, {"content", content}, {"special", true}, {"normalized", false}};
  };
  const auto replace = [](const char* from, const char* to) {
    return nlohmann::json{{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
  };
  return {{"added_tokens", {special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")}},
          {"normalizer",
           {{"type", "Sequence"}, {"normalizers", {{{"type", "Prepend"}, {"prepend", "▁"}}, replace(" ", "▁")}}}},
          {"pre_tokenizer", nullptr},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}}}}}}},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders",
             {replace("▁", " "),
              {{"type", "ByteFallback"}},
              {{"type", "Fuse"}},
              {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", vocabulary},
            {"merges", {"a b", "▁ ab", "▁ ▁"}}}}};
}

}  // namespace rankwise::text
