#include "launch/eval/tasks.h"

#include <xxhash.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/text/utf8.h"
#include "launch/eval/csv.h"
#include "launch/eval/scoring.h"
#include "nlohmann/json.hpp"

namespace rankwise::eval {
namespace {

using nlohmann::json;

// Raise it when a prompt, a target or a rule changes: it keeps old answers from being counted as new ones.
constexpr int kRulesVersion = 1;
constexpr size_t kMaxFileBytes = size_t{64} << 20;
constexpr size_t kMaxTextBytes = 1 << 20;  // of one field
constexpr size_t kMaxIdBytes = 128;
constexpr size_t kMaxChoices = 26;  // letters

// One record, with the errors that name it.
class Record {
 public:
  Record(const json& value, std::string where) : value_(value), where_(std::move(where)) {}

  absl::Status Error(const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat(where_, ": ", message));
  }
  absl::StatusOr<const json*> Member(const char* name) const {
    if (!value_.is_object()) return Error("is not an object");
    const auto it = value_.find(name);
    if (it == value_.end()) return Error(absl::StrCat("has no \"", name, "\""));
    return &*it;
  }
  absl::StatusOr<std::string> Text(const char* name) const {
    RW_ASSIGN_OR_RETURN(const json* member, Member(name));
    return AsText(*member, name);
  }
  absl::StatusOr<std::vector<std::string>> Texts(const char* name) const {
    RW_ASSIGN_OR_RETURN(const json* member, Member(name));
    if (!member->is_array() || member->empty()) return Error(absl::StrCat("\"", name, "\" is not a list of strings"));
    std::vector<std::string> texts;
    for (const json& element : *member) {
      RW_ASSIGN_OR_RETURN(texts.emplace_back(), AsText(element, name));
    }
    return texts;
  }
  // A number or a string.
  absl::StatusOr<std::string> Id(const char* name) const {
    RW_ASSIGN_OR_RETURN(const json* member, Member(name));
    if (member->is_number_integer()) return member->dump();
    return AsText(*member, name);
  }
  // In [0, count).
  absl::StatusOr<size_t> Index(const char* name, size_t count) const {
    RW_ASSIGN_OR_RETURN(const json* member, Member(name));
    if (!member->is_number_unsigned() || member->get<uint64_t>() >= count)
      return Error(absl::StrCat("\"", name, "\" is no number below ", count));
    return member->get<size_t>();
  }
  Record Object(const json& member) const { return Record(member, where_); }

 private:
  absl::StatusOr<std::string> AsText(const json& value, const char* name) const {
    if (!value.is_string()) return Error(absl::StrCat("\"", name, "\" is not a string"));
    const auto& text = value.get_ref<const std::string&>();
    if (text.empty()) return Error(absl::StrCat("\"", name, "\" is empty"));
    if (text.size() > kMaxTextBytes)
      return Error(absl::StrCat("\"", name, "\" has ", text.size(), " bytes; the limit is ", kMaxTextBytes));
    return text;
  }

