#include <poll.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/cluster_flags.h"
#include "launch/commands.h"
#include "launch/eval/compared.h"
#include "launch/eval/report.h"
#include "launch/eval/runner.h"
#include "launch/eval/store.h"
#include "launch/eval/tasks.h"
#include "launch/interrupt.h"
#include "launch/local_cluster.h"
#include "launch/progress_bar.h"
#include "proto/numerics.h"

namespace rankwise::launch {
namespace {

using eval::Task;
using nlohmann::json;
using rankwise::v1::GetModelInfoResponse;

constexpr char kDescription[] = R"(What a KV format costs in accuracy: the same questions under several configurations

Asks test sets of --data DIR and prints each task's value for each configuration, with the paired difference from the first
one, its standard error and p-value. Greedy and deterministic: what --work-dir holds already is not asked again.

With MODEL, starts a cluster for each of --compare [NAME=]FORMAT[:SCALES_DIR],…  (FORMAT as in `serve --kv`).
Without, asks servers that run: --compare NAME=HOST:PORT,…, or the one of --endpoint.

Tasks, by the log-probability of the choices: winogrande, openbookqa_fact, eprstmt, crows_pairs, hellaswag, arc_easy,
arc_challenge; by a generated answer: nq, gsm8k, bbh, and winogrande_gen, openbookqa_fact_gen, eprstmt_gen,
crows_pairs_gen; lambada (last word); ppl and kl (KL divergence from the first configuration) on a text file.)";

constexpr char kExamples[] = R"(Examples:
  rankwise eval ./Llama-2-7b --tp 4 --data ./accuracy --work-dir ./eval --compare kv=f16,kv=int8 --kv-scales ./scales
  rankwise eval ./model --compare f16,a=int8:./scales-c4,b=int8:./scales-ptb --tasks ppl,kl --text t.txt --work-dir ./eval
  rankwise eval --compare f16=10.0.0.1:8600,int8=10.0.0.2:8600 --data ./accuracy --limit 200 --work-dir ./eval)";

struct EvalFlags {
  ClusterFlags cluster;
  EndpointFlags endpoint;
  std::string compare, kv_scales;
  std::string tasks = "winogrande,nq,gsm8k,bbh,openbookqa_fact,eprstmt,crows_pairs";
  std::string data_folder, text_file, work_folder;
  int64_t limit = 0;
  int shots = -1;
  uint64_t seed = 0;
  int concurrency = 16;
  int context = 0;
  int windows = 64, window_tokens = 255;
  std::string json_file, csv_file;
};

// A configuration's coordinator: one that runs somewhere, or the one of a cluster that lives as long as this.
class Server {
 public:
  static absl::StatusOr<std::unique_ptr<Server>> Start(const EvalFlags& flags, const eval::Compared& compared,
                                                       const Interrupt& interrupt) {
    auto server = std::make_unique<Server>();
    if (!compared.endpoint.empty()) {
      RW_ASSIGN_OR_RETURN(const wire::Credentials credentials, ResolveCredentials(flags.endpoint, compared.endpoint));
      server->stub_ = ConnectTo(compared.endpoint, credentials);
      return server;
    }
    RW_ASSIGN_OR_RETURN(ClusterOptions options, ToClusterOptions(flags.cluster));
    options.worker_flags.insert(options.worker_flags.end(), {"--kv", compared.kv});
    if (!compared.kv_scales.empty())
      options.worker_flags.insert(options.worker_flags.end(), {"--kv-scales", compared.kv_scales});
    RW_ASSIGN_OR_RETURN(server->cluster_, LocalCluster::Start(options));
    RW_RETURN_IF_ERROR(server->cluster_->WaitServing(1, absl::Now() + options.start_timeout, interrupt.fd()));
    return server;
  }

  rankwise::v1::Inference::Stub& stub() { return cluster_ != nullptr ? cluster_->stub() : *stub_; }

  // Restarts what dies, until `deadline` or `wake_fd` becomes readable.
  absl::Status Wait(absl::Time deadline, int wake_fd) {
    if (cluster_ != nullptr) return cluster_->Supervise(deadline, wake_fd);
    pollfd event{.fd = wake_fd, .events = POLLIN};
    // Not below zero, which would be for ever.
    poll(&event, 1, static_cast<int>(std::max<int64_t>(absl::ToInt64Milliseconds(deadline - absl::Now()), 0)));
    return absl::OkStatus();
  }

  absl::Status End(const Interrupt& interrupt) {
    return cluster_ != nullptr ? cluster_->Drain(interrupt.fd()) : absl::OkStatus();
  }

 private:
  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
};

// A task and what was asked for of it.
struct Planned {
  Task task;
  size_t limit;
  int shots;
};

