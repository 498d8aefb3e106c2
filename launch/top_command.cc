#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/load_table.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Watch a server: groups, ranks, queues, tokens per second and KV in use

Redraws itself until Ctrl-C. A server that is away is waited for. --once prints one look, for scripts.)";
constexpr char kExamples[] = R"(Examples:
  rankwise top --endpoint 127.0.0.1:8600
  rankwise top --endpoint-file ./endpoint --interval 5
  rankwise top --endpoint 127.0.0.1:8600 --once)";

struct TopFlags {
  EndpointFlags endpoint;
  double interval_seconds = 1;
  bool is_once = false;
};

struct Look {
  absl::Time when;
  rankwise::v1::GetModelInfoResponse model;
  bool has_model = false;
  rankwise::v1::GetLoadResponse load;
};

absl::StatusOr<Look> TakeLook(rankwise::v1::Inference::Stub& stub) {
  Look look;
  const auto deadline = absl::ToChronoTime(absl::Now() + absl::Seconds(5));
  grpc::ClientContext load_context, model_context;
  load_context.set_deadline(deadline);
  model_context.set_deadline(deadline);
  RW_RETURN_IF_ERROR(FromGrpc(stub.GetLoad(&load_context, {}, &look.load)));
  look.when = absl::Now();
  look.has_model = stub.GetModelInfo(&model_context, {}, &look.model).ok();
  return look;
}

std::string Page(const std::string& endpoint, const Look& before, const Look& now) {
  return absl::StrCat("rankwise at ", endpoint, ", ", absl::FormatTime("%H:%M:%S", now.when, absl::LocalTimeZone()),
                      "\n", now.has_model ? ModelLines(now.model) : "", RequestsLine(now.load), "\n",
                      RateTable(now.load, RatesBetween(before.load, now.load, now.when - before.when)), "\n",
                      RankTable(now.load), SaturationLines(now.load));
}

// From the upper left corner, each line cut to the terminal's width and cleared to its end, so that nothing flickers.
void Draw(const std::string& page) {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) size = {.ws_row = 24, .ws_col = 80};
  std::string frame = "\033[H";
  int rows = 0;
  for (const absl::string_view line : absl::StrSplit(absl::StripSuffix(page, "\n"), '\n')) {
    if (++rows == size.ws_row) break;
    absl::StrAppend(&frame, line.substr(0, size.ws_col), "\033[K\n");
  }
  frame += "\033[J";
  std::fwrite(frame.data(), 1, frame.size(), stdout);
  std::fflush(stdout);
}

// False: interrupted.
bool Sleep(absl::Duration duration, const Interrupt& interrupt) {
  pollfd event{.fd = interrupt.fd(), .events = POLLIN};
  return poll(&event, 1, static_cast<int>(absl::ToInt64Milliseconds(duration))) == 0;
}

absl::Status Top(const TopFlags& flags) {
  const Interrupt interrupt;
  RW_ASSIGN_OR_RETURN(const std::string endpoint, ResolveEndpoint(flags.endpoint));
  RW_ASSIGN_OR_RETURN(const auto stub, Connect(flags.endpoint));
  const absl::Duration interval = absl::Seconds(flags.interval_seconds);
  RW_ASSIGN_OR_RETURN(Look before, TakeLook(*stub));  // a wrong endpoint is told at once
  if (flags.is_once) {
    if (!Sleep(interval, interrupt)) return absl::CancelledError("interrupted");
    RW_ASSIGN_OR_RETURN(const Look now, TakeLook(*stub));
    absl::PrintF("%s", Page(endpoint, before, now));
    return absl::OkStatus();
  }
  if (isatty(STDOUT_FILENO) == 0) return absl::InvalidArgumentError("stdout is no terminal: use --once");
  absl::PrintF("\033[2J");
  while (Sleep(interval, interrupt)) {
    absl::StatusOr<Look> now = TakeLook(*stub);
    if (!now.ok()) {
      Draw(absl::StrCat("rankwise at ", endpoint, ": ", now.status().message(), "\n"));
      continue;
    }
    Draw(Page(endpoint, before, *now));
    before = *std::move(now);
  }
  absl::PrintF("\n");
  return absl::OkStatus();
}

}  // namespace

void AddTop(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("top", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<TopFlags>();
  AddEndpointFlags(*command, flags->endpoint);
  command->add_option("--interval", flags->interval_seconds, "Seconds between two looks")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  command->add_flag("--once", flags->is_once, "One look, as plain text");
  command->callback([flags, &action] { action = [flags] { return Top(*flags); }; });
}

}  // namespace rankwise::launch
