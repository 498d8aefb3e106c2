// Every port on which a running deployment listens, met by callers without credentials and by bytes that make no sense.

#include <arpa/inet.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "proto/health.pb.h"
#include "proto/worker.pb.h"
#include "tests/chaos/deployment_processes.h"
#include "tests/chaos/hostile_bytes.h"
#include "tests/e2e/serving.h"

namespace rankwise::chaos {
namespace {

constexpr int kAttackers = 4;              // of one port
constexpr int kMostOpen = 50;              // connections of one attacker that nobody closes
constexpr double kMostGrowth = 256 << 20;  // bytes of resident memory, of one process

struct Flags {
  double seconds = 60;
  uint64_t seed = 1;
  std::string log_folder;
};

struct Port {
  std::string address;  // IPv4 or IPv6, in numbers
  uint16_t port = 0;
  pid_t pid = 0;
  std::string program;
};

std::string ProgramOf(pid_t pid) {
  const std::string command = ReadProc(pid, "cmdline");
  return std::filesystem::path(command.substr(0, command.find('\0'))).filename();
}

// As /proc/net/tcp and tcp6 write an address: words of 32 bits in the machine's order.
std::string AddressOf(const std::string& hex) {
  std::array<uint32_t, 4> words{};
  const size_t count = hex.size() / 8;
  for (size_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(std::stoul(hex.substr(8 * i, 8), nullptr, 16));
  std::array<char, INET6_ADDRSTRLEN> text{};
  inet_ntop(count == 1 ? AF_INET : AF_INET6, words.data(), text.data(), text.size());
  const std::string address = text.data();
  if (address == "0.0.0.0") return "127.0.0.1";
  return address == "::" ? "::1" : address;
}

// TCP sockets in LISTEN of the marked processes. Guards share the ranks' and are left out.
std::vector<Port> ListeningPorts() {
  std::map<std::string, Port> by_inode;
  for (const char* table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    std::ifstream file(table);
    std::string line;
    std::getline(file, line);
    while (std::getline(file, line)) {
      const std::vector<std::string> fields = absl::StrSplit(line, ' ', absl::SkipEmpty());
      if (fields.size() < 10 || fields[3] != "0A") continue;
      const std::vector<std::string> local = absl::StrSplit(fields[1], ':');
      by_inode[fields[9]] = {.address = AddressOf(local[0]),
                             .port = static_cast<uint16_t>(std::stoul(local[1], nullptr, 16))};
    }
  }
  std::vector<Port> ports;
  for (const pid_t pid : MarkedProcesses()) {
    if (absl::StartsWith(ReadProc(pid, "comm"), "rankwise-guard")) continue;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(absl::StrCat("/proc/", pid, "/fd"), error)) {
      const std::string target = std::filesystem::read_symlink(entry.path(), error);
      if (!absl::StartsWith(target, "socket:[")) continue;
      const auto found = by_inode.find(target.substr(8, target.size() - 9));
      if (found == by_inode.end()) continue;
      Port port = found->second;
      port.pid = pid;
      port.program = ProgramOf(pid);
      ports.push_back(port);
      by_inode.erase(found);
    }
  }
  return ports;
}

// --- Callers without credentials.

struct Answered {
  grpc::Status status;
  int messages = 0;
};

// One message to any method; up to one message back.
Answered Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method, const std::string& message,
              const std::string& authorization) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(3)));
  if (!authorization.empty()) context.AddMetadata("authorization", authorization);
  grpc::CompletionQueue queue;
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  Answered answered;
  const auto call = stub.PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  const grpc::Slice slice(message);
  if (next()) {
    call->WriteLast(grpc::ByteBuffer(&slice, 1), {}, nullptr);
    if (next()) {
      grpc::ByteBuffer answer;
      call->Read(&answer, nullptr);
      if (next()) ++answered.messages;
    }
  }
  if (answered.messages > 0) context.TryCancel();  // it has said enough
  call->Finish(&answered.status, nullptr);
  next();
  queue.Shutdown();
  while (next()) continue;
  return answered;
}

