#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "launch/commands.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] =
    "Rankwise serves large language models from MPI ranks: tensor parallel, with an int8 KV cache, over gRPC.";

constexpr char kFirstSteps[] = R"(First steps:
  rankwise serve ./model --tp 2                                     prints the endpoint when it serves
  rankwise generate --endpoint 127.0.0.1:PORT "Once upon a time"    streams text
  rankwise status --endpoint 127.0.0.1:PORT                         shows groups, ranks and memory

With an int8 KV cache:
  rankwise calibrate ./model --tp 2 --calib-dataset text.txt --work-dir ./work
  rankwise kv-qparams ./work ./scales --num-tp 2
  rankwise serve ./model --tp 2 --kv int8 --kv-scales ./scales

`rankwise COMMAND --help` explains each.)";

int ExitCode(const absl::Status& status) {
  int code = 0;
  if (const auto payload = status.GetPayload(kExitCode); payload && absl::SimpleAtoi(std::string(*payload), &code))
    return code;
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kCancelled:
      return 130;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnimplemented:
      return 2;
    default:
      return 1;
  }
}

int Main(int argc, char** argv) {
  CLI::App app(kDescription, "rankwise");
  app.footer(kFirstSteps);
  app.require_subcommand(1);
  Action action;
  for (const auto add : {AddServe, AddGenerate, AddStatus, AddConvert, AddQuantize, AddCalibrate, AddKvQparams, AddPlan,
                         AddBench, AddBatch, AddEval, AddTop, AddPreflight})
    add(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const absl::Status status = action();
  if (!status.ok())
    std::fprintf(stderr, "rankwise: %s: %s\n", absl::StatusCodeToString(status.code()).c_str(),
                 std::string(status.message()).c_str());
  return ExitCode(status);
}

}  // namespace
}  // namespace rankwise::launch

int main(int argc, char** argv) { return rankwise::launch::Main(argc, argv); }