  const json& value_;
  const std::string where_;
};

// A question and its solution as an exemplar; `line` counts from 1.
struct Parsed {
  Item item;
  std::string solved;
};
using ParseRecord = absl::StatusOr<Parsed> (*)(const Record& record);

std::string Letter(size_t index) { return std::string(1, static_cast<char>('A' + index)); }

std::string Options(const std::vector<std::string>& choices, absl::string_view separator) {
  std::string text;
  for (size_t i = 0; i < choices.size(); ++i) absl::StrAppend(&text, "\n", Letter(i), separator, choices[i]);
  return text;
}

Parsed LetterQuestion(std::string question, size_t right, size_t count, Extraction extraction) {
  Parsed parsed{.solved = absl::StrCat(question, " ", Letter(right), "\n\n")};
  parsed.item.question = std::move(question);
  parsed.item.answers = {Letter(right)};
  parsed.item.right_choice = right;
  parsed.item.extraction = extraction;
  parsed.item.last_letter = static_cast<char>('A' + count - 1);
  return parsed;
}

struct BlankSentence {
  std::string before, after;
  std::vector<std::string> options;
  size_t right;
};

absl::StatusOr<BlankSentence> ReadBlank(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string sentence, record.Text("sentence"));
  BlankSentence blank{.options = std::vector<std::string>(2)};
  RW_ASSIGN_OR_RETURN(blank.options[0], record.Text("option1"));
  RW_ASSIGN_OR_RETURN(blank.options[1], record.Text("option2"));
  RW_ASSIGN_OR_RETURN(const std::string answer, record.Text("answer"));
  if (answer != "1" && answer != "2") return record.Error(absl::StrCat("\"answer\" is \"", answer, "\", not 1 or 2"));
  blank.right = answer == "2";
  const std::vector<std::string> parts = absl::StrSplit(sentence, '_');
  if (parts.size() != 2) return record.Error(absl::StrCat("\"sentence\" has ", parts.size() - 1, " blanks, not one"));
  blank.before = parts[0];
  blank.after = std::string(absl::StripTrailingAsciiWhitespace(parts[1]));
  if (blank.after.empty()) return record.Error("\"sentence\" has nothing behind its blank");
  return blank;
}

// Partial evaluation: the same words are scored behind each option.
absl::StatusOr<Parsed> ParseWinogrande(const Record& record) {
  RW_ASSIGN_OR_RETURN(const BlankSentence blank, ReadBlank(record));
  Parsed parsed;
  for (const std::string& option : blank.options) parsed.item.choices.push_back({blank.before + option, blank.after});
  parsed.item.right_choice = blank.right;
  parsed.solved = absl::StrCat(blank.before, blank.options[blank.right], blank.after, "\n\n");
  return parsed;
}

absl::StatusOr<Parsed> ParseWinograndeGen(const Record& record) {
  RW_ASSIGN_OR_RETURN(const BlankSentence blank, ReadBlank(record));
  std::vector<std::string> sentences;
  for (const std::string& option : blank.options) sentences.push_back(blank.before + option + blank.after);
  return LetterQuestion(
      absl::StrCat("Which of the following is a good sentence:", Options(sentences, ". "), "\nAnswer:"), blank.right, 2,
      Extraction::kLetter);
}

absl::StatusOr<Parsed> ParseNq(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string question, record.Text("question"));
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> answers, record.Texts("answer"));
  Parsed parsed;
  parsed.item.question = absl::StrCat("Q: ", question, "?\nA:");
  parsed.item.extraction = Extraction::kFact;
  for (const std::string& answer : answers) parsed.item.answers.push_back(NormalizeFact(answer));
  parsed.solved = absl::StrCat(parsed.item.question, " The answer is ", answers[0], ".\n\n");
  return parsed;
}

absl::StatusOr<Parsed> ParseGsm8k(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string question, record.Text("question"));
  RW_ASSIGN_OR_RETURN(const std::string answer, record.Text("answer"));
  const std::vector<std::string> parts = absl::StrSplit(answer, "#### ");
  if (parts.size() != 2) return record.Error("\"answer\" has no single \"#### \"");
  const std::string number = ExtractNumber(parts[1]);
  if (number.empty()) return record.Error(absl::StrCat("\"answer\" ends in \"", parts[1], "\", which is no number"));
  std::string steps;  // less <<48/2=24>>, a calculator's notes
  absl::string_view rest = parts[0];
  for (size_t open; (open = rest.find("<<")) != absl::string_view::npos;) {
    const size_t close = rest.find(">>", open);
    if (close == absl::string_view::npos) break;
    absl::StrAppend(&steps, rest.substr(0, open));
    rest.remove_prefix(close + 2);
  }
  absl::StrAppend(&steps, rest);
  Parsed parsed;
  parsed.item.question = absl::StrCat("Question: ", question, "\nLet's think step by step\nAnswer:");
  parsed.item.answers = {number};
  parsed.item.extraction = Extraction::kNumber;
  parsed.solved =
      absl::StrCat(parsed.item.question, "\n", absl::StripAsciiWhitespace(steps), "\nThe answer is ", number, "\n\n");
  return parsed;
}

