#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/commands.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = "Show the model, the groups, their ranks and what they do";
constexpr char kExamples[] = R"(Examples:
  rankwise status --endpoint 127.0.0.1:8600
  rankwise status --endpoint-file /tmp/me/endpoint --json | jq .load.groups[0].blocks_free)";

struct StatusFlags {
  EndpointFlags endpoint;
  bool is_json = false;
};

std::string Mebibytes(uint64_t bytes) { return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20)); }

std::string ToJson(const google::protobuf::Message& message) {
  std::string json;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  RW_CHECK(google::protobuf::util::MessageToJsonString(message, &json, options).ok());
  return json;
}

void PrintModel(const rankwise::v1::GetModelInfoResponse& m) {
  absl::PrintF("model    %s (%s, fingerprint %s)\n", m.model_name(), m.family(), m.fingerprint());
  absl::PrintF("shape    %d layers, %d heads, %d KV heads of %d, hidden %d, intermediate %d, vocabulary %d\n",
               m.n_layers(), m.n_heads(), m.n_kv_heads(), m.head_dim(), m.hidden_size(), m.intermediate_size(),
               m.vocab_size());
  absl::PrintF("serving  tp %d, kv %s%s, up to %d tokens a request, %s\n", m.tp(), m.kv_format(),
               m.kv_scales_id().empty() ? "" : " (scales " + m.kv_scales_id() + ")", m.max_tokens(), m.backend());
}

void PrintLoad(const rankwise::v1::GetLoadResponse& load) {
  absl::PrintF("requests %d live of %d, %d queued%s\n", load.live(), load.max_live(), load.queued(),
               load.draining() ? ", draining" : "");
  absl::PrintF("\n%5s %5s %-11s %7s %7s %13s %9s %9s %10s %10s %8s\n", "group", "epoch", "state", "running", "waiting",
               "blocks free", "steps", "step ms", "prompt", "generated", "cached");
  for (const auto& g : load.groups())
    absl::PrintF("%5d %5d %-11s %7d %7d %13s %9d %9.2f %10d %10d %8d\n", g.group(), g.epoch(),
                 g.serving() ? "serving" : "not serving", g.running(), g.waiting(),
                 absl::StrFormat("%d/%d", g.blocks_free(), g.blocks_total()), g.steps(), g.step_seconds() * 1e3,
                 g.prompt_tokens(), g.generated_tokens(), g.cached_tokens());
  absl::PrintF("\n%5s %5s %-24s %8s %12s %12s\n", "group", "rank", "host", "pid", "weights", "kv");
  for (const auto& g : load.groups())
    for (const auto& r : g.ranks())
      absl::PrintF("%5d %5d %-24s %8d %12s %12s\n", g.group(), r.rank(), r.host(), r.pid(), Mebibytes(r.weight_bytes()),
                   Mebibytes(r.kv_bytes()));
}

// Values that the cache could not hold: nothing to see when calibration was wide enough.
void PrintSaturated(const rankwise::v1::GetLoadResponse& load) {
  for (const auto& g : load.groups()) {
    for (const auto& r : g.ranks()) {
      if (r.saturated_values() == 0) continue;
      std::vector<std::string> layers;
      for (int layer = 0; layer < r.saturated_by_layer_size(); ++layer) {
        if (const uint64_t count = r.saturated_by_layer(layer); count > 0)
          layers.push_back(absl::StrCat(count, " in layer ", layer));
      }
      absl::PrintF(
          "\ngroup %d, rank %d: %d K and V values were out of the cache format's range and stored at its end: %s\n",
          g.group(), r.rank(), r.saturated_values(), absl::StrJoin(layers, ", "));
    }
  }
}

// What the cache holds, and what it would take as f16.
void PrintCache(const rankwise::v1::GetModelInfoResponse& m, const rankwise::v1::GetLoadResponse& load) {
  uint64_t bytes = 0, tokens = 0;
  for (const auto& g : load.groups()) {
    tokens += uint64_t{g.blocks_total()} * g.block_tokens();
    for (const auto& r : g.ranks()) bytes += r.kv_bytes();
  }
  if (tokens == 0 || m.n_kv_heads() == 0) return;
  const uint64_t copies = std::max(1u, m.tp() / m.n_kv_heads());  // KV heads are replicated beyond one rank each
  const uint64_t f16_bytes = tokens * copies * m.n_layers() * m.n_kv_heads() * m.head_dim() * 2 /* K and V */ * 2;
  absl::PrintF("cache    %d tokens, %d bytes each over all ranks; as f16 it would be %d: %s instead of %s\n", tokens,
               bytes / tokens, f16_bytes / tokens, Mebibytes(bytes), Mebibytes(f16_bytes));
}

absl::Status Status(const StatusFlags& flags) {
  RW_ASSIGN_OR_RETURN(const auto stub, Connect(flags.endpoint));
  const auto deadline = absl::ToChronoTime(absl::Now() + absl::Seconds(10));
  grpc::ClientContext load_context, model_context;
  load_context.set_deadline(deadline);
  model_context.set_deadline(deadline);
  rankwise::v1::GetLoadResponse load;
  RW_RETURN_IF_ERROR(FromGrpc(stub->GetLoad(&load_context, {}, &load)));
  rankwise::v1::GetModelInfoResponse model;
  // Before the first group has joined nobody knows the whole model; the load is worth showing nevertheless.
  const grpc::Status model_status = stub->GetModelInfo(&model_context, {}, &model);
  if (flags.is_json) {
    absl::PrintF("{\"model\":%s,\"load\":%s}\n", model_status.ok() ? ToJson(model) : "null", ToJson(load));
    return absl::OkStatus();
  }
  if (model_status.ok()) {
    PrintModel(model);
    PrintCache(model, load);
  } else {
    absl::PrintF("model    unknown: %s\n", model_status.error_message());
  }
  PrintLoad(load);
  PrintSaturated(load);
  return absl::OkStatus();
}

}  // namespace

void AddStatus(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("status", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<StatusFlags>();
  AddEndpointFlags(*command, flags->endpoint);
  command->add_flag("--json", flags->is_json, "One JSON object");
  command->callback([flags, &action] { action = [flags] { return Status(*flags); }; });
}

}  // namespace rankwise::launch
