#include "launch/preflight.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "coordinator/text/tokenizer.h"
#include "worker/shard/shard_plan.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::launch {
namespace {

constexpr int64_t kProbeBytes = int64_t{1} << 20;          // of the bandwidth
constexpr int64_t kLeastSharedMemory = int64_t{64} << 20;  // Open MPI's segments take 4 MiB a rank

std::string Gibibytes(int64_t bytes) { return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30)); }

// The number in a file that holds one; nullopt for "max" and for no file.
std::optional<int64_t> NumberIn(const std::string& path) {
  std::string text;
  int64_t number = 0;
  if (std::ifstream file(path); !(file >> text) || !absl::SimpleAtoi(text, &number)) return std::nullopt;
  return number;
}

std::optional<int64_t> FromMeminfo() {
  std::ifstream file("/proc/meminfo");
  for (std::string name; file >> name;) {
    int64_t kibibytes = 0;
    file >> kibibytes;
    file.ignore(256, '\n');
    if (name == "MemAvailable:") return kibibytes << 10;
  }
  return std::nullopt;
}

// How much one token waits for the others, when each layer ends in two all-reduces of one row.
std::string CostOfAToken(const CommReport& report, const weights::ModelConfig& config) {
  const int64_t row = int64_t{config.hidden_size} * static_cast<int64_t>(sizeof(float));
  const auto size = report.p50_us.lower_bound(row);
  if (size == report.p50_us.end()) return "";
  return absl::StrFormat("; a decoded token spends about %.2f ms in all-reduces",
                         size->second * 2e-3 * config.n_layers);
}

}  // namespace

std::string ToText(const Finding& finding) {
  constexpr const char* kNames[] = {"good", "hm", "BAD"};
  std::string text = absl::StrFormat("%-4s  %-9s %s\n", kNames[finding.kind], finding.what, finding.detail);
  if (!finding.fix.empty()) absl::StrAppendFormat(&text, "%-16sfix: %s\n", "", finding.fix);
  return text;
}

CommReport ParseCommReport(const std::string& text) {
  CommReport report;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    int size = 0;
    int64_t bytes = 0;
    double microseconds = 0;
    // "shared memory, 2 ranks"
    const size_t count = words.size();
    if (count >= 3 && (words[count - 1] == "ranks" || words[count - 1] == "rank") &&
        absl::EndsWith(words[count - 3], ",") && absl::SimpleAtoi(words[count - 2], &size)) {
      report.group_sizes.push_back(size);
    }
    if (words.size() >= 6 && words[1] == "B" && absl::SimpleAtoi(words[0], &bytes) &&
        absl::SimpleAtod(words[2], &microseconds))
      report.p50_us[bytes] = microseconds;
  }
  return report;
}

std::vector<Finding> JudgeLaunch(const CommReport& report, int tp, const std::string& launcher,
                                 const std::string& log_tail, double least_gigabytes,
                                 const weights::ModelConfig* config) {
  Finding launch{.what = "launch"};
  if (report.group_sizes.empty()) {
    launch.kind = Finding::kBad;
    launch.detail = absl::StrCat(launcher, " started no rank; its last words: ", log_tail.empty() ? "none" : log_tail);
    launch.fix = launcher == "srun"
                     ? "run it inside an allocation with as many tasks (salloc -n); srun --mpi=list must "
                       "name pmix, and Slurm's PMIx must not be older than Open MPI's"
                     : "mpirun -n 2 hostname must work first: PATH, --oversubscribe, hosts that can be "
                       "logged in to; an interface by --mca btl_tcp_if_include";
    return {launch};
  }
  if (report.group_sizes[0] != tp || report.group_sizes.size() > 1) {
    launch.kind = Finding::kBad;
    launch.detail = absl::StrCat(launcher, " started ", report.group_sizes.size(), " groups of ", report.group_sizes[0],
                                 " instead of one of ", tp, ": the ranks do not find each other");
    launch.fix = launcher == "srun"
                     ? "srun --mpi=pmix, and an Open MPI that was built with PMIx (ompi_info | grep pmix)"
                     : "the mpirun in PATH must be of the Open MPI that rankwise was built with";
    return {launch};
  }
  launch.detail = absl::StrCat(launcher, " starts ", tp, tp == 1 ? " rank" : " ranks that meet");
  Finding speed{.what = "allreduce"};
  const auto probe = report.p50_us.find(kProbeBytes);
  if (tp == 1) return {launch};
  if (probe == report.p50_us.end()) {
    speed.kind = Finding::kDoubtful;
    speed.detail = absl::StrCat("did not come to ", kProbeBytes, " bytes in time: the ranks' CPUs are taken");
    speed.fix = "give each rank a core of its own, and --mca mpi_yield_when_idle 1 where they must be shared";
    return {launch, speed};
  }
  // What crosses each rank's link, as nccl-tests counts it.
  const double gigabytes = 2.0 * (tp - 1) / tp * static_cast<double>(kProbeBytes) / probe->second * 1e-3;
  speed.detail = absl::StrFormat("%.2f GB/s for 1 MiB, %.0f us", gigabytes, probe->second);
  if (const auto least = report.p50_us.begin(); least != report.p50_us.end())
    absl::StrAppendFormat(&speed.detail, "; %.1f us for %d bytes", least->second, least->first);
  if (config != nullptr) absl::StrAppend(&speed.detail, CostOfAToken(report, *config));
  if (gigabytes < least_gigabytes) {
    speed.kind = Finding::kBad;
    absl::StrAppendFormat(&speed.detail, "; --min-bandwidth asks for %.2f GB/s", least_gigabytes);
    speed.fix =
        "choose the fast interface (--mca btl_tcp_if_include), look for a busy or slow node, keep a group on one node";
  }
  return {launch, speed};
}