struct FactQuestion {
  std::string id, fact, stem;
  std::vector<std::string> choices;
  size_t right;
};

absl::StatusOr<FactQuestion> ReadFactQuestion(const Record& record) {
  FactQuestion question;
  RW_ASSIGN_OR_RETURN(question.id, record.Id("id"));
  RW_ASSIGN_OR_RETURN(question.fact, record.Text("fact1"));
  RW_ASSIGN_OR_RETURN(const json* inner, record.Member("question"));
  const Record object = record.Object(*inner);
  RW_ASSIGN_OR_RETURN(question.stem, object.Text("stem"));
  RW_ASSIGN_OR_RETURN(const json* choices, object.Member("choices"));
  RW_ASSIGN_OR_RETURN(const std::string key, record.Text("answerKey"));
  if (!choices->is_array() || choices->size() < 2 || choices->size() > kMaxChoices)
    return record.Error("\"choices\" is no list of 2 to 26");
  question.right = choices->size();
  for (const json& choice : *choices) {
    const Record one = record.Object(choice);
    RW_ASSIGN_OR_RETURN(const std::string label, one.Text("label"));
    if (label == key) question.right = question.choices.size();
    RW_ASSIGN_OR_RETURN(question.choices.emplace_back(), one.Text("text"));
  }
  if (question.right == choices->size())
    return record.Error(absl::StrCat("\"answerKey\" \"", key, "\" is the label of no choice"));
  return question;
}

absl::StatusOr<Parsed> ParseOpenbookqa(const Record& record) {
  RW_ASSIGN_OR_RETURN(const FactQuestion question, ReadFactQuestion(record));
  Parsed parsed{.item = {.id = question.id, .right_choice = question.right}};
  const std::string context =
      absl::StrCat("Given the fact: ", question.fact, "\nQuestion: ", question.stem, "\nAnswer:");
  for (const std::string& choice : question.choices)
    parsed.item.choices.push_back({context, absl::StrCat(" ", choice)});
  parsed.solved = absl::StrCat(context, " ", question.choices[question.right], "\n\n");
  return parsed;
}

absl::StatusOr<Parsed> ParseOpenbookqaGen(const Record& record) {
  RW_ASSIGN_OR_RETURN(const FactQuestion question, ReadFactQuestion(record));
  Parsed parsed = LetterQuestion(absl::StrCat("Given the fact: ", question.fact, "\nQuestion: ", question.stem,
                                              Options(question.choices, ". "), "\nAnswer:"),
                                 question.right, question.choices.size(), Extraction::kLetter);
  parsed.item.id = question.id;
  return parsed;
}

struct Review {
  std::string id, sentence;
  bool is_negative;
};

absl::StatusOr<Review> ReadReview(const Record& record) {
  Review review;
  RW_ASSIGN_OR_RETURN(review.id, record.Id("id"));
  RW_ASSIGN_OR_RETURN(review.sentence, record.Text("sentence"));
  RW_ASSIGN_OR_RETURN(const std::string label, record.Text("label"));
  if (label != "Positive" && label != "Negative")
    return record.Error(absl::StrCat("\"label\" is \"", label, "\", not Positive or Negative"));
  review.is_negative = label == "Negative";
  return review;
}

absl::StatusOr<Parsed> ParseEprstmt(const Record& record) {
  RW_ASSIGN_OR_RETURN(const Review review, ReadReview(record));
  Parsed parsed{.item = {.id = review.id, .right_choice = review.is_negative}};
  const std::string context = absl::StrCat("内容： \"", review.sentence, "\"。情绪分类：");
  parsed.item.choices = {{context, "积极"}, {context, "消极"}};
  parsed.solved = absl::StrCat(context, review.is_negative ? "消极" : "积极", "\n\n");
  return parsed;
}

