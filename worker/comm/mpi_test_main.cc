#include "worker/comm/mpi_test_main.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace rankwise::comm {
namespace {

constexpr std::chrono::seconds kProgressWithin{60};
// Longer than the watchdog, which knows better what hangs.
constexpr absl::Duration kReportTimeout = absl::Minutes(2);

const MpiSession* test_session = nullptr;
Communicator* test_communicator = nullptr;

// Ends the job when nobody has called Progress for too long.
class Watchdog {
 public:
  explicit Watchdog(const MpiSession& session) : session_(session), thread_([this] { Watch(); }) {}

  ~Watchdog() {
    {
      std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }

  void Progress(std::string where) {
    std::lock_guard lock(mutex_);
    where_ = std::move(where);
    ++progress_;
    changed_.notify_one();
  }

 private:
  void Watch() {
    std::unique_lock lock(mutex_);
    while (!is_over_) {
      const int64_t seen = progress_;
      if (changed_.wait_for(lock, kProgressWithin, [&] { return is_over_ || progress_ != seen; })) continue;
      std::fprintf(stderr, "rank %d: no progress for %d s in %s\n", session_.rank(),
                   static_cast<int>(kProgressWithin.count()), where_.c_str());
      session_.Abort(EXIT_FAILURE);
    }
  }

  const MpiSession& session_;
  std::mutex mutex_;  // Guards all below but thread_.
  std::condition_variable changed_;
  std::string where_ = "the start";
  int64_t progress_ = 0;
  bool is_over_ = false;
  std::thread thread_;
};

std::string FailuresOf(const testing::TestInfo& test) {
  std::string failures;
  for (int i = 0; i < test.result()->total_part_count(); ++i) {
    const testing::TestPartResult& part = test.result()->GetTestPartResult(i);
    if (!part.failed()) continue;
    absl::StrAppend(&failures, part.file_name() ? part.file_name() : "unknown", ":", part.line_number(), ": ",
                    part.message(), "\n");
  }
  return failures;
}

// Makes the outcome of each test that of all ranks.
class Referee : public testing::EmptyTestEventListener {
 public:
  Referee(const MpiSession& session, std::unique_ptr<Communicator> communicator, Watchdog& watchdog)
      : session_(session), communicator_(std::move(communicator)), watchdog_(watchdog) {}

  void OnTestStart(const testing::TestInfo& test) override {
    test_ = absl::StrCat(test.test_suite_name(), ".", test.name());
    watchdog_.Progress(test_);
  }

  // gtest holds its lock here: asking it for the current test would wait for ever.
  void OnTestPartResult(const testing::TestPartResult& part) override {
    const char* file = part.file_name() == nullptr ? "unknown" : part.file_name();
    watchdog_.Progress(absl::StrCat(test_, " after ", file, ":", part.line_number()));
  }

  void OnTestEnd(const testing::TestInfo& test) override {
    std::vector<std::string> failures;
    absl::Status status = communicator_->GatherMessages(FailuresOf(test), failures, kReportTimeout);
    std::string verdict;
    for (size_t rank = 0; rank < failures.size(); ++rank) {
      if (failures[rank].empty()) continue;
      absl::StrAppend(&verdict, "failed on rank ", rank, rank == 0 ? ", see above" : ":\n" + failures[rank], "\n");
    }
    status.Update(communicator_->Broadcast(verdict, kReportTimeout));
    if (!status.ok()) {
      std::fprintf(stderr, "%s: the ranks cannot agree: %s\n", test_.c_str(), status.ToString().c_str());
      session_.Abort(EXIT_FAILURE);
    }
    if (!verdict.empty()) ADD_FAILURE() << verdict;
  }

 private:
  const MpiSession& session_;
  std::unique_ptr<Communicator> communicator_;
  Watchdog& watchdog_;
  std::string test_;
};

std::unique_ptr<Communicator> CommunicatorOrAbort(const MpiSession& session) {
  auto communicator = CreateMpiCommunicator(session, kReportTimeout);
  if (communicator.ok()) return *std::move(communicator);
  std::fprintf(stderr, "%s\n", communicator.status().ToString().c_str());
  session.Abort(EXIT_FAILURE);
}

int RunTests() {
  auto session = MpiSession::Start();
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().ToString().c_str());
    return EXIT_FAILURE;
  }
  Watchdog watchdog(**session);
  const std::unique_ptr<Communicator> communicator = CommunicatorOrAbort(**session);
  test_session = session->get();
  test_communicator = communicator.get();

  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (communicator->rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
  }
  auto referee = std::make_unique<Referee>(**session, CommunicatorOrAbort(**session), watchdog);
  listeners.Append(referee.get());
  const int result = RUN_ALL_TESTS();
  listeners.Release(referee.get());
  return result;
}

}  // namespace

const MpiSession& TestSession() { return *test_session; }
Communicator& TestCommunicator() { return *test_communicator; }

}  // namespace rankwise::comm

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (GTEST_FLAG_GET(list_tests)) return RUN_ALL_TESTS();
  return rankwise::comm::RunTests();
}
