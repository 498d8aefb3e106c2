#include <google/protobuf/util/json_util.h>

#include <memory>
#include <string>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/commands.h"
#include "launch/load_table.h"

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

std::string ToJson(const google::protobuf::Message& message) {
  std::string json;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  RW_CHECK(google::protobuf::util::MessageToJsonString(message, &json, options).ok());
  return json;
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
  absl::PrintF("%s%s\n%s\n%s",
               model_status.ok() ? ModelLines(model) + CacheLine(model, load)
                                 : "model    unknown: " + model_status.error_message() + "\n",
               RequestsLine(load), GroupTable(load), RankTable(load));
  if (const std::string saturated = SaturationLines(load); !saturated.empty()) absl::PrintF("\n%s", saturated);
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