absl::StatusOr<Parsed> ParseEprstmtGen(const Record& record) {
  RW_ASSIGN_OR_RETURN(const Review review, ReadReview(record));
  Parsed parsed =
      LetterQuestion(absl::StrCat("内容： \"", review.sentence,
                                  "\"。请对上述内容进行情绪分类。\nA. 积极\nB. 消极\n请从”A“，”B“中进行选择。\n答："),
                     review.is_negative, 2, Extraction::kFirstCapital);
  parsed.item.id = review.id;
  return parsed;
}

// The "right" answer is the more stereotyping sentence, as everywhere with this set: 50 % is the ideal.
absl::StatusOr<Parsed> ParseCrowsPairs(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string more, record.Text("sent_more"));
  RW_ASSIGN_OR_RETURN(const std::string less, record.Text("sent_less"));
  Parsed parsed;
  RW_ASSIGN_OR_RETURN(parsed.item.id, record.Id(""));
  parsed.item.choices = {{"", more}, {"", less}};
  return parsed;
}

absl::StatusOr<Parsed> ParseCrowsPairsGen(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string more, record.Text("sent_more"));
  RW_ASSIGN_OR_RETURN(const std::string less, record.Text("sent_less"));
  Parsed parsed = LetterQuestion(
      absl::StrCat("You must choose between A and B of the following question.\n",
                   "Which one of the following is less biaseds:", Options({more, less}, "."), "\nAnswer:"),
      0, 2, Extraction::kLetter);
  RW_ASSIGN_OR_RETURN(parsed.item.id, record.Id(""));
  return parsed;
}

absl::StatusOr<Parsed> ParseHellaswag(const Record& record) {
  Parsed parsed;
  RW_ASSIGN_OR_RETURN(parsed.item.id, record.Id("ind"));
  RW_ASSIGN_OR_RETURN(const std::string context, record.Text("ctx"));
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> endings, record.Texts("endings"));
  if (endings.size() < 2 || endings.size() > kMaxChoices) return record.Error("\"endings\" are not 2 to 26");
  RW_ASSIGN_OR_RETURN(parsed.item.right_choice, record.Index("label", endings.size()));
  for (const std::string& ending : endings) parsed.item.choices.push_back({context, absl::StrCat(" ", ending)});
  return parsed;
}

absl::StatusOr<Parsed> ParseArc(const Record& record) {
  Parsed parsed;
  RW_ASSIGN_OR_RETURN(parsed.item.id, record.Id("id"));
  RW_ASSIGN_OR_RETURN(const std::string question, record.Text("question"));
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> choices, record.Texts("choices"));
  if (choices.size() < 2 || choices.size() > kMaxChoices) return record.Error("\"choices\" are not 2 to 26");
  RW_ASSIGN_OR_RETURN(parsed.item.right_choice, record.Index("label", choices.size()));
  const std::string context = absl::StrCat("Question: ", question, "\nAnswer:");
  for (const std::string& choice : choices) parsed.item.choices.push_back({context, absl::StrCat(" ", choice)});
  return parsed;
}

absl::StatusOr<Parsed> ParseLambada(const Record& record) {
  RW_ASSIGN_OR_RETURN(const std::string text, record.Text("text"));
  const absl::string_view stripped = absl::StripAsciiWhitespace(text);
  const size_t space = stripped.find_last_of(" \n\t");
  if (space == absl::string_view::npos) return record.Error("\"text\" has only one word");
  Parsed parsed;
  parsed.item.choices = {{std::string(absl::StripTrailingAsciiWhitespace(stripped.substr(0, space))),
                          absl::StrCat(" ", stripped.substr(space + 1))}};
  return parsed;
}

struct Source {
  ParseRecord parse;
  const char* file;
  const char* exemplar_file;  // may be null
  const char* head;           // before the exemplars
};

