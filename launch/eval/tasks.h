#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

// The test sets: from files that are not trusted to questions with known answers. Nothing here knows a model.
namespace rankwise::eval {

// How an item is asked, and so what its answer is.
enum class Rule : uint8_t {
  kChoice,    // log P(target | context) of each choice; the largest is the model's choice
  kGenerate,  // a greedy continuation, from which a short answer is extracted
  kLastWord,  // whether the greedy continuation is the target
  kText,      // log-probabilities of a window of running text
};

// How a short answer is cut out of a continuation, and compared.
enum class Extraction : uint8_t {
  kNumber,        // behind the last "####", else the last number
  kOption,        // "(B)" behind "answer is", else the first such, else the first capital
  kPhrase,        // behind "answer is", to the end of its line, less a full stop
  kFact,          // one line, lower case, to the first of "\n.,", less punctuation and articles; equal to any alias
  kLetter,        // the first single letter that is one of the choices
  kFirstCapital,  // the first capital
};

struct Choice {
  std::string context;  // behind the exemplars; empty: the whole text is scored
  std::string target;   // not empty
};

struct Item {
  std::string id;               // unique in its task; without control characters
  std::string group;            // the subset of bbh, else empty
  std::vector<Choice> choices;  // kChoice: two or more; kLastWord: one
  size_t right_choice = 0;
  std::string question;              // kGenerate
  std::vector<std::string> answers;  // kGenerate: extracted already; any of them is right
  Extraction extraction = Extraction::kNumber;
  char last_letter = 'Z';       // kLetter
  std::vector<int32_t> tokens;  // kText: a window, with its BOS
};

// What precedes the questions of a group: `head`, then as many of `solved` as are asked for and fit.
struct Exemplars {
  std::string group;
  std::string head;
  std::vector<std::string> solved;  // each with what separates it from the next
};

struct TaskSpec {
  std::string name;
  Rule rule = Rule::kChoice;
  bool is_per_byte = false;     // kChoice: the set's convention divides by the bytes of the target
  bool has_group_mean = false;  // the value is the mean over groups of their means
  int default_shots = 0;
  int max_new_tokens = 0;          // kGenerate
  std::vector<std::string> stops;  // kGenerate
  std::string metric;
};

struct Task {
  TaskSpec spec;
  std::string version;  // of the rules here and of the files' bytes: answers of two versions are not comparable
  std::vector<Item> items;
  std::vector<Exemplars> exemplars;  // one for each group, or one, or none
};

// The windows of a text as a task: consecutive, of `window_tokens` of `tokens` each behind `bos`, which may be empty;
// at most `count`, and no part of one. InvalidArgument when there is not even one.
absl::StatusOr<Task> MakeTextTask(const std::vector<int32_t>& bos, const std::vector<int32_t>& tokens,
                                  int window_tokens, int64_t count);

// All tasks, in the order of the report. "ppl" and "kl" are read off the same windows of a text and have no files.
const std::vector<TaskSpec>& TaskSpecs();

// InvalidArgument names an unknown task and lists the known ones.
absl::StatusOr<TaskSpec> FindTask(const std::string& name);

// Reads a task's files from `data_folder`. Items come in the order in which they are taken when there is a limit: a
// hash of `seed` and the id, evenly over groups; so a smaller sample is the beginning of a larger one. Exemplars are
// drawn in the same way. NotFound for a missing file; InvalidArgument names file, line and value.
// Requires: the rule is not kText.
absl::StatusOr<Task> ReadTask(const TaskSpec& spec, const std::string& data_folder, uint64_t seed);

// The exemplars of an item's group; null when there are none.
const Exemplars* FindExemplars(const Task& task, const Item& item);

}  // namespace rankwise::eval
