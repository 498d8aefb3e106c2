#include "launch/eval/tasks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "launch/eval/compared.h"
#include "launch/eval/csv.h"
#include "launch/eval/scoring.h"
#include "tests/support/test_data.h"

namespace rankwise::eval {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class Tasks : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_ + "/fewshot"); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void Write(const std::string& name, const std::string& text) const { std::ofstream(folder_ + "/" + name) << text; }
  absl::StatusOr<Task> Read(const std::string& name, uint64_t seed = 0) const {
    return ReadTask(FindTask(name).value(), folder_, seed);
  }
  absl::Status Refusal(const std::string& name) const { return Read(name).status(); }

  const std::string folder_ = ::testing::TempDir() + absl::StrCat("/rankwise-eval-tasks-", getpid());
};

const char kBlank[] = R"({"sentence": "Ann saw Bo, so _ waved. ", "option1": "Ann", "option2": "Bo", "answer": "2"})";

TEST_F(Tasks, AChoiceFillsTheBlank) {
  Write("winogrande.dev.jsonl", absl::StrCat(kBlank, "\n\n"));
  Write("fewshot/winogrande.train64.jsonl", kBlank);
  const auto task = Read("winogrande");
  ASSERT_TRUE(task.ok()) << task.status();
  ASSERT_THAT(task->items, SizeIs(1));
  const Item& item = task->items[0];
  EXPECT_EQ(item.id, "1");
  EXPECT_EQ(item.right_choice, 1u);
  ASSERT_THAT(item.choices, SizeIs(2));
  EXPECT_EQ(item.choices[0].context, "Ann saw Bo, so Ann");
  EXPECT_EQ(item.choices[1].context, "Ann saw Bo, so Bo");
  EXPECT_EQ(item.choices[0].target, " waved.");
  EXPECT_THAT(FindExemplars(*task, item)->solved, ElementsAre("Ann saw Bo, so Bo waved.\n\n"));

  const auto generated = Read("winogrande_gen");
  ASSERT_TRUE(generated.ok()) << generated.status();
  EXPECT_EQ(generated->items[0].question,
            "Which of the following is a good sentence:\nA. Ann saw Bo, so Ann waved.\nB. Ann saw Bo, so Bo waved.\n"
            "Answer:");
  EXPECT_TRUE(IsCorrect(generated->items[0], " B"));
  EXPECT_FALSE(IsCorrect(generated->items[0], " A"));
}

TEST_F(Tasks, HostileLinesAreRefusedByFileLineAndValue) {
  Write("fewshot/winogrande.train64.jsonl", kBlank);
  for (const auto& [line, what] : std::vector<std::pair<std::string, std::string>>{
           {"{", "is not JSON"},
           {"\xFF", "UTF-8"},
           {"[1]", "is not an object"},
           {"null", "is not an object"},
           {R"({"sentence": "a _ b"})", "has no \"option1\""},
           {R"({"sentence": 5, "option1": "a", "option2": "b", "answer": "1"})", "\"sentence\" is not a string"},
           {R"({"sentence": "", "option1": "a", "option2": "b", "answer": "1"})", "\"sentence\" is empty"},
           {R"({"sentence": "a b", "option1": "a", "option2": "b", "answer": "1"})", "0 blanks, not one"},
           {R"({"sentence": "_ a _ b", "option1": "a", "option2": "b", "answer": "1"})", "2 blanks, not one"},
           {R"({"sentence": "a _ ", "option1": "a", "option2": "b", "answer": "1"})", "nothing behind its blank"},
           {R"({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "3"})", "\"answer\" is \"3\""},
           {R"({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": 1})", "\"answer\" is not a string"}}) {
    Write("winogrande.dev.jsonl", absl::StrCat(kBlank, "\n", line, "\n"));
    const absl::Status status = Refusal("winogrande");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << line;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what)) << line;
    const std::string where = what == "UTF-8" ? "winogrande.dev.jsonl: " : "winogrande.dev.jsonl:2: ";
    EXPECT_THAT(std::string(status.message()), HasSubstr(where)) << line;
  }
  Write("winogrande.dev.jsonl", "\n");
  EXPECT_THAT(std::string(Refusal("winogrande").message()), HasSubstr("has no records"));
  std::filesystem::remove(folder_ + "/winogrande.dev.jsonl");
  EXPECT_EQ(Refusal("winogrande").code(), absl::StatusCode::kNotFound);
}

