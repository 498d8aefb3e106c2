#include "launch/eval/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "launch/eval/csv.h"

namespace rankwise::eval {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Four questions; the right answer is always "7".
Task Questions() {
  Task task{.spec = {.name = "gsm8k", .rule = Rule::kGenerate, .metric = "exact match"}};
  for (int i = 0; i < 4; ++i) task.items.push_back({.id = absl::StrCat(i), .question = "q", .answers = {"7"}});
  task.exemplars = {{.solved = {"a", "b"}}};
  return task;
}

json Said(const char* text, int shots = 2) { return {{"text", text}, {"shots", shots}}; }

absl::StatusOr<std::vector<Row>> Rows(const Task& task, const std::vector<std::vector<json>>& answers,
                                      size_t limit = 100, const std::vector<std::string>& text_rows = {}) {
  return MakeRows(task, limit, 2, answers.size(), text_rows, [&](size_t c, const Item& item) -> const json* {
    const size_t i = &item - task.items.data();
    return i < answers[c].size() ? &answers[c][i] : nullptr;
  });
}

TEST(Rows, SharesArePairedItemByItem) {
  const auto rows =
      Rows(Questions(), {{Said("7"), Said("7"), Said("1"), Said("7")}, {Said("7"), Said("2"), Said("7"), Said("2")}});
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_THAT(*rows, SizeIs(1));
  const Row& row = (*rows)[0];
  EXPECT_EQ(row.items, 4);
  EXPECT_EQ(row.cells[0].value, 75);
  EXPECT_FALSE(row.cells[0].difference);
  const Cell& other = row.cells[1];
  EXPECT_EQ(other.value, 50);
  EXPECT_EQ(other.difference, -25);
  EXPECT_NEAR(*other.standard_error, 100 * std::sqrt((2.0 + 1.0 - 4 * 0.0625) / 3 / 4), 1e-12);
  EXPECT_EQ(other.wins, 1);
  EXPECT_EQ(other.losses, 2);
  EXPECT_DOUBLE_EQ(*other.p_value, 1);
}

TEST(Rows, WhatOneSkippedNobodyCounts) {
  const auto rows = Rows(Questions(), {{Said("7"), json{{"skipped", "too long"}}, Said("1", 1), Said("7")},
                                       {Said("7"), Said("2"), Said("7"), Said("2")}});
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)[0].items, 3);
  EXPECT_EQ((*rows)[0].skipped, 1);
  EXPECT_EQ((*rows)[0].fewer_shots, 1);
}

TEST(Rows, ALimitTakesTheFirst) {
  const auto rows = Rows(Questions(), {{Said("7"), Said("1")}}, 2);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)[0].cells[0].value, 50);
}

TEST(Rows, GroupsWeighTheSame) {
  Task task = Questions();
  task.spec.has_group_mean = true;
  task.exemplars.clear();
  for (size_t i = 0; i < 4; ++i) task.items[i].group = i == 0 ? "small" : "large";
  const auto rows = Rows(task, {{Said("7"), Said("1"), Said("1"), Said("1")}});
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_DOUBLE_EQ((*rows)[0].cells[0].value, 50);
}

TEST(Rows, AnswersFromAFileAreNotTrusted) {
  for (const json& bad : {json{{"text", 7}}, json::object(), json{{"logprobs", {1}}}}) {
    const absl::Status status = Rows(Questions(), {{Said("7"), bad, Said("7"), Said("7")}}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr("the answer to 1 has no \"text\"")) << bad;
  }
  EXPECT_THAT(std::string(Rows(Questions(), {{Said("7")}}).status().message()),
              HasSubstr("the answer to 1 is missing"));

  Task choices{.spec = {.name = "arc_easy", .is_per_byte = true, .metric = "accuracy"}};
  choices.items = {{.id = "x", .choices = {{"c", " a"}, {"c", " b"}}}};
  for (const json& bad : {json{{"logprobs", {-1}}}, json{{"logprobs", {-1, "x"}}}, json{{"logprobs", {-1, nullptr}}},
                          json{{"logprobs", {-1, 3}}}, json{{"logprobs", 5}}})
    EXPECT_FALSE(Rows(choices, {{bad}}).ok()) << bad;
  const auto rows = Rows(choices, {{json{{"logprobs", {-1, -2}}}}});
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_THAT(*rows, SizeIs(2));
  EXPECT_EQ((*rows)[0].metric, "accuracy/byte");
  EXPECT_EQ((*rows)[1].metric, "accuracy");
}

TEST(Rows, ATextGivesPerplexityAndDivergence) {
  const Task task = MakeTextTask({1}, {5, 6, 7, 8}, 2, 2).value();
  const auto window = [](int32_t token, double first, double second) {
    return json{
        {"logprobs", {std::log(first), std::log(second)}},
        {"top", {{token, std::log(first), 9, std::log(0.2)}, {token + 1, std::log(second), 9, std::log(0.125)}}}};
  };
  const auto rows =
      Rows(task, {{window(5, 0.5, 0.25), window(7, 0.5, 0.25)}, {window(5, 0.25, 0.25), window(7, 0.5, 0.125)}}, 9,
           {"ppl", "kl"});
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_THAT(*rows, SizeIs(3));
  const Row& perplexity = (*rows)[0];
  EXPECT_EQ(perplexity.task, "ppl");
  EXPECT_NEAR(perplexity.cells[0].value, std::sqrt(8), 1e-12);  // 1 / sqrt(1/2 · 1/4)
  EXPECT_NEAR(perplexity.cells[1].value, 4, 1e-12);             // 16^(1/2) in both windows
  EXPECT_NEAR(*perplexity.cells[1].difference, 4 - std::sqrt(8), 1e-12);
  EXPECT_NEAR(*perplexity.cells[1].standard_error, 0, 1e-12);
  const Row& divergence = (*rows)[1];
  EXPECT_EQ(divergence.cells[0].value, 0);
  const double changed_first = 0.5 * std::log(2) + 0.3 * std::log(0.3 / 0.55);      // token 5, the rest
  const double changed_last = 0.25 * std::log(2) + 0.625 * std::log(0.625 / 0.75);  // token 8, the rest
  EXPECT_NEAR(divergence.cells[1].value, (changed_first + changed_last) / 4, 1e-12);
  EXPECT_EQ((*rows)[2].cells[1].value, 100);
}

TEST(Table, HasAColumnForEachConfiguration) {
  Report report{.model = "m", .configurations = {{.name = "f16"}, {.name = "int8"}}};
  report.rows =
      Rows(Questions(), {{Said("7"), Said("7"), Said("1"), Said("7")}, {Said("7"), Said("2"), Said("2"), Said("2")}})
          .value();
  const std::string table = ToTable(report);
  EXPECT_THAT(table, HasSubstr("task   metric         n    f16   int8    diff      ±      p\n"
                               "gsm8k  exact match %  4  75.00  25.00  -50.00  28.87  0.500\n"));
  const auto csv = ParseCsv(ToCsv(report), "csv");
  ASSERT_TRUE(csv.ok()) << csv.status();
  ASSERT_THAT(*csv, SizeIs(3));
  for (const CsvRow& row : *csv) EXPECT_THAT(row.cells, SizeIs((*csv)[0].cells.size()));
  EXPECT_EQ((*csv)[2].cells[8], "-50");
  const json out = ToJson(report);
  EXPECT_EQ(out["baseline"], "f16");
  EXPECT_EQ(out["rows"][0]["values"][1]["losses"], 2);
  EXPECT_EQ(out["rows"][0]["values"][0]["difference"], nullptr);
}

}  // namespace
}  // namespace rankwise::eval
