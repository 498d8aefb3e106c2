#include "worker/weights/model_folder.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "base/mapped_file.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;

class ModelFolder : public ::testing::Test {
 protected:
  ModelFolder() : root_(::testing::TempDir() + "model_folder_" + std::to_string(getpid())) {
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  ~ModelFolder() override { fs::remove_all(root_); }

  static void Put(const std::string& path, const std::string& text) { std::ofstream(path) << text; }
  std::set<std::string> Names(const std::string& folder) const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(root_ + folder)) names.insert(entry.path().filename());
    return names;
  }
  std::string Mark() const { return ReadTextFile(root_ + "/out/mark").value_or("none"); }
  absl::Status Write(const std::string& text, bool replaces) const {
    return WriteFolder(root_ + "/out/", {.replaces = replaces, .marker = "mark"}, [&](const std::string& folder) {
      Put(folder + "/mark", text);
      return absl::OkStatus();
    });
  }

  const std::string root_;
};

TEST_F(ModelFolder, IsWrittenWholeOrNotAtAll) {
  const auto fail = [&](const std::string& folder) {
    EXPECT_EQ(Names(""), std::set<std::string>{fs::path(folder).filename()});
    Put(folder + "/mark", "half");
    return absl::InternalError("full");
  };
  EXPECT_EQ(WriteFolder(root_ + "/out", {}, fail), absl::InternalError("full"));
  EXPECT_TRUE(Names("").empty());
  EXPECT_EQ(Write("new", /*replaces=*/false), absl::OkStatus());
  EXPECT_EQ(Names(""), std::set<std::string>{"out"});
  EXPECT_EQ(Mark(), "new");
}

TEST_F(ModelFolder, AnOldOneGoesOnlyWhenTheNewOneIsInPlace) {
  ASSERT_EQ(Write("old", false), absl::OkStatus());
  EXPECT_TRUE(absl::IsAlreadyExists(Write("new", false)));
  const absl::Status failed =
      WriteFolder(root_ + "/out", {.replaces = true, .marker = "mark"}, [&](const std::string&) {
        EXPECT_EQ(Mark(), "old");
        return absl::InternalError("full");
      });
  EXPECT_EQ(failed, absl::InternalError("full"));
  EXPECT_EQ(Mark(), "old");
  // The new one cannot be moved: here because it is gone.
  const absl::Status vanished =
      WriteFolder(root_ + "/out", {.replaces = true, .marker = "mark"}, [&](const std::string& folder) {
        fs::remove_all(folder);
        return absl::OkStatus();
      });
  EXPECT_NE(std::string(vanished.message()).find(root_ + "/out"), std::string::npos) << vanished;
  EXPECT_EQ(Mark(), "old");
  EXPECT_EQ(Write("new", true), absl::OkStatus());
  EXPECT_EQ(Mark(), "new");
  EXPECT_EQ(Names(""), std::set<std::string>{"out"});
}

TEST_F(ModelFolder, AnotherOnesIsNotReplaced) {
  fs::create_directories(root_ + "/out");
  Put(root_ + "/out/letters", "mine");
  const absl::Status refused = Write("new", true);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find("has no mark"), std::string::npos) << refused;
  EXPECT_EQ(Names("/out"), std::set<std::string>{"letters"});
}

TEST_F(ModelFolder, TokenizerFilesAreThoseBesideTheWeights) {
  for (const char* folder : {"/model", "/out"}) fs::create_directories(root_ + folder);
  for (const char* name : {"tokenizer.json", "tokenizer.model", "qwen.tiktoken", "merges.txt", "config.json",
                           "model.safetensors.index.json", "model.safetensors", "README.md"}) {
    Put(root_ + "/model/" + name, "source");
  }
  fs::create_directories(root_ + "/model/folder.json");
  Put(root_ + "/out/config.json", "own");
  EXPECT_EQ(CopyTokenizerFiles(root_ + "/model", root_ + "/out"), absl::OkStatus());
  EXPECT_EQ(Names("/out"),
            (std::set<std::string>{"tokenizer.json", "tokenizer.model", "qwen.tiktoken", "merges.txt", "config.json"}));
  EXPECT_EQ(*ReadTextFile(root_ + "/out/config.json"), "own");
  const absl::Status missing = CopyTokenizerFiles(root_ + "/nowhere", root_ + "/out");
  EXPECT_NE(std::string(missing.message()).find(root_ + "/nowhere"), std::string::npos) << missing;
}

}  // namespace
}  // namespace rankwise::weights