TEST_F(Tasks, ValuesOutOfRangeAreRefused) {
  const auto expect = [&](const std::string& task, const std::string& file, const std::string& line,
                          const std::string& what) {
    Write(file, line);
    const absl::Status status = Refusal(task);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << line;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what)) << line;
  };
  const std::string arc = "arc_easy.val.jsonl";
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":["x","y"],"label":2})",
         "\"label\" is no number below 2");
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":["x","y"],"label":-1})", "\"label\" is no number");
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":["x","y"],"label":0.5})", "\"label\" is no number");
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":["x"],"label":0})", "not 2 to 26");
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":[],"label":0})", "not a list of strings");
  expect("arc_easy", arc, R"({"id":"a","question":"q","choices":["x",7],"label":0})", "is not a string");
  expect("arc_easy", arc, R"({"id":"a\nb","question":"q","choices":["x","y"],"label":0})", "control characters");
  expect("arc_easy", arc,
         R"({"id":"a","question":"q","choices":["x","y"],"label":0}
{"id":"a","question":"r","choices":["x","y"],"label":0})",
         "the id \"a\" comes twice");
  expect(
      "arc_easy", arc,
      absl::StrCat(R"({"id":"a","choices":["x","y"],"label":0,"question":")", std::string((1 << 20) + 1, 'q'), "\"}"),
      "the limit is 1048576");
  expect("gsm8k", "gsm8k.test.jsonl", R"({"question":"q","answer":"18"})", "no single \"#### \"");
  expect("gsm8k", "gsm8k.test.jsonl", R"({"question":"q","answer":"#### many"})", "is no number");
  expect(
      "openbookqa_fact", "openbookqa_fact.test.jsonl",
      R"({"id":"1","fact1":"f","answerKey":"C","question":{"stem":"s","choices":[{"text":"x","label":"A"},{"text":"y","label":"B"}]}})",
      "\"answerKey\" \"C\" is the label of no choice");
  expect("eprstmt", "eprstmt.dev.jsonl", R"({"id":1,"sentence":"s","label":"Neutral"})", "not Positive or Negative");
  expect("lambada", "lambada.test.jsonl", R"({"text":"word "})", "only one word");
  expect("crows_pairs", "crows_pairs.csv", ",sent_more,sent_less\n1,a\n", "crows_pairs.csv:2: has 2 cells");
  expect("crows_pairs", "crows_pairs.csv", ",sent_more\n1,a\n", "has no \"sent_less\"");
  expect("crows_pairs", "crows_pairs.csv", ",sent_more,sent_less\n1,\"a\n\n", "csv:2: a quote that is never closed");
}

TEST_F(Tasks, DeepNestingIsJustRefused) {
  Write("lambada.test.jsonl", std::string(200000, '['));
  EXPECT_THAT(std::string(Refusal("lambada").message()), HasSubstr("is not JSON"));
}

TEST_F(Tasks, ASmallerSampleBeginsALargerOneAndTheSeedDecides) {
  std::string text;
  for (int i = 0; i < 50; ++i) absl::StrAppend(&text, "{\"text\":\"one two ", i, "\"}\n");
  Write("lambada.test.jsonl", text);
  const auto ids = [](const Task& task) {
    std::vector<std::string> ids;
    for (const Item& item : task.items) ids.push_back(item.id);
    return ids;
  };
  const Task first = Read("lambada", 0).value(), again = Read("lambada", 0).value(), other = Read("lambada", 1).value();
  EXPECT_EQ(ids(first), ids(again));
  EXPECT_EQ(first.version, again.version);
  EXPECT_NE(ids(first), ids(other));
  std::vector<std::string> sorted = ids(first);
  EXPECT_FALSE(std::ranges::is_sorted(sorted));
  EXPECT_EQ(std::set(sorted.begin(), sorted.end()).size(), 50u);
  EXPECT_EQ(first.items[0].choices[0].context, "one two");

  Write("lambada.test.jsonl", absl::StrCat(text, "{\"text\":\"one more word\"}\n"));
  EXPECT_NE(Read("lambada").value().version, first.version);
}