class Evaluation {
 public:
  Evaluation(const EvalFlags& flags, std::vector<eval::Compared> compared)
      : flags_(flags), compared_(std::move(compared)) {}

  absl::Status Read();
  absl::Status Run(const Interrupt& interrupt);
  absl::StatusOr<eval::Report> MakeReport() const;

 private:
  size_t Limit() const {
    return flags_.limit > 0 ? static_cast<size_t>(flags_.limit) : std::numeric_limits<size_t>::max();
  }
  absl::Status RunOne(size_t index, const Interrupt& interrupt);
  absl::Status CheckModel(const eval::Compared& compared, const GetModelInfoResponse& model);
  absl::Status ReadText(eval::Asker& asker);
  json Header(const Planned& planned, const GetModelInfoResponse& model, const eval::Asker& asker) const;

  const EvalFlags& flags_;
  const std::vector<eval::Compared> compared_;
  std::vector<Planned> planned_;
  std::vector<std::string> text_rows_;  // which of ppl and kl
  int64_t context_tokens_ = 0;
  std::vector<GetModelInfoResponse> models_;                             // of each configuration
  std::vector<std::vector<std::unique_ptr<eval::AnswerStore>>> stores_;  // of each configuration and planned task
};

absl::Status Evaluation::Read() {
  std::set<std::string> names;
  for (const absl::string_view part : absl::StrSplit(flags_.tasks, ',')) {
    const std::string name(part);
    RW_ASSIGN_OR_RETURN(const eval::TaskSpec spec, eval::FindTask(name));
    if (!names.insert(name).second) return absl::InvalidArgumentError(absl::StrCat("--tasks: ", name, " comes twice"));
    if (spec.rule == eval::Rule::kText) {
      if (flags_.text_file.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " needs --text FILE"));
      if (name == "kl" && compared_.size() < 2)
        return absl::InvalidArgumentError("kl compares: give --compare two configurations");
      text_rows_.push_back(name);
      continue;
    }
    if (flags_.data_folder.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " needs --data DIR"));
    RW_ASSIGN_OR_RETURN(Task task, eval::ReadTask(spec, flags_.data_folder, flags_.seed));
    const bool has_pool = std::ranges::any_of(task.exemplars, [](const auto& e) { return !e.solved.empty(); });
    const int shots = flags_.shots >= 0 && has_pool ? flags_.shots : spec.default_shots;
    for (const eval::Exemplars& exemplars : task.exemplars) {
      if (shots > std::ssize(exemplars.solved)) {
        return absl::InvalidArgumentError(
            absl::StrCat("--shots ", shots, ": ", name, " has ", exemplars.solved.size(), " exemplars"));
      }
    }
    planned_.push_back({.task = std::move(task), .limit = Limit(), .shots = shots});
  }
  return absl::OkStatus();
}

// Differences must come from the configuration alone.
absl::Status Evaluation::CheckModel(const eval::Compared& compared, const GetModelInfoResponse& model) {
  if (models_.empty()) context_tokens_ = flags_.context > 0 ? flags_.context : model.max_tokens();
  if (model.max_tokens() < context_tokens_) {
    return absl::FailedPreconditionError(absl::StrCat(compared.name, " takes requests of ", model.max_tokens(),
                                                      " tokens, not ", context_tokens_, ": give --context ",
                                                      model.max_tokens()));
  }
  if (!models_.empty() && model.fingerprint() != models_[0].fingerprint()) {
    return absl::FailedPreconditionError(absl::StrCat(compared.name, " serves model ", model.fingerprint(), ", ",
                                                      compared_[0].name, " serves ", models_[0].fingerprint(),
                                                      ": a comparison is of one model"));
  }
  return absl::OkStatus();
}

