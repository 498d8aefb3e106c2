#include "coordinator/frontend/grpc_status.h"

#include <string>

#include "coordinator/cluster/retry_delay.h"
#include "proto/rpc_status.pb.h"

namespace rankwise::frontend {

grpc::Status ToGrpc(const absl::Status& status) {
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message(status.message());
  const auto delay = cluster::RetryDelay(status);
  if (!delay) return {code, message};
  google::rpc::RetryInfo info;
  info.mutable_retry_delay()->set_seconds(absl::ToInt64Seconds(*delay));
  info.mutable_retry_delay()->set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(*delay - absl::Floor(*delay, absl::Seconds(1)))));
  google::rpc::Status details;
  details.set_code(static_cast<int>(code));
  details.set_message(message);
  details.add_details()->PackFrom(info);
  return {code, message, details.SerializeAsString()};
}

}  // namespace rankwise::frontend