TEST_F(Tasks, ANoteOfTheCalculatorIsNoPartOfAnExemplar) {
  Write("gsm8k.test.jsonl", R"({"question":"q","answer":"2+2=<<2+2=4>>4 apples\n#### 1,004"})");
  Write("fewshot/gsm8k.train64.jsonl", R"({"question":"r","answer":"He has <<1+1=2>>2.\n#### 2"})");
  const Task task = Read("gsm8k").value();
  EXPECT_THAT(task.items[0].answers, ElementsAre("1004"));
  EXPECT_EQ(task.exemplars[0].solved[0],
            "Question: r\nLet's think step by step\nAnswer:\nHe has 2.\nThe answer is 2\n\n");
}

TEST(Csv, QuotesHoldCommasQuotesAndLines) {
  const auto rows = ParseCsv("a,\"b,\"\"c\"\"\"\r\n\n\"x\ny\",\nlast,", "f");
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_THAT(*rows, SizeIs(3));
  EXPECT_THAT((*rows)[0].cells, ElementsAre("a", "b,\"c\""));
  EXPECT_THAT((*rows)[1].cells, ElementsAre("x\ny", ""));
  EXPECT_EQ((*rows)[1].line, 3);
  EXPECT_THAT((*rows)[2].cells, ElementsAre("last", ""));
  EXPECT_EQ((*rows)[2].line, 5);
  EXPECT_FALSE(ParseCsv("a\"b", "f").ok());
  EXPECT_FALSE(ParseCsv("\"a\"b", "f").ok());
  EXPECT_THAT(ParseCsv("", "f").value(), SizeIs(0));
  for (const std::string cell : {"plain", "a,b", "say \"x\"", "two\nlines", ""})
    EXPECT_EQ(ParseCsv(CsvCell(cell) + ",end", "f").value()[0].cells[0], cell);
}

TEST(TextWindows, AreWholeAndConsecutive) {
  const Task task = MakeTextTask({1}, {10, 11, 12, 13, 14, 15, 16}, 3, 5).value();
  ASSERT_THAT(task.items, SizeIs(2));
  EXPECT_THAT(task.items[0].tokens, ElementsAre(1, 10, 11, 12));
  EXPECT_THAT(task.items[1].tokens, ElementsAre(1, 13, 14, 15));
  EXPECT_THAT(MakeTextTask({}, {10, 11, 12, 13, 14, 15}, 3, 1).value().items, SizeIs(1));
  EXPECT_FALSE(MakeTextTask({}, {10, 11}, 3, 1).ok());
}

TEST(ComparedList, NamesFormatsAndFolders) {
  const auto list = ParseCompared("kv=f16,kv=int8,c4=int8:./s:1,int8-head:/h", true, "/scales").value();
  ASSERT_THAT(list, SizeIs(4));
  EXPECT_EQ(list[0].name, "f16");
  EXPECT_EQ(list[0].kv_scales, "");
  EXPECT_EQ(list[1].name, "int8");
  EXPECT_EQ(list[1].kv_scales, "/scales");
  EXPECT_EQ(list[2].name, "c4");
  EXPECT_EQ(list[2].kv_scales, "./s:1");
  EXPECT_EQ(list[3].kv, "int8-head");
  EXPECT_EQ(list[3].kv_scales, "/h");
  const auto servers = ParseCompared("a=h:1,b=[::1]:2", false, "").value();
  EXPECT_EQ(servers[1].name, "b");
  EXPECT_EQ(servers[1].endpoint, "[::1]:2");
  for (const auto& [text, what] :
       std::vector<std::pair<std::string, std::string>>{{"", "is not one of"},
                                                        {"f16,f16", "comes twice"},
                                                        {"int4", "int4 is not one of f32, f16, int8"},
                                                        {"int8", "needs scales"},
                                                        {"f16:/scales", "f16 has no scales"},
                                                        {"../x=f16", "a name is"},
                                                        {".x=f16", "a name is"},
                                                        {"f16,", "is not one of"}}) {
    const absl::Status status = ParseCompared(text, true, "").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what)) << text;
  }
  EXPECT_FALSE(ParseCompared("h:1", false, "").ok());
  EXPECT_FALSE(ParseCompared("a=h", false, "").ok());
}

