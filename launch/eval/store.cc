#include "launch/eval/store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/eval/tasks.h"

namespace rankwise::eval {
namespace {

using nlohmann::json;

constexpr int kAnswersPerSync = 64;
constexpr absl::Duration kSyncInterval = absl::Seconds(2);

// "kv is \"int8\", not \"f16\"; …"
std::string Differences(const json& there, const json& wanted) {
  std::set<std::string> names;
  for (const json* object : {&there, &wanted}) {
    for (const auto& [name, value] : object->items()) names.insert(name);
  }
  std::vector<std::string> differences;
  for (const std::string& name : names) {
    const json a = there.value(name, json()), b = wanted.value(name, json());
    if (a != b) differences.push_back(absl::StrCat(name, " is ", a.dump(), ", not ", b.dump()));
  }
  return absl::StrJoin(differences, "; ");
}

}  // namespace

absl::StatusOr<std::unique_ptr<AnswerStore>> AnswerStore::Open(const std::string& path, const json& header) {
  RW_CHECK(header.is_object() && !header.empty(), "a header is an object");
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  if (error) return absl::InvalidArgumentError(absl::StrCat("create the folder of ", path, ": ", error.message()));
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", path));
  std::unique_ptr<AnswerStore> store(new AnswerStore(path, fd, Digest(header.dump())));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0)
    return absl::FailedPreconditionError(absl::StrCat(path, ": another process is writing it"));
  RW_RETURN_IF_ERROR(store->Load(header));
  return store;
}

AnswerStore::~AnswerStore() {
  fsync(fd_);
  close(fd_);
}

absl::Status AnswerStore::Load(const json& header) {
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path_));
  const size_t whole = text.rfind('\n') + 1;  // 0 when there is none
  if (whole < text.size() && ftruncate(fd_, static_cast<off_t>(whole)) != 0)
    return absl::ErrnoToStatus(errno, absl::StrCat("cut the torn last line off ", path_));
  if (whole == 0) {
    absl::MutexLock lock(&mutex_);
    RW_RETURN_IF_ERROR(Write(header.dump()));
    return SyncLocked();
  }
  int64_t number = 0;
  for (size_t begin = 0; begin < whole;) {
    const size_t end = text.find('\n', begin);
    json line = json::parse(text.begin() + begin, text.begin() + end, nullptr, /*allow_exceptions=*/false);
    begin = end + 1;
    ++number;
    const auto refuse = [&](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat(path_, ":", number, ": ", what));
    };
    if (!line.is_object()) return refuse("is no JSON object");
    if (number == 1) {
      if (line == header) continue;
      return absl::FailedPreconditionError(absl::StrCat(path_,
                                                        " holds answers of another run: ", Differences(line, header),
                                                        ". Give another --work-dir, or remove the file"));
    }
    const auto id = line.find("id"), run = line.find("run");
    if (id == line.end() || !id->is_string()) return refuse("has no \"id\"");
    if (run == line.end() || *run != run_) return refuse("is of another run");
    if (!answers_.emplace(id->get<std::string>(), line).second)
      return refuse(absl::StrCat("answers ", id->dump(), " again"));
  }
  return absl::OkStatus();
}

const json* AnswerStore::Find(const std::string& id) const {
  const auto it = answers_.find(id);
  return it == answers_.end() ? nullptr : &it->second;
}

absl::Status AnswerStore::Append(const std::string& id, json answer) {
  answer["id"] = id;
  answer["run"] = run_;
  // A model's text is UTF-8 by the API's contract; were it not, a replacement is better than an exception.
  const std::string line = answer.dump(-1, ' ', false, json::error_handler_t::replace);
  absl::MutexLock lock(&mutex_);
  RW_CHECK(answers_.emplace(id, std::move(answer)).second, "an item is answered once");
  RW_RETURN_IF_ERROR(Write(line));
  ++unsynced_;
  if (unsynced_ >= kAnswersPerSync || absl::Now() - synced_ >= kSyncInterval) return SyncLocked();
  return absl::OkStatus();
}

absl::Status AnswerStore::Sync() {
  absl::MutexLock lock(&mutex_);
  return SyncLocked();
}

absl::Status AnswerStore::SyncLocked() {
  unsynced_ = 0;
  synced_ = absl::Now();
  if (fsync(fd_) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("sync ", path_));
  return absl::OkStatus();
}

absl::Status AnswerStore::Write(const std::string& line) {
  RW_RETURN_IF_ERROR(failure_);
  const std::string bytes = absl::StrCat(line, "\n");
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = write(fd_, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failure_ = absl::ErrnoToStatus(errno, absl::StrCat("write ", path_));
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace rankwise::eval