Finding CheckModel(const std::string& folder, int tp, std::optional<PlannedModel>& model) {
  Finding finding{.what = "model"};
  const auto bad = [&](const absl::Status& status, const std::string& fix) {
    finding.kind = Finding::kBad;
    finding.detail = std::string(status.message());
    finding.fix = fix;
    return finding;
  };
  const auto checkpoint = weights::Checkpoint::Open(folder);
  if (!checkpoint.ok())
    return bad(checkpoint.status(),
               "a folder with config.json and every *.safetensors file of its index, or a workspace, "
               "readable on this host");
  for (int rank = 0; rank < tp; ++rank) {
    const auto plan = shard::PlanShard((*checkpoint)->config().dims(), {.rank = rank, .world_size = tp});
    if (!plan.ok()) return bad(plan.status(), "a --tp that divides the model's heads");
    if (const absl::Status status = (*checkpoint)->Verify(*plan); !status.ok())
      return bad(status, "copy or convert the file again: it is not the one that its manifest was made of");
  }
  if (const auto tokenizer = text::Tokenizer::Load(folder); !tokenizer.ok())
    return bad(tokenizer.status(), "put tokenizer.json or tokenizer.model beside the weights");
  auto planned = FindModel(folder);
  if (!planned.ok()) return bad(planned.status(), "a folder that `rankwise plan` understands");
  model = *std::move(planned);
  const weights::ModelConfig& c = model->config;
  finding.detail =
      absl::StrCat(folder, ": ", c.model_type, ", ", c.n_layers, " layers, hidden ", c.hidden_size, ", weights ",
                   kernels::DTypeName(model->weight_dtype), ", fingerprint ", (*checkpoint)->fingerprint());
  return finding;
}

Finding JudgeMemory(const std::vector<RankGroup>& ranks, int ranks_on_host, int64_t available_bytes) {
  Finding finding{.what = "memory"};
  // The largest ranks come together in the worst case; a mapped embedding is there once.
  int64_t most = 0, embedding = 0;
  for (const RankGroup& group : ranks) {
    most = std::max(most, group.memory.total() - group.memory.embedding);
    embedding = std::max(embedding, group.memory.embedding);
  }
  const int64_t needed = most * ranks_on_host + embedding;
  finding.detail = absl::StrCat(ranks_on_host, ranks_on_host == 1 ? " rank needs " : " ranks need ", Gibibytes(needed),
                                " on this host");
  if (available_bytes == 0) {
    finding.kind = Finding::kDoubtful;
    absl::StrAppend(&finding.detail, ", and what is free is unknown");
    finding.fix = "compare by hand; `rankwise plan` shows each part";
    return finding;
  }
  absl::StrAppend(&finding.detail, ", ", Gibibytes(available_bytes), " are free");
  if (needed > available_bytes) {
    finding.kind = Finding::kBad;
    finding.fix =
        "a smaller --batch or --seq, --kv int8-online, more --tp over more hosts, or more memory (sbatch --mem); "
        "`rankwise plan` shows each part";
  }
  return finding;
}

