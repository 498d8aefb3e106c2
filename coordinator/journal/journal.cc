#include "coordinator/journal/journal.h"

#include <sqlite3.h>
#include <sys/stat.h>

#include <cerrno>
#include <deque>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace rankwise::journal {

using rankwise::v1::GenerateRequest;
using worker::v1::SequenceOutput;

void Merge(const SequenceOutput& output, SequenceOutput& kept) {
  kept.mutable_tokens()->MergeFrom(output.tokens());
  kept.mutable_prompt_logprobs()->MergeFrom(output.prompt_logprobs());
  if (!output.finished()) return;
  kept.set_finished(true);
  kept.set_reason(output.reason());
  if (output.has_stop_token_id()) kept.set_stop_token_id(output.stop_token_id());
  kept.set_cached_prompt_tokens(output.cached_prompt_tokens());
  kept.set_queue_seconds(output.queue_seconds());
  kept.set_prefill_seconds(output.prefill_seconds());
  kept.set_decode_seconds(output.decode_seconds());
}

namespace {

constexpr int kFormat = 1;
constexpr char kSchema[] = R"(
  CREATE TABLE requests(id TEXT PRIMARY KEY, request BLOB NOT NULL, fingerprint TEXT NOT NULL,
                        accepted_us INTEGER NOT NULL, deadline_us INTEGER NOT NULL);
  CREATE TABLE outputs(id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE, sample INTEGER NOT NULL,
                       output BLOB NOT NULL);
  CREATE INDEX outputs_of ON outputs(id);
  PRAGMA user_version = 1;
)";

// One prepared statement. Bind in order, Step, Reset.
class Statement {
 public:
  Statement(sqlite3* database, const char* sql) { sqlite3_prepare_v2(database, sql, -1, &statement_, nullptr); }
  ~Statement() { sqlite3_finalize(statement_); }
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;

  Statement& Text(const std::string& value) {
    sqlite3_bind_text(statement_, ++bound_, value.data(), static_cast<int>(value.size()), SQLITE_TRANSIENT);
    return *this;
  }
  Statement& Blob(const std::string& value) {
    sqlite3_bind_blob(statement_, ++bound_, value.data(), static_cast<int>(value.size()), SQLITE_TRANSIENT);
    return *this;
  }
  Statement& Integer(int64_t value) {
    sqlite3_bind_int64(statement_, ++bound_, value);
    return *this;
  }
  // SQLITE_ROW, SQLITE_DONE or an error.
  int Step() { return statement_ == nullptr ? SQLITE_ERROR : sqlite3_step(statement_); }
  int Run() {
    const int code = Step();
    sqlite3_reset(statement_);
    bound_ = 0;
    return code;
  }
  std::string Column(int column) const {
    const auto* bytes = static_cast<const char*>(sqlite3_column_blob(statement_, column));
    return bytes == nullptr ? "" : std::string(bytes, static_cast<size_t>(sqlite3_column_bytes(statement_, column)));
  }
  int64_t IntegerColumn(int column) const { return sqlite3_column_int64(statement_, column); }

 private:
  sqlite3_stmt* statement_ = nullptr;
  int bound_ = 0;
};

class SqliteJournal final : public Journal {
 public:
  explicit SqliteJournal(const JournalOptions& options) : options_(options) {}

  absl::Status Start() {
    std::error_code error;
    std::filesystem::create_directories(options_.folder, error);
    if (error) return absl::UnavailableError(absl::StrCat("journal ", options_.folder, ": ", error.message()));
    const std::string path = absl::StrCat(options_.folder, "/journal.sqlite");
    const mode_t mask = umask(077);  // prompts are nobody else's
    const int opened = sqlite3_open(path.c_str(), &database_);
    absl::Status ready = opened == SQLITE_OK ? Prepare() : Error("open");
    umask(mask);
    if (!ready.ok()) return absl::Status(ready.code(), absl::StrCat("journal ", path, ": ", ready.message()));
    RW_RETURN_IF_ERROR(Recover());
    thread_ = std::thread([this] { Write(); });
    return absl::OkStatus();
  }

  ~SqliteJournal() override {
    {
      absl::MutexLock lock(&mutex_);
      should_end_ = true;
    }
    if (thread_.joinable()) thread_.join();
    sqlite3_close(database_);
  }

  std::vector<JournaledRequest> TakeRecovered() override { return std::exchange(recovered_, {}); }