TEST(TaskNames, AnUnknownOneListsTheKnown) {
  EXPECT_THAT(std::string(FindTask("mmlu").status().message()), HasSubstr("is none of winogrande, nq, gsm8k"));
}

// The real files, where they are.
class RealTasks : public ::testing::TestWithParam<std::pair<const char*, size_t>> {};

TEST_P(RealTasks, AreReadWhole) {
  const std::string folder = testing::TestData("accuracy");
  if (folder.empty()) GTEST_SKIP() << "no test data";
  const auto& [name, count] = GetParam();
  const TaskSpec spec = FindTask(name).value();
  const auto task = ReadTask(spec, folder, 0);
  ASSERT_TRUE(task.ok()) << task.status();
  EXPECT_THAT(task->items, SizeIs(count));
  for (const Item& item : task->items) {
    if (spec.rule == Rule::kGenerate) {
      EXPECT_NE(item.question, "");
      ASSERT_FALSE(item.answers.empty());
      if (item.extraction == Extraction::kFact) continue;
      // The right answer, said plainly, is found again.
      const std::string said = item.extraction == Extraction::kPhrase || item.extraction == Extraction::kOption
                                   ? absl::StrCat("So the answer is ", item.answers[0], ".\n")
                                   : item.answers[0];
      EXPECT_TRUE(IsCorrect(item, said)) << item.id << ": " << said;
      EXPECT_FALSE(IsCorrect(item, "")) << item.id;
    } else {
      EXPECT_LT(item.right_choice, item.choices.size()) << item.id;
    }
    const Exemplars* exemplars = FindExemplars(*task, item);
    EXPECT_GE(exemplars == nullptr ? 0 : std::ssize(exemplars->solved), spec.default_shots) << item.id;
  }
}

INSTANTIATE_TEST_SUITE_P(All, RealTasks,
                         ::testing::Values(std::pair("winogrande", 814), std::pair("winogrande_gen", 814),
                                           std::pair("nq", 2402), std::pair("gsm8k", 876), std::pair("bbh", 4328),
                                           std::pair("openbookqa_fact", 321), std::pair("openbookqa_fact_gen", 321),
                                           std::pair("eprstmt", 105), std::pair("eprstmt_gen", 105),
                                           std::pair("crows_pairs", 970), std::pair("crows_pairs_gen", 970),
                                           std::pair("hellaswag", 676), std::pair("arc_easy", 382),
                                           std::pair("arc_challenge", 792), std::pair("lambada", 3436)),
                         [](const auto& info) { return std::string(info.param.first); });

TEST(RealBbh, IsTakenEvenlyFromItsSubsets) {
  const std::string folder = testing::TestData("accuracy");
  if (folder.empty()) GTEST_SKIP() << "no test data";
  const Task task = ReadTask(FindTask("bbh").value(), folder, 0).value();
  std::map<std::string, int> groups;
  for (int i = 0; i < 54; ++i) ++groups[task.items[i].group];
  EXPECT_THAT(groups, SizeIs(27));
  for (const auto& [group, count] : groups) EXPECT_EQ(count, 2) << group;
  const Exemplars& exemplars = *FindExemplars(task, task.items[0]);
  EXPECT_THAT(exemplars.solved, SizeIs(3));
  EXPECT_EQ(exemplars.head.find("canary"), std::string::npos);
}

}  // namespace
}  // namespace rankwise::eval