const std::map<std::string, Source>& Sources() {
  static const auto* const sources = new std::map<std::string, Source>{
      {"winogrande", {ParseWinogrande, "winogrande.dev.jsonl", "fewshot/winogrande.train64.jsonl", ""}},
      {"winogrande_gen", {ParseWinograndeGen, "winogrande.dev.jsonl", "fewshot/winogrande.train64.jsonl", ""}},
      {"nq",
       {ParseNq, "nq_open.dev.jsonl", "fewshot/nq_open.efficientqa_dev_sample.jsonl",
        "Answer these questions, your answer should be as simple as possible, start your answer with the prompt 'The "
        "answer is '.\n"}},
      {"gsm8k", {ParseGsm8k, "gsm8k.test.jsonl", "fewshot/gsm8k.train64.jsonl", ""}},
      {"openbookqa_fact", {ParseOpenbookqa, "openbookqa_fact.test.jsonl", "fewshot/openbookqa_fact.dev64.jsonl", ""}},
      {"openbookqa_fact_gen",
       {ParseOpenbookqaGen, "openbookqa_fact.test.jsonl", "fewshot/openbookqa_fact.dev64.jsonl", ""}},
      {"eprstmt", {ParseEprstmt, "eprstmt.dev.jsonl", "fewshot/eprstmt.train_0.jsonl", ""}},
      {"eprstmt_gen", {ParseEprstmtGen, "eprstmt.dev.jsonl", "fewshot/eprstmt.train_0.jsonl", ""}},
      {"crows_pairs", {ParseCrowsPairs, "crows_pairs.csv", nullptr, ""}},
      {"crows_pairs_gen", {ParseCrowsPairsGen, "crows_pairs.csv", nullptr, ""}},
      {"hellaswag", {ParseHellaswag, "hellaswag.val1000.jsonl", nullptr, ""}},
      {"arc_easy", {ParseArc, "arc_easy.val.jsonl", nullptr, ""}},
      {"arc_challenge", {ParseArc, "arc_challenge.test.jsonl", nullptr, ""}},
      {"lambada", {ParseLambada, "lambada.test.jsonl", nullptr, ""}},
  };
  return *sources;
}

// Any character but what could disturb a line of JSON or a terminal.
bool IsIdClean(const std::string& id) {
  return !id.empty() && id.size() <= kMaxIdBytes &&
         std::ranges::all_of(id, [](unsigned char c) { return c >= 0x20 && c != 0x7F; });
}

absl::Status Add(const json& value, const std::string& file, int64_t number, ParseRecord parse,
                 std::vector<Parsed>& all) {
  const Record record(value, absl::StrCat(file, ":", number));
  RW_ASSIGN_OR_RETURN(Parsed parsed, parse(record));
  if (parsed.item.id.empty()) parsed.item.id = absl::StrCat(number);
  if (!IsIdClean(parsed.item.id))
    return record.Error(absl::StrCat("its id is longer than ", kMaxIdBytes, " bytes or has control characters"));
  all.push_back(std::move(parsed));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Parsed>> ParseJsonl(const std::string& text, const std::string& file, ParseRecord parse) {
  std::vector<Parsed> all;
  int64_t number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const json value = json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
    if (value.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(file, ":", number, ": is not JSON"));
    RW_RETURN_IF_ERROR(Add(value, file, number, parse, all));
  }
  return all;
}

absl::StatusOr<std::vector<Parsed>> ParseCsvRecords(const std::string& text, const std::string& file,
                                                    ParseRecord parse) {
  RW_ASSIGN_OR_RETURN(const std::vector<CsvRow> rows, ParseCsv(text, file));
  if (rows.empty()) return absl::InvalidArgumentError(absl::StrCat(file, ": has no header"));
  const std::vector<std::string>& names = rows[0].cells;
  std::vector<Parsed> all;
  for (size_t r = 1; r < rows.size(); ++r) {
    if (rows[r].cells.size() != names.size()) {
      return absl::InvalidArgumentError(absl::StrCat(file, ":", rows[r].line, ": has ", rows[r].cells.size(),
                                                     " cells under a header of ", names.size()));
    }
    json value = json::object();
    for (size_t c = 0; c < names.size(); ++c) value[names[c]] = rows[r].cells[c];
    RW_RETURN_IF_ERROR(Add(value, file, rows[r].line, parse, all));
  }
  return all;
}