  absl::Status Accept(const JournaledRequest& request) override {
    absl::MutexLock lock(&mutex_);
    if (is_closed_) return absl::UnavailableError("the journal is closed");
    changes_.push_back({.request = request, .is_accepted = true});
    known_.insert(request.request.request_id());
    const uint64_t ticket = ++queued_;
    const auto is_written = [this, ticket]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return written_ >= ticket; };
    mutex_.Await(absl::Condition(&is_written));
    return latest_error_;
  }

  void Append(const std::string& id, uint32_t sample, const SequenceOutput& output) override {
    absl::MutexLock lock(&mutex_);
    if (!is_closed_ && known_.contains(id)) Merge(output, outputs_[{id, sample}]);
  }

  void Forget(const std::string& id) override {
    absl::MutexLock lock(&mutex_);
    if (is_closed_ || known_.erase(id) == 0) return;
    outputs_.erase(outputs_.lower_bound({id, 0}), outputs_.upper_bound({id, UINT32_MAX}));
    Change& change = changes_.emplace_back();
    change.request.request.set_request_id(id);
    ++queued_;
  }

  void Close() override {
    absl::MutexLock lock(&mutex_);
    is_closed_ = true;
  }

 private:
  struct Change {
    JournaledRequest request;
    bool is_accepted = false;  // else it is forgotten
  };
  using Outputs = std::map<std::pair<std::string, uint32_t>, SequenceOutput>;

  absl::Status Error(absl::string_view what) const {
    const int code = sqlite3_errcode(database_);
    const auto kind = code == SQLITE_BUSY || code == SQLITE_NOTADB ? absl::StatusCode::kFailedPrecondition
                                                                   : absl::StatusCode::kUnavailable;
    return absl::Status(kind, absl::StrCat(what, ": ", sqlite3_errmsg(database_),
                                           code == SQLITE_BUSY ? " (another coordinator has it open)" : ""));
  }
  absl::Status Execute(const char* sql) {
    return sqlite3_exec(database_, sql, nullptr, nullptr, nullptr) == SQLITE_OK ? absl::OkStatus() : Error("SQL");
  }

  absl::Status Prepare() {
    // Exclusive: the lock goes with the process, and the log needs no shared memory, which network file systems lack.
    RW_RETURN_IF_ERROR(
        Execute("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON;"));
    RW_RETURN_IF_ERROR(Execute(options_.syncs ? "PRAGMA synchronous = FULL;" : "PRAGMA synchronous = NORMAL;"));
    RW_RETURN_IF_ERROR(Execute("BEGIN EXCLUSIVE;"));
    int64_t format = 0;
    {
      Statement version(database_, "PRAGMA user_version;");
      if (version.Step() == SQLITE_ROW) format = version.IntegerColumn(0);
    }
    if (format != 0 && format != kFormat) {
      return absl::FailedPreconditionError(absl::StrCat("its format is ", format, ", this program writes ", kFormat));
    }
    if (format == 0) RW_RETURN_IF_ERROR(Execute(kSchema));
    return Execute("COMMIT;");
  }

  absl::Status Recover() {
    std::map<std::string, size_t> numbers;
    Statement requests(database_,
                       "SELECT id, request, fingerprint, accepted_us, deadline_us FROM requests ORDER BY rowid;");
    int code = requests.Step();
    for (; code == SQLITE_ROW; code = requests.Step()) {
      JournaledRequest request;
      if (!request.request.ParseFromString(requests.Column(1))) {
        return absl::FailedPreconditionError(absl::StrCat("journal: request ", requests.Column(0), " is no request"));
      }
      request.numerics = requests.Column(2);
      request.accepted = absl::FromUnixMicros(requests.IntegerColumn(3));
      const int64_t deadline_us = requests.IntegerColumn(4);
      if (deadline_us != INT64_MAX) request.deadline = absl::FromUnixMicros(deadline_us);
      request.samples.resize(std::max(request.request.n(), 1u));
      numbers[requests.Column(0)] = recovered_.size();
      recovered_.push_back(std::move(request));
    }
    if (code != SQLITE_DONE) return Error("read");
    Statement outputs(database_, "SELECT id, sample, output FROM outputs ORDER BY rowid;");
    for (code = outputs.Step(); code == SQLITE_ROW; code = outputs.Step()) {
      SequenceOutput output;
      auto& samples = recovered_.at(numbers.at(outputs.Column(0))).samples;
      const auto sample = static_cast<size_t>(outputs.IntegerColumn(1));
      if (sample >= samples.size() || !output.ParseFromString(outputs.Column(2))) {
        return absl::FailedPreconditionError(absl::StrCat("journal: an output of ", outputs.Column(0), " is none"));
      }
      Merge(output, samples[sample]);
    }
    if (code != SQLITE_DONE) return Error("read");
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, number] : numbers) known_.insert(id);
    return absl::OkStatus();
  }

  void Write() {
    Statement accept(database_, "INSERT OR REPLACE INTO requests VALUES(?, ?, ?, ?, ?);");
    Statement forget(database_, "DELETE FROM requests WHERE id = ?;");
    Statement append(database_,
                     "INSERT INTO outputs SELECT ?1, ?2, ?3 WHERE EXISTS(SELECT 1 FROM requests WHERE id = ?1);");
    for (bool is_last = false; !is_last;) {
      std::deque<Change> changes;
      Outputs outputs;
      uint64_t ticket = 0;
      {
        absl::MutexLock lock(&mutex_);
        const auto is_urgent = [this]()
                                   ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return should_end_ || !changes_.empty(); };
        mutex_.AwaitWithTimeout(absl::Condition(&is_urgent), options_.interval);
        is_last = should_end_;
        changes.swap(changes_);
        outputs.swap(outputs_);
        ticket = queued_;
      }
      absl::Status written;
      if (!changes.empty() || !outputs.empty()) written = Commit(changes, outputs, accept, forget, append);
      if (!written.ok()) spdlog::error("journal: {}", std::string(written.message()));
      absl::MutexLock lock(&mutex_);
      if (!written.ok()) PutBack(std::move(outputs));
      written_ = ticket;
      latest_error_ = written;
    }
  }

  // What could not be written goes before what has come since: a stream on disk has no hole.
  void PutBack(Outputs outputs) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (auto& [key, output] : outputs) {
      if (!known_.contains(key.first)) continue;
      if (const auto later = outputs_.find(key); later != outputs_.end()) Merge(later->second, output);
      outputs_[key] = std::move(output);
    }
  }

  absl::Status Commit(const std::deque<Change>& changes, const Outputs& outputs, Statement& accept, Statement& forget,
                      Statement& append) {
    RW_RETURN_IF_ERROR(Execute("BEGIN IMMEDIATE;"));
    int code = SQLITE_DONE;
    for (const Change& change : changes) {
      const JournaledRequest& request = change.request;
      const std::string& id = request.request.request_id();
      if (code != SQLITE_DONE) break;
      if (!change.is_accepted) {
        code = forget.Text(id).Run();
        continue;
      }
      const bool is_endless = request.deadline == absl::InfiniteFuture();
      code = accept.Text(id)
                 .Blob(request.request.SerializeAsString())
                 .Text(request.numerics)
                 .Integer(absl::ToUnixMicros(request.accepted))
                 .Integer(is_endless ? INT64_MAX : absl::ToUnixMicros(request.deadline))
                 .Run();
    }
    for (const auto& [key, output] : outputs) {
      if (code == SQLITE_DONE) code = append.Text(key.first).Integer(key.second).Blob(output.SerializeAsString()).Run();
    }
    if (code == SQLITE_DONE) return Execute("COMMIT;");
    absl::Status failed = Error("write");
    Execute("ROLLBACK;").IgnoreError();
    return failed;
  }

  const JournalOptions options_;
  sqlite3* database_ = nullptr;  // of Start, then of the thread
  std::vector<JournaledRequest> recovered_;

  absl::Mutex mutex_;
  std::set<std::string> known_ ABSL_GUARDED_BY(mutex_);  // accepted and not forgotten
  std::deque<Change> changes_ ABSL_GUARDED_BY(mutex_);
  Outputs outputs_ ABSL_GUARDED_BY(mutex_);
  uint64_t queued_ ABSL_GUARDED_BY(mutex_) = 0, written_ ABSL_GUARDED_BY(mutex_) = 0;  // changes
  absl::Status latest_error_ ABSL_GUARDED_BY(mutex_);
  bool is_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool should_end_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Journal>> Journal::Open(const JournalOptions& options) {
  auto journal = std::make_unique<SqliteJournal>(options);
  RW_RETURN_IF_ERROR(journal->Start());
  return journal;
}

}  // namespace rankwise::journal