// The tokens of a text: as many as the windows take, in pieces that a request may hold.
absl::Status Evaluation::ReadText(eval::Asker& asker) {
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(flags_.text_file));
  RW_ASSIGN_OR_RETURN(std::vector<int32_t> bos, asker.Tokenize("a", true));
  RW_ASSIGN_OR_RETURN(const std::vector<int32_t> plain, asker.Tokenize("a", false));
  if (!std::ranges::equal(plain, std::span(bos).last(std::min(plain.size(), bos.size()))))
    return absl::UnimplementedError("the tokenizer puts something behind every text");
  bos.resize(bos.size() - plain.size());
  if (std::ssize(bos) + flags_.window_tokens + 1 > context_tokens_) {
    return absl::InvalidArgumentError(absl::StrCat("--window-tokens ", flags_.window_tokens, " and ", bos.size() + 1,
                                                   " exceed the context of ", context_tokens_));
  }
  const auto count = static_cast<int64_t>(std::min<size_t>(flags_.windows, Limit()));
  constexpr size_t kPieceBytes = 512 << 10;
  std::vector<int32_t> tokens;
  // The same pieces whatever --windows says, so that a window is the same tokens.
  for (size_t begin = 0; begin < text.size() && std::ssize(tokens) < count * flags_.window_tokens;) {
    size_t end = std::min(begin + kPieceBytes, text.size());
    if (end < text.size()) {
      if (const size_t line = text.rfind('\n', end); line != std::string::npos && line > begin) end = line + 1;
      while (end > begin && (text[end] & 0xC0) == 0x80) --end;
    }
    RW_ASSIGN_OR_RETURN(const std::vector<int32_t> piece, asker.Tokenize(text.substr(begin, end - begin), false));
    tokens.insert(tokens.end(), piece.begin(), piece.end());
    begin = end;
  }
  RW_ASSIGN_OR_RETURN(Task task, eval::MakeTextTask(bos, tokens, flags_.window_tokens, count));
  task.version = absl::StrCat(task.version, ":", Digest(text));
  planned_.push_back({.task = std::move(task), .limit = std::numeric_limits<size_t>::max(), .shots = 0});
  return absl::OkStatus();
}

// All that an answer depends on.
json Evaluation::Header(const Planned& planned, const GetModelInfoResponse& model, const eval::Asker& asker) const {
  json header = {{"rankwise_eval", 1},
                 {"task", planned.task.spec.name},
                 {"task_version", planned.task.version},
                 {"context_tokens", context_tokens_},
                 {"shots", planned.shots},
                 {"seed", flags_.seed},
                 {"max_new_tokens", asker.NewTokens(planned.task.spec)}};
  for (const auto& [name, value] : wire::Numerics(model)) header[name] = value;
  return header;
}

absl::Status Evaluation::RunOne(size_t index, const Interrupt& interrupt) {
  const eval::Compared& compared = compared_[index];
  RW_ASSIGN_OR_RETURN(const auto server, Server::Start(flags_, compared, interrupt));
  RW_ASSIGN_OR_RETURN(const GetModelInfoResponse model, eval::Asker(server->stub(), 0).GetModelInfo());
  RW_RETURN_IF_ERROR(CheckModel(compared, model));
  eval::Asker asker(server->stub(), context_tokens_);
  if (index == 0 && !text_rows_.empty()) RW_RETURN_IF_ERROR(ReadText(asker));
  models_.push_back(model);

  std::vector<std::unique_ptr<eval::AnswerStore>>& stores = stores_.emplace_back();
  std::vector<eval::Job> jobs;
  int64_t total = 0;
  for (const Planned& planned : planned_) {
    const std::string path =
        absl::StrCat(flags_.work_folder, "/", compared.name, "/", planned.task.spec.name, ".jsonl");
    RW_ASSIGN_OR_RETURN(stores.emplace_back(), eval::AnswerStore::Open(path, Header(planned, model, asker)));
    const size_t count = std::min(planned.limit, planned.task.items.size());
    total += static_cast<int64_t>(count);
    for (size_t i = 0; i < count; ++i) {
      const eval::Item& item = planned.task.items[i];
      if (stores.back()->Find(item.id) == nullptr)
        jobs.push_back({.task = &planned.task, .item = &item, .shots = planned.shots, .store = stores.back().get()});
    }
  }
  const int64_t found = total - std::ssize(jobs);
  if (found > 0)
    absl::FPrintF(stderr, "rankwise: %s: %d of %d answers are in %s\n", compared.name, found, total,
                  flags_.work_folder);

  ProgressBar bar(compared.name, total);
  {
    eval::Runner runner(asker, jobs, flags_.concurrency);
    while (runner.done() < jobs.size()) {
      absl::Status status = server->Wait(absl::Now() + absl::Milliseconds(500), runner.progress_fd());
      runner.Acknowledge();
      status.Update(runner.status());
      if (interrupt.has_come()) status.Update(absl::CancelledError("interrupted; run it again to go on"));
      RW_RETURN_IF_ERROR(status);
      bar.Update(found + static_cast<int64_t>(runner.done()));
    }
  }
  for (const auto& store : stores) RW_RETURN_IF_ERROR(store->Sync());
  return server->End(interrupt);
}

absl::Status Evaluation::Run(const Interrupt& interrupt) {
  for (size_t i = 0; i < compared_.size(); ++i) {
    if (const absl::Status status = RunOne(i, interrupt); !status.ok())
      return absl::Status(status.code(), absl::StrCat(compared_[i].name, ": ", status.message()));
  }
  return absl::OkStatus();
}