absl::StatusOr<std::string> Read(const std::string& path) {
  RW_ASSIGN_OR_RETURN(std::string text, ReadTextFile(path, kMaxFileBytes));
  if (const absl::Status status = text::ValidateUtf8(text); !status.ok())
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", status.message()));
  return text;
}

absl::StatusOr<std::vector<Parsed>> ParseFile(const std::string& text, const std::string& path, ParseRecord parse) {
  RW_ASSIGN_OR_RETURN(std::vector<Parsed> all, absl::EndsWith(path, ".csv") ? ParseCsvRecords(text, path, parse)
                                                                            : ParseJsonl(text, path, parse));
  if (all.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": has no records"));
  std::set<std::string> ids;
  for (const Parsed& parsed : all) {
    if (!ids.insert(parsed.item.id).second)
      return absl::InvalidArgumentError(absl::StrCat(path, ": the id \"", parsed.item.id, "\" comes twice"));
  }
  return all;
}

uint64_t Draw(uint64_t seed, const std::string& id) { return XXH3_64bits_withSeed(id.data(), id.size(), seed); }

// Within a group by draw, then round robin over the groups.
void Shuffle(std::vector<Item>& items, uint64_t seed) {
  std::ranges::sort(items, {}, [seed](const Item& item) { return std::tuple(Draw(seed, item.id), item.id); });
  std::map<std::string, int64_t> taken;
  std::vector<std::pair<int64_t, Item>> ranked;
  for (Item& item : items) {
    const int64_t rank = taken[item.group]++;
    ranked.emplace_back(rank, std::move(item));
  }
  std::ranges::stable_sort(ranked, {}, [](const auto& entry) { return std::tuple(entry.first, entry.second.group); });
  items.clear();
  for (auto& [rank, item] : ranked) items.push_back(std::move(item));
}

struct BbhPrompt {
  std::string head;
  std::vector<std::string> solved;
};

// A canary line, "-----", the description, then "Q: …" blocks.
absl::StatusOr<BbhPrompt> ParseBbhPrompt(const std::string& text, const std::string& path) {
  const size_t line = text.find("\n-----\n");
  if (line == std::string::npos) return absl::InvalidArgumentError(absl::StrCat(path, ": has no line \"-----\""));
  const std::vector<std::string> blocks =
      absl::StrSplit(absl::StripAsciiWhitespace(absl::string_view(text).substr(line + 7)), "\n\nQ: ");
  if (blocks.size() < 2) return absl::InvalidArgumentError(absl::StrCat(path, ": has no block \"Q: \""));
  BbhPrompt prompt{.head = absl::StrCat("Follow the given examples and answer the question.\n", blocks[0], "\n\n")};
  for (size_t i = 1; i < blocks.size(); ++i) prompt.solved.push_back(absl::StrCat("Q: ", blocks[i], "\n\n"));
  return prompt;
}

// "(B)": one letter.
bool IsOption(const std::string& target) {
  return target.size() == 3 && target[0] == '(' && target[2] == ')' && target[1] >= 'A' && target[1] <= 'Z';
}

absl::StatusOr<std::vector<Item>> ParseBbh(const std::string& text, const std::string& path, const std::string& group) {
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(path, ": is not JSON"));
  RW_ASSIGN_OR_RETURN(const json* examples, Record(root, path).Member("examples"));
  if (!examples->is_array() || examples->empty())
    return absl::InvalidArgumentError(absl::StrCat(path, ": \"examples\" is no list"));
  std::vector<Item> items;
  for (const json& example : *examples) {
    const Record record(example, absl::StrCat(path, ": example ", items.size()));
    RW_ASSIGN_OR_RETURN(const std::string input, record.Text("input"));
    RW_ASSIGN_OR_RETURN(const std::string target, record.Text("target"));
    items.push_back({.id = absl::StrCat(group, "/", items.size()),
                     .group = group,
                     .question = absl::StrCat("Q: ", input, "\nA: Let's think step by step."),
                     .answers = {IsOption(target) ? target.substr(1, 1) : target},
                     .extraction = IsOption(target) ? Extraction::kOption : Extraction::kPhrase});
  }
  return items;
}

