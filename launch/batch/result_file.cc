#include "launch/batch/result_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::batch {
namespace {

// "host n1, process 4711, Slurm job 17"
std::string Owner() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  const char* job = std::getenv("SLURM_JOB_ID");
  return absl::StrCat("host ", host, ", process ", getpid(), job == nullptr ? "" : ", Slurm job ",
                      job == nullptr ? "" : job);
}

absl::Status WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, "write");
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

// A new name is durable once its folder is.
absl::Status SyncFolder(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  const std::string folder = parent.empty() ? std::string(".") : parent.string();
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", folder));
  const int result = fsync(fd), error = errno;
  close(fd);
  // Some file systems cannot sync a folder, and then need not.
  if (result != 0 && error != EINVAL) return absl::ErrnoToStatus(error, absl::StrCat("sync ", folder));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<FileLock>> FileLock::Take(const std::string& path, absl::Duration patience) {
  const std::string lock_path = path + ".lock";
  const absl::Time deadline = absl::Now() + patience;
  for (;;) {
    const int fd = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", lock_path));
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
      // Its last owner may have removed the file between our open and our flock.
      struct stat ours {
      }, there{};
      if (fstat(fd, &ours) == 0 && stat(lock_path.c_str(), &there) == 0 && ours.st_ino == there.st_ino &&
          ours.st_dev == there.st_dev) {
        std::unique_ptr<FileLock> lock(new FileLock(lock_path, fd));
        if (ftruncate(fd, 0) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("truncate ", lock_path));
        RW_RETURN_IF_ERROR(WriteAll(fd, Owner() + "\n"));
        return lock;
      }
      close(fd);
      continue;
    }
    const int error = errno;
    close(fd);
    if (error != EWOULDBLOCK && error != EINTR)
      return absl::ErrnoToStatus(error, absl::StrCat("lock ", lock_path, " (does its file system have flock?)"));
    if (absl::Now() >= deadline) {
      const auto owner = ReadTextFile(lock_path, 4096);
      return absl::FailedPreconditionError(
          absl::StrCat(path, " is being written by another run",
                       owner.ok() ? absl::StrCat(" (", std::string(absl::StripAsciiWhitespace(*owner)), ")") : ""));
    }
    absl::SleepFor(absl::Milliseconds(50));
  }
}

FileLock::~FileLock() {
  unlink(path_.c_str());  // still locked: who opened it before now sees that it has gone
  close(fd_);
}

absl::StatusOr<std::unique_ptr<ResultFile>> ResultFile::Open(
    const std::string& path, const std::function<absl::Status(std::string_view line)>& on_line) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", path));
  std::unique_ptr<ResultFile> results(new ResultFile(path, fd, 0));
  RW_RETURN_IF_ERROR(SyncFolder(path));
  RW_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  int64_t number = 0;
  size_t begin = 0;
  for (size_t end; (end = bytes.find('\n', begin)) != std::string_view::npos; begin = end + 1) {
    ++number;
    const absl::Status status = on_line(bytes.substr(begin, end - begin));
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat(path, ":", number, ": ", status.message()));
  }
  if (begin < bytes.size() && (ftruncate(fd, static_cast<off_t>(begin)) != 0 || fdatasync(fd) != 0))
    return absl::ErrnoToStatus(errno, absl::StrCat("cut the torn last line off ", path));
  results->bytes_ = static_cast<int64_t>(begin);
  return results;
}

ResultFile::~ResultFile() { close(fd_); }

int64_t ResultFile::syncs() const {
  absl::MutexLock lock(&mutex_);
  return syncs_;
}

absl::Status ResultFile::Commit(const std::string& lines) {
  absl::Status status = WriteAll(fd_, lines);
  if (status.ok() && fdatasync(fd_) != 0) status = absl::ErrnoToStatus(errno, "sync");
  if (status.ok()) {
    bytes_ += static_cast<int64_t>(lines.size());
    return status;
  }
  if (ftruncate(fd_, static_cast<off_t>(bytes_)) != 0)
    return absl::Status(status.code(), absl::StrCat(path_, ": ", status.message(), ", and its end cannot be cut off"));
  return absl::Status(status.code(), absl::StrCat(path_, ": ", status.message()));
}

absl::Status ResultFile::Append(const std::string& line) {
  absl::MutexLock lock(&mutex_);
  absl::StrAppend(&pending_, line, "\n");
  const int64_t mine = ++appended_;
  while (failure_.ok() && committed_ < mine) {
    if (is_committing_) {
      mutex_.Await(absl::Condition(
          +[](ResultFile* file) ABSL_NO_THREAD_SAFETY_ANALYSIS { return !file->is_committing_; }, this));
      continue;
    }
    const std::string lines = std::exchange(pending_, {});
    const int64_t last = appended_;
    is_committing_ = true;
    mutex_.Unlock();
    const absl::Status status = Commit(lines);
    mutex_.Lock();
    is_committing_ = false;
    ++syncs_;
    failure_.Update(status);
    if (status.ok()) committed_ = last;
  }
  return committed_ >= mine ? absl::OkStatus() : failure_;
}

}  // namespace rankwise::batch
