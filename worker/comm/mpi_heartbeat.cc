#include "worker/comm/mpi_heartbeat.h"

#include <mpi.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/comm/pacer.h"

namespace rankwise::comm {
namespace {

absl::Duration Now() { return absl::FromChrono(Clock::now().time_since_epoch()); }

absl::StatusOr<MPI_Comm> Duplicate(absl::Duration timeout) {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Comm_idup(MPI_COMM_WORLD, &comm, &request);
  Pacer pacer(DeadlineAfter(timeout));
  for (int done = 0; !done;) {
    if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) return absl::InternalError("MPI_Comm_idup failed");
    if (!done && !pacer.Pause()) {
      return absl::DeadlineExceededError(
          absl::StrCat("heartbeat: not all ranks came within ", absl::FormatDuration(timeout)));
    }
  }
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  return comm;
}

class Heartbeat final : public MpiHeartbeat {
 public:
  Heartbeat(MPI_Comm comm, const MpiSession& session, const Activity& activity, HeartbeatOptions options)
      : comm_(comm),
        rank_(session.rank()),
        activity_(activity),
        options_(std::move(options)),
        watch_(rank_, session.size(), options_.patience, Now()),
        links_(watch_.peers().size()) {
    for (size_t i = 0; i < links_.size(); ++i) {
      links_[i].peer = watch_.peers()[i];
      Receive(links_[i]);
    }
    thread_ = std::thread([this] { Run(); });
  }

  ~Heartbeat() override {
    {
      const std::lock_guard lock(mutex_);
      should_end_ = true;
    }
    wake_.notify_one();
    thread_.join();
    // The peer that a beat is on its way to may be gone; the requests go with the process then.
    for (Link& link : links_) {
      for (MPI_Request* request : {&link.sending, &link.receiving}) {
        if (*request == MPI_REQUEST_NULL) continue;
        if (request == &link.receiving) MPI_Cancel(request);
        int done = 0;
        MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (!done) is_abandoned_ = true;
      }
    }
    if (is_abandoned_) new std::vector<Link>(std::move(links_));  // MPI may still write to them.
  }

  absl::Duration cpu_time() const override { return absl::Nanoseconds(cpu_nanoseconds_.load()); }

 private:
  struct Link {
    int peer = 0;
    Beat outgoing, incoming;
    MPI_Request sending = MPI_REQUEST_NULL, receiving = MPI_REQUEST_NULL;
  };

  void Run() {
    pthread_setname_np(pthread_self(), "heartbeat");
    absl::Status health;
    for (bool is_last = false; health.ok() && !is_last;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait_for(lock, absl::ToChronoNanoseconds(options_.interval), [this] { return should_end_; });
        is_last = should_end_;
      }
      const Beat own = OwnBeat(is_last);
      watch_.Take(rank_, own, Now());
      for (Link& link : links_) Exchange(link, own);
      health = is_last ? absl::OkStatus() : watch_.Check(Now());
      options_.on_beat(own);
      CountCpuTime();
    }
    if (!health.ok()) options_.on_failure(health);
  }

  Beat OwnBeat(bool is_last) const {
    Beat beat{.activity = activity_.Snapshot(), .is_leaving = is_last};
    gethostname(beat.host, sizeof beat.host - 1);
    return beat;
  }

  void Exchange(Link& link, const Beat& own) {
    int is_done = 0;
    while (MPI_Test(&link.receiving, &is_done, MPI_STATUS_IGNORE) == MPI_SUCCESS && is_done) {
      watch_.Take(link.peer, link.incoming, Now());
      Receive(link);
    }
    // A beat that the network still holds stands for this one too. The last one has to go out.
    Pacer pacer(DeadlineAfter(own.is_leaving ? absl::Seconds(1) : absl::ZeroDuration()));
    do {
      if (MPI_Test(&link.sending, &is_done, MPI_STATUS_IGNORE) == MPI_SUCCESS && is_done) {
        link.outgoing = own;
        MPI_Isend(&link.outgoing, sizeof(Beat), MPI_BYTE, link.peer, /*tag=*/0, comm_, &link.sending);
        MPI_Test(&link.sending, &is_done, MPI_STATUS_IGNORE);
        return;
      }
    } while (pacer.Pause());
  }

  void Receive(Link& link) {
    MPI_Irecv(&link.incoming, sizeof(Beat), MPI_BYTE, link.peer, /*tag=*/0, comm_, &link.receiving);
  }

  void CountCpuTime() {
    timespec used{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    cpu_nanoseconds_ = used.tv_sec * int64_t{1'000'000'000} + used.tv_nsec;
  }

  const MPI_Comm comm_;
  const int rank_;
  const Activity& activity_;
  const HeartbeatOptions options_;
  GroupWatch watch_;
  std::vector<Link> links_;
  bool is_abandoned_ = false;
  std::atomic<int64_t> cpu_nanoseconds_ = 0;

  std::mutex mutex_;
  std::condition_variable wake_;
  bool should_end_ = false;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MpiHeartbeat>> MpiHeartbeat::Start(const MpiSession& session, const Activity& activity,
                                                                  HeartbeatOptions options, absl::Duration timeout) {
  RW_ASSIGN_OR_RETURN(const MPI_Comm comm, Duplicate(timeout));
  return std::make_unique<Heartbeat>(comm, session, activity, std::move(options));
}

}  // namespace rankwise::comm