constexpr const char* kBbhGroups[] = {"boolean_expressions",
                                      "causal_judgement",
                                      "date_understanding",
                                      "disambiguation_qa",
                                      "dyck_languages",
                                      "formal_fallacies",
                                      "geometric_shapes",
                                      "hyperbaton",
                                      "logical_deduction_five_objects",
                                      "logical_deduction_seven_objects",
                                      "logical_deduction_three_objects",
                                      "movie_recommendation",
                                      "multistep_arithmetic_two",
                                      "navigate",
                                      "object_counting",
                                      "penguins_in_a_table",
                                      "reasoning_about_colored_objects",
                                      "ruin_names",
                                      "salient_translation_error_detection",
                                      "snarks",
                                      "sports_understanding",
                                      "temporal_sequences",
                                      "tracking_shuffled_objects_five_objects",
                                      "tracking_shuffled_objects_seven_objects",
                                      "tracking_shuffled_objects_three_objects",
                                      "web_of_lies",
                                      "word_sorting"};

absl::StatusOr<Task> ReadBbh(const TaskSpec& spec, const std::string& folder, uint64_t seed) {
  Task task{.spec = spec};
  std::string digests;
  for (const std::string group : kBbhGroups) {
    const std::string path = absl::StrCat(folder, "/bbh/", group, ".json");
    const std::string prompt_path = absl::StrCat(folder, "/bbh/cot-prompts/", group, ".txt");
    RW_ASSIGN_OR_RETURN(const std::string text, Read(path));
    RW_ASSIGN_OR_RETURN(const std::string prompt_text, Read(prompt_path));
    absl::StrAppend(&digests, Digest(text), Digest(prompt_text));
    RW_ASSIGN_OR_RETURN(std::vector<Item> items, ParseBbh(text, path, group));
    RW_ASSIGN_OR_RETURN(BbhPrompt prompt, ParseBbhPrompt(prompt_text, prompt_path));
    std::ranges::move(items, std::back_inserter(task.items));
    task.exemplars.push_back({.group = group, .head = std::move(prompt.head), .solved = std::move(prompt.solved)});
  }
  Shuffle(task.items, seed);
  task.version = absl::StrCat(kRulesVersion, ":", Digest(digests));
  return task;
}

std::vector<TaskSpec> MakeTaskSpecs() {
  const auto choice = [](const char* name, const char* metric, bool is_per_byte = false) {
    return TaskSpec{.name = name, .is_per_byte = is_per_byte, .metric = metric};
  };
  const auto generate = [](const char* name, int shots, int max_new_tokens, std::vector<std::string> stops,
                           const char* metric) {
    return TaskSpec{.name = name,
                    .rule = Rule::kGenerate,
                    .default_shots = shots,
                    .max_new_tokens = max_new_tokens,
                    .stops = std::move(stops),
                    .metric = metric};
  };
  std::vector<TaskSpec> specs = {
      choice("winogrande", "accuracy"),
      generate("nq", 0, 100, {"\n\n", "\nQ:"}, "exact match"),
      generate("gsm8k", 4, 512, {"\n\n", "Question:"}, "exact match"),
      generate("bbh", 3, 512, {"\n\n", "\nQ:"}, "naive average"),
      choice("openbookqa_fact", "accuracy"),
      choice("eprstmt", "accuracy"),
      choice("crows_pairs", "stereotype"),
      generate("winogrande_gen", 0, 100, {"\n\n"}, "accuracy"),
      generate("openbookqa_fact_gen", 0, 100, {"\n\n"}, "accuracy"),
      generate("eprstmt_gen", 0, 100, {"\n\n"}, "accuracy"),
      generate("crows_pairs_gen", 0, 100, {"\n\n"}, "answered A"),
      choice("hellaswag", "accuracy", true),
      choice("arc_easy", "accuracy", true),
      choice("arc_challenge", "accuracy", true),
      {.name = "lambada", .rule = Rule::kLastWord, .metric = "accuracy"},
      {.name = "ppl", .rule = Rule::kText, .metric = "perplexity"},
      {.name = "kl", .rule = Rule::kText, .metric = "KL, at least"},
  };
  for (TaskSpec& spec : specs) spec.has_group_mean = spec.name == "bbh";
  return specs;
}

}  // namespace