absl::StatusOr<eval::Report> Evaluation::MakeReport() const {
  eval::Report report{.model = models_[0].model_name(), .fingerprint = models_[0].fingerprint(), .seed = flags_.seed};
  for (size_t i = 0; i < compared_.size(); ++i) {
    report.configurations.push_back({.name = compared_[i].name,
                                     .kv_format = models_[i].kv_format(),
                                     .kv_scales = models_[i].kv_scales_id(),
                                     .activations = models_[i].activations(),
                                     .backend = models_[i].backend(),
                                     .tp = models_[i].tp()});
  }
  for (size_t t = 0; t < planned_.size(); ++t) {
    const Planned& planned = planned_[t];
    RW_ASSIGN_OR_RETURN(std::vector<eval::Row> rows,
                        eval::MakeRows(planned.task, planned.limit, planned.shots, compared_.size(), text_rows_,
                                       [&](size_t c, const eval::Item& item) { return stores_[c][t]->Find(item.id); }));
    std::ranges::move(rows, std::back_inserter(report.rows));
  }
  return report;
}

absl::StatusOr<std::vector<eval::Compared>> Configurations(const EvalFlags& flags) {
  const bool has_model = !flags.cluster.model.empty();
  const bool has_endpoint = !flags.endpoint.endpoint.empty() || !flags.endpoint.endpoint_file.empty();
  if (has_endpoint && (has_model || !flags.compare.empty()))
    return absl::InvalidArgumentError("--endpoint is for one server: leave out MODEL and --compare");
  if (!has_model && flags.compare.empty()) {
    RW_ASSIGN_OR_RETURN(const std::string endpoint, ResolveEndpoint(flags.endpoint));
    return std::vector<eval::Compared>{{.name = "server", .endpoint = endpoint}};
  }
  return eval::ParseCompared(flags.compare.empty() ? "f16" : flags.compare, has_model, flags.kv_scales);
}

absl::Status Eval(const EvalFlags& flags) {
  const Interrupt interrupt;
  StartLog("rankwise", flags.cluster.log_level);
  RW_ASSIGN_OR_RETURN(std::vector<eval::Compared> compared, Configurations(flags));
  Evaluation evaluation(flags, std::move(compared));
  RW_RETURN_IF_ERROR(evaluation.Read());
  RW_RETURN_IF_ERROR(evaluation.Run(interrupt));
  RW_ASSIGN_OR_RETURN(const eval::Report report, evaluation.MakeReport());
  absl::PrintF("%s", eval::ToTable(report));
  if (!flags.json_file.empty())
    RW_RETURN_IF_ERROR(WriteFileAtomically(flags.json_file, absl::StrCat(eval::ToJson(report).dump(2), "\n")));
  if (!flags.csv_file.empty()) RW_RETURN_IF_ERROR(WriteFileAtomically(flags.csv_file, eval::ToCsv(report)));
  return absl::OkStatus();
}

}  // namespace

void AddEval(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("eval", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<EvalFlags>();
  AddClusterFlags(*command, flags->cluster);
  command->get_option("MODEL")->required(false);
  AddEndpointFlags(*command, flags->endpoint);
  command->add_option("--compare", flags->compare,
                      "Configurations, the first is the baseline: [NAME=]FORMAT[:SCALES_DIR],… with MODEL, else "
                      "NAME=HOST:PORT,…");
  command->add_option("--kv-scales", flags->kv_scales, "Scales of the int8 configurations that name no folder")
      ->check(CLI::ExistingDirectory);
  command->add_option("--tasks", flags->tasks, "Comma-separated")->capture_default_str();
  command->add_option("--data", flags->data_folder, "Folder with the test sets")->check(CLI::ExistingDirectory);
  command->add_option("--text", flags->text_file, "UTF-8 text of ppl and kl")->check(CLI::ExistingFile);
  command->add_option("--work-dir", flags->work_folder, "Where answers are kept: a run goes on where it was killed")
      ->required();
  command->add_option("--limit", flags->limit, "Items of each task, drawn by --seed; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  command
      ->add_option("--shots", flags->shots, "Exemplars of the tasks that have some; default gsm8k 4, bbh 3, others 0")
      ->check(CLI::Range(0, 64));
  command->add_option("--seed", flags->seed, "Of the choice and order of items and exemplars")->capture_default_str();
  command->add_option("--concurrency", flags->concurrency, "Requests in flight")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--context", flags->context, "Tokens of prompt and answer; default: the first server's limit")
      ->check(CLI::Range(16, 1 << 24));
  command->add_option("--windows", flags->windows, "Windows of ppl and kl at most")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--window-tokens", flags->window_tokens, "Tokens of one window behind its BOS")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--json", flags->json_file, "Write the report there");
  command->add_option("--csv", flags->csv_file, "Write one line for each row and configuration there");
  command->callback([flags, &action] { action = [flags] { return Eval(*flags); }; });
}

}  // namespace rankwise::launch