struct Method {
  std::string path, message;
};

std::vector<Method> Methods() {
  rankwise::v1::GenerateRequest generate = e2e::Greedy("Once upon a time", 4);
  worker::v1::FromGroup join;
  join.mutable_join()->mutable_model()->set_vocab_size(1000);
  join.mutable_join()->mutable_model()->set_max_tokens(1000);
  join.mutable_join()->set_max_running(8);
  std::vector<Method> methods;
  for (const auto* file :
       {rankwise::v1::GenerateRequest::descriptor()->file(), worker::v1::FromGroup::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        const auto* method = file->service(s)->method(m);
        methods.push_back({absl::StrCat("/", file->service(s)->full_name(), "/", method->name()), ""});
        if (method->name() == "Generate") methods.back().message = generate.SerializeAsString();
        if (method->name() == "Attach") methods.back().message = join.SerializeAsString();
      }
    }
  }
  for (const char* version : {"v1", "v1alpha"}) {
    methods.push_back(
        {absl::StrCat("/grpc.reflection.", version, ".ServerReflection/ServerReflectionInfo"), "\x3a\x01*"});
  }
  methods.push_back({"/grpc.channelz.v1.Channelz/GetTopChannels", ""});
  return methods;
}

// Nothing but health says a word.
int CheckCredentials(const Port& port, const std::string& client_token, const std::string& worker_token,
                     std::vector<std::string>& wrong) {
  const bool is_ipv6 = absl::StrContains(port.address, ":");
  const std::string target =
      is_ipv6 ? absl::StrCat("[", port.address, "]:", port.port) : absl::StrCat(port.address, ":", port.port);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto channel = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  const bool is_grpc = port.program == "rankwise-coordinator";
  int calls = 0;
  for (const Method& method : Methods()) {
    const bool is_workers = absl::StrContains(method.path, ".worker.");
    const std::vector<std::string> wrong_ones = {"",
                                                 "Bearer",
                                                 "Bearer ",
                                                 "Bearer 00000000000000000000000000000000",
                                                 "Basic cm9vdDpyb290",
                                                 absl::StrCat("Bearer ", client_token.substr(1)),
                                                 absl::StrCat("Bearer ", client_token, "0"),
                                                 absl::StrCat("Bearer ", is_workers ? client_token : worker_token)};
    for (const std::string& authorization : wrong_ones) {
      ++calls;
      const Answered answered = Call(channel, method.path, method.message, authorization);
      const grpc::StatusCode code = answered.status.error_code();
      const bool is_refused = code == grpc::UNAUTHENTICATED || code == grpc::UNIMPLEMENTED;
      const bool is_deaf = !is_grpc && (code == grpc::UNAVAILABLE || code == grpc::DEADLINE_EXCEEDED);
      if (answered.messages > 0 || !(is_refused || is_deaf)) {
        wrong.push_back(absl::StrCat(port.program, " port ", port.port, ": ", method.path, " with \"",
                                     authorization.substr(0, 12), "\": ", answered.messages, " messages, ", code, " ",
                                     answered.status.error_message()));
      }
      if (!is_grpc) break;  // it is no gRPC server, with whatever credential
    }
    if (!is_grpc) break;
  }
  if (!is_grpc) return calls;
  const Answered health = Call(channel, "/grpc.health.v1.Health/Check", "", "");
  if (health.messages != 1) wrong.push_back(absl::StrCat("health says nothing: ", health.status.error_message()));
  return calls;
}

// --- Bytes.

struct Attack {
  std::atomic<int64_t> connections = 0, bytes = 0, refused = 0;
  std::atomic<bool> is_over = false;
};