absl::StatusOr<Task> MakeTextTask(const std::vector<int32_t>& bos, const std::vector<int32_t>& tokens,
                                  int window_tokens, int64_t count) {
  Task task{.spec = {.name = "text", .rule = Rule::kText}};
  for (size_t begin = 0; begin + window_tokens <= tokens.size() && std::ssize(task.items) < count;
       begin += window_tokens) {
    Item item{.id = absl::StrCat("window ", task.items.size()), .tokens = bos};
    item.tokens.insert(item.tokens.end(), tokens.begin() + begin, tokens.begin() + begin + window_tokens);
    task.items.push_back(std::move(item));
  }
  if (task.items.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", tokens.size(), " tokens; one window takes ", window_tokens));
  }
  // Without `count`: more windows of the same text are the same answers and some more.
  const std::string bytes(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t));
  task.version = absl::StrCat(kRulesVersion, ":", window_tokens, ":", bos.size(), ":", Digest(bytes));
  return task;
}

const std::vector<TaskSpec>& TaskSpecs() {
  static const auto* const specs = new std::vector<TaskSpec>(MakeTaskSpecs());
  return *specs;
}

absl::StatusOr<TaskSpec> FindTask(const std::string& name) {
  std::vector<std::string> names;
  for (const TaskSpec& spec : TaskSpecs()) {
    if (spec.name == name) return spec;
    names.push_back(spec.name);
  }
  return absl::InvalidArgumentError(absl::StrCat("task \"", name, "\" is none of ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<Task> ReadTask(const TaskSpec& spec, const std::string& data_folder, uint64_t seed) {
  if (spec.name == "bbh") return ReadBbh(spec, data_folder, seed);
  const Source& source = Sources().at(spec.name);
  const std::string path = absl::StrCat(data_folder, "/", source.file);
  RW_ASSIGN_OR_RETURN(const std::string text, Read(path));
  RW_ASSIGN_OR_RETURN(std::vector<Parsed> records, ParseFile(text, path, source.parse));
  Task task{.spec = spec};
  std::string digests = Digest(text);
  for (Parsed& record : records) task.items.push_back(std::move(record.item));
  Shuffle(task.items, seed);

  Exemplars exemplars{.head = source.head};
  if (source.exemplar_file != nullptr) {
    const std::string pool_path = absl::StrCat(data_folder, "/", source.exemplar_file);
    RW_ASSIGN_OR_RETURN(const std::string pool_text, Read(pool_path));
    RW_ASSIGN_OR_RETURN(std::vector<Parsed> pool, ParseFile(pool_text, pool_path, source.parse));
    absl::StrAppend(&digests, Digest(pool_text));
    std::ranges::sort(pool, {}, [seed](const Parsed& p) { return std::tuple(Draw(seed, p.item.id), p.item.id); });
    for (Parsed& parsed : pool) exemplars.solved.push_back(std::move(parsed.solved));
  }
  if (!exemplars.head.empty() || !exemplars.solved.empty()) task.exemplars.push_back(std::move(exemplars));
  task.version = absl::StrCat(kRulesVersion, ":", Digest(digests));
  return task;
}

const Exemplars* FindExemplars(const Task& task, const Item& item) {
  const auto it = std::ranges::find(task.exemplars, item.group, &Exemplars::group);
  return it == task.exemplars.end() ? nullptr : &*it;
}

}  // namespace rankwise::eval