int64_t AvailableMemory() {
  std::vector<int64_t> limits;
  if (const auto bytes = FromMeminfo()) limits.push_back(*bytes);
  // cgroup v2; in a namespace of its own the limit is at the root.
  const auto limit = NumberIn("/sys/fs/cgroup/memory.max"), used = NumberIn("/sys/fs/cgroup/memory.current");
  if (limit) limits.push_back(std::max<int64_t>(*limit - used.value_or(0), 1));
  int64_t mebibytes = 0;
  if (const char* text = std::getenv("SLURM_MEM_PER_NODE"); text != nullptr && absl::SimpleAtoi(text, &mebibytes))
    limits.push_back(mebibytes << 20);
  return limits.empty() ? 0 : *std::min_element(limits.begin(), limits.end());
}

Finding JudgeCpus(int ranks_on_host, int threads, int usable_cpus) {
  Finding finding{.what = "binding"};
  finding.detail = absl::StrCat(ranks_on_host, ranks_on_host == 1 ? " rank of " : " ranks of ", threads,
                                threads == 1 ? " thread on " : " threads on ", usable_cpus, " usable CPUs");
  if (ranks_on_host * threads > usable_cpus) {
    finding.kind = ranks_on_host > usable_cpus ? Finding::kBad : Finding::kDoubtful;
    absl::StrAppend(&finding.detail, ": they take each other's time, and a rank that waits holds up its group");
    finding.fix =
        "fewer ranks or --threads, or more CPUs of the job (sbatch -c, -n); taskset -p $$ shows what a shell may use";
  }
  return finding;
}

Finding CheckListen(const std::string& address) {
  Finding finding{.what = "port", .detail = absl::StrCat(address, " can be listened on")};
  const auto bad = [&](const std::string& detail, const std::string& fix) {
    finding.kind = Finding::kBad;
    finding.detail = absl::StrCat(address, ": ", detail);
    finding.fix = fix;
    return finding;
  };
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) return bad("is not HOST:PORT", "HOST:0 takes a free port");
  const std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  const addrinfo hints{.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM};
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0)
    return bad(gai_strerror(error), "a name or address of this host");
  int error = 0;
  bool is_free = false;
  for (const addrinfo* a = found; a != nullptr && !is_free; a = a->ai_next) {
    const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, 0);
    const int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    is_free = fd >= 0 && bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, 1) == 0;
    error = errno;
    if (fd >= 0) close(fd);
  }
  freeaddrinfo(found);
  if (is_free) return finding;
  return bad(std::strerror(error), error == EADDRINUSE      ? "another port, or 0 for a free one"
                                   : error == EADDRNOTAVAIL ? "a name or address of this host"
                                                            : "a port above 1023");
}

Finding CheckSharedMemory(const std::string& folder) {
  Finding finding{.what = "shm"};
  struct statvfs stat {};
  if (statvfs(folder.c_str(), &stat) != 0 || access(folder.c_str(), W_OK) != 0) {
    finding.kind = Finding::kDoubtful;
    finding.detail = absl::StrCat(folder, " cannot be written: ranks of one host talk through files instead");
    finding.fix = "mount a tmpfs there";
    return finding;
  }
  const auto free_bytes = static_cast<int64_t>(stat.f_bavail * stat.f_frsize);
  finding.detail = absl::StrFormat("%s has %.0f MiB free", folder, Mib(free_bytes));
  if (free_bytes < kLeastSharedMemory) {
    finding.kind = Finding::kBad;
    finding.fix = "remove what dead programs left there, or a larger one (docker run --shm-size)";
  }
  return finding;
}

Finding JudgeDevice(const std::string& device, const std::string& dev) {
  std::vector<std::string> gpus;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dev, error)) {
    const std::string name = entry.path().filename();
    int number = 0;
    if (absl::StartsWith(name, "nvidia") && absl::SimpleAtoi(name.substr(6), &number)) gpus.push_back(name);
  }
  std::sort(gpus.begin(), gpus.end());
  Finding finding{.what = "device"};
  const std::string there = gpus.empty() ? "no GPU here" : absl::StrCat("GPUs here: ", absl::StrJoin(gpus, ", "));
  finding.detail = absl::StrCat("--device ", device, ", ", there);
  if (device == "cuda" && gpus.empty()) {
    finding.kind = Finding::kBad;
    finding.fix = "ask Slurm for one (--gres=gpu:1), load the driver, or --device cpu";
  } else if (device == "cpu" && !gpus.empty()) {
    finding.kind = Finding::kDoubtful;
    finding.fix = "--device auto, unless the GPUs are meant to stay idle";
  }
  return finding;
}

}  // namespace rankwise::launch