int Dial(const Port& port) {
  const bool is_ipv6 = absl::StrContains(port.address, ":");
  sockaddr_in6 v6{.sin6_family = AF_INET6, .sin6_port = htons(port.port)};
  sockaddr_in v4{.sin_family = AF_INET, .sin_port = htons(port.port)};
  inet_pton(is_ipv6 ? AF_INET6 : AF_INET, port.address.c_str(),
            is_ipv6 ? static_cast<void*>(&v6.sin6_addr) : static_cast<void*>(&v4.sin_addr));
  const int fd = socket(is_ipv6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const timeval limit{.tv_sec = 1, .tv_usec = 0};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  const auto* address = is_ipv6 ? reinterpret_cast<sockaddr*>(&v6) : reinterpret_cast<sockaddr*>(&v4);
  if (connect(fd, address, is_ipv6 ? sizeof v6 : sizeof v4) == 0) return fd;
  close(fd);
  return -1;
}

void Bombard(const Port& port, uint64_t seed, Attack& attack) {
  std::mt19937_64 random(seed);
  std::vector<int> open;
  while (!attack.is_over) {
    const int fd = Dial(port);
    if (fd < 0) {
      ++attack.refused;
      absl::SleepFor(absl::Milliseconds(5));
      continue;
    }
    ++attack.connections;
    const std::string bytes = HostileBytes(random);
    // In one piece, or byte by byte as far as patience goes.
    const size_t step = random() % 4 == 0 ? 1 + random() % 7 : bytes.size();
    size_t sent = 0;
    for (int pieces = 0; sent < bytes.size() && pieces < 50; ++pieces) {
      const ssize_t n = send(fd, bytes.data() + sent, std::min(step, bytes.size() - sent), MSG_NOSIGNAL);
      if (n <= 0) break;
      sent += static_cast<size_t>(n);
    }
    attack.bytes += static_cast<int64_t>(sent);
    pollfd event{fd, POLLIN, 0};
    if (random() % 2 == 0 && poll(&event, 1, 20) == 1) {
      std::array<char, 4096> answer;
      [[maybe_unused]] const ssize_t n = recv(fd, answer.data(), answer.size(), MSG_DONTWAIT);
    }
    if (random() % 10 == 0) {
      open.push_back(fd);
      if (open.size() < kMostOpen) continue;
      close(open.front());
      open.erase(open.begin());
      continue;
    }
    if (const linger abrupt{.l_onoff = 1, .l_linger = 0}; random() % 3 == 0) {
      setsockopt(fd, SOL_SOCKET, SO_LINGER, &abrupt, sizeof abrupt);
    }
    close(fd);
  }
  for (const int fd : open) close(fd);
}

double ResidentBytes(pid_t pid) {
  const std::vector<std::string> fields = absl::StrSplit(ReadProc(pid, "statm"), ' ');
  double pages = 0;
  return fields.size() > 1 && absl::SimpleAtod(fields[1], &pages) ? pages * static_cast<double>(sysconf(_SC_PAGESIZE))
                                                                  : 0;
}

std::string CheckAlive(const std::vector<pid_t>& family) {
  const std::vector<pid_t> now = MarkedProcesses();
  for (const pid_t pid : family) {
    if (std::ranges::find(now, pid) == now.end()) return absl::StrCat("process ", pid, " is gone");
  }
  return "";
}

// One port's share of the attack, and a client that is served meanwhile.
absl::Status Besiege(const Port& port, const Flags& flags, launch::LocalCluster& cluster,
                     const std::vector<pid_t>& family, const e2e::Reply& oracle) {
  std::map<pid_t, double> before;
  for (const pid_t pid : family) before[pid] = ResidentBytes(pid);
  Attack attack;
  std::vector<std::thread> attackers;
  for (uint64_t i = 0; i < kAttackers; ++i) {
    attackers.emplace_back([&, i] { Bombard(port, flags.seed * 1000 + port.port * 10 + i, attack); });
  }
  int served = 0;
  std::string wrong;
  for (const absl::Time end = absl::Now() + absl::Seconds(flags.seconds); absl::Now() < end && wrong.empty();) {
    const e2e::Reply reply = e2e::Generate(cluster.stub(), e2e::Greedy("Once upon a time", 24));
    if (!reply.status.ok() || reply.ids != oracle.ids)
      wrong = absl::StrCat("an honest client got ", reply.status.ToString());
    ++served;
    if (wrong.empty()) wrong = CheckAlive(family);
    if (cluster.Supervise(absl::Now() + absl::Milliseconds(200)).ok() && cluster.failures() > 0)
      wrong = "a program failed";
  }
  attack.is_over = true;
  for (std::thread& attacker : attackers) attacker.join();
  double growth = 0;
  for (const pid_t pid : family) growth = std::max(growth, ResidentBytes(pid) - before[pid]);
  absl::PrintF("%-21s pid %d, %s:%d: %d connections, %.1f MB, %d not taken; %d requests served; memory +%.1f MB%s\n",
               port.program, port.pid, port.address, port.port, attack.connections.load(),
               static_cast<double>(attack.bytes) / 1e6, attack.refused.load(), served, growth / 1e6,
               wrong.empty() ? "" : absl::StrCat("; WRONG: ", wrong));
  std::fflush(stdout);
  if (!wrong.empty()) return absl::InternalError(absl::StrCat(port.program, " port ", port.port, ": ", wrong));
  if (growth > kMostGrowth) return absl::InternalError(absl::StrCat("memory grew by ", growth, " bytes"));
  return absl::OkStatus();
}

absl::Status Main(const Flags& flags) {
  MarkDescendants();
  launch::ClusterOptions options{.model = e2e::DemoModel(), .tp = 2};
  options.log_folder = flags.log_folder.empty() ? absl::StrCat(e2e::ScratchFolder(), "/logs") : flags.log_folder;
  std::filesystem::create_directories(options.log_folder);
  options.start_timeout = e2e::kPatience;
  options.worker_flags = {"--device", "cpu", "--threads", "1", "--kv", "f16"};
  RW_ASSIGN_OR_RETURN(const auto cluster, launch::LocalCluster::Start(options));
  RW_RETURN_IF_ERROR(cluster->WaitServing(1, absl::Now() + e2e::kPatience));
  const e2e::Reply oracle = e2e::Generate(cluster->stub(), e2e::Greedy("Once upon a time", 24));
  RW_RETURN_IF_ERROR(oracle.status);
  const std::vector<pid_t> family = MarkedProcesses();
  const std::vector<Port> ports = ListeningPorts();
  if (std::ranges::none_of(ports, [](const Port& port) { return port.program == "rankwise-coordinator"; })) {
    return absl::InternalError("the coordinator's port is not found");
  }
  const std::filesystem::path worker_token =
      std::filesystem::path(cluster->token_file()).parent_path() / "worker.token";
  RW_ASSIGN_OR_RETURN(const auto worker, wire::ReadCredentials({.token = worker_token}));
  std::vector<std::string> wrong;
  for (const Port& port : ports) {
    const int calls = CheckCredentials(port, cluster->credentials().token, worker.token, wrong);
    absl::PrintF("%-21s pid %d listens on %s:%d; %d calls without the right credential\n", port.program, port.pid,
                 port.address, port.port, calls);
    std::fflush(stdout);
  }
  for (const std::string& what : wrong) std::printf("WRONG  %s\n", what.c_str());
  if (!wrong.empty()) return absl::InternalError("somebody answered");
  for (const Port& port : ports) RW_RETURN_IF_ERROR(Besiege(port, flags, *cluster, family, oracle));
  RW_RETURN_IF_ERROR(e2e::WaitIdle(cluster->stub()));
  RW_RETURN_IF_ERROR(cluster->Drain());
  std::printf("all served, nothing died\n");
  return absl::OkStatus();
}

}  // namespace
}  // namespace rankwise::chaos

int main(int argc, char** argv) {
  CLI::App app("rankwise-hostile-ports: what the ports of a running deployment say to strangers, and to noise");
  rankwise::chaos::Flags flags;
  app.add_option("--seconds", flags.seconds, "Of noise, for each port")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--seed", flags.seed)->capture_default_str();
  app.add_option("--logs", flags.log_folder, "Keep the programs' logs there");
  CLI11_PARSE(app, argc, argv);
  rankwise::StartLog("hostile-ports", "info");
  const absl::Status status = rankwise::chaos::Main(flags);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
