#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "launch/commands.h"

namespace rankwise::launch {
namespace {

constexpr char kExamples[] = R"(Examples:
  rankwise bench engine --help      decode and prefill of a model
  rankwise bench kernels --help     each kernel on its own, on the CPU or, with --device cuda, on a GPU
  rankwise bench memory --help      the plan of `rankwise plan` against running ranks
  rankwise bench serve --help       latencies and throughput of a running deployment
  rankwise bench engine --model ./TinyLlama-1.1B --tp 2 --save before.json
  rankwise bench engine --model ./TinyLlama-1.1B --tp 2 --compare before.json --tolerance 5 --fail-on-regression)";

// 1 when the words do not hold it; a malformed value is left to rankwise-bench to refuse.
int TensorParallelDegree(const std::vector<std::string>& words) {
  int tp = 1;
  for (size_t i = 0; i < words.size(); ++i) {
    absl::string_view value = words[i];
    if (absl::ConsumePrefix(&value, "--tp=") || (words[i] == "--tp" && i + 1 < words.size())) {
      if (words[i] == "--tp") value = words[i + 1];
      if (!absl::SimpleAtoi(value, &tp)) tp = 1;
    }
  }
  return tp;
}

absl::Status Exec(std::vector<std::string> words) {
  std::vector<std::string> command;
  std::string program = "rankwise-bench";
  if (!words.empty() && words[0] == "kernels") {
    program = "rankwise-kernel-bench";
    words.erase(words.begin());
  }
  if (const int tp = TensorParallelDegree(words); tp > 1) {
    command = {"mpirun", "-n", absl::StrCat(tp), "--oversubscribe", "--bind-to", "none"};
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
  }
  command.push_back(absl::StrCat(ProgramFolder(), "/", program));
  command.insert(command.end(), words.begin(), words.end());
  std::vector<char*> pointers;
  for (std::string& word : command) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  execvp(pointers[0], pointers.data());
  return absl::ErrnoToStatus(errno, absl::StrCat("start ", command[0]));
}

}  // namespace

void AddBench(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("bench",
                         "Measure against this machine's ceilings; runs rankwise-bench or rankwise-kernel-bench")
          ->footer(kExamples);
  command->prefix_command();
  command->set_help_flag();  // it belongs to rankwise-bench
  AddBenchMemory(*command, action);
  AddBenchServe(*command, action);
  command->callback([command, &action] {
    if (!command->get_subcommands().empty()) return;
    action = [words = command->remaining()] { return Exec(words); };
  });
}

}  // namespace rankwise::launch
