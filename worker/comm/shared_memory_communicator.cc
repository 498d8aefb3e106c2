#include "worker/comm/shared_memory_communicator.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/comm/collective.h"
#include "worker/comm/exchange.h"
#include "worker/comm/pacer.h"
#include "worker/comm/preconditions.h"
#include "worker/comm/sum.h"

namespace rankwise::comm {
namespace {

// Half an L1 cache, and a fraction of what a step's sums move.
constexpr int64_t kPieceBytes = 32 << 10;
// Pieces a rank may be ahead of the slowest one, and one.
constexpr uint32_t kSlots = 4;
// Longer than a peer's matmul differs from ours, and about what a sleep and a wake-up cost.
constexpr std::chrono::microseconds kSpinFor{50};
constexpr int kLooksPerClock = 32;
// From this many ranks on, each sums a share of a piece, and then all swap shares: two waits, but no byte is read by
// all.
constexpr int kSharingRanks = 4;
constexpr int64_t kSharingBytes = 8 << 10;

// What one rank shows the others. Only its owner writes, except `sleepers`. All zero at first.
struct Mailbox {
  struct Slot {
    Collective collective;
    int64_t bytes;  // of the whole that this piece is of
    alignas(64) std::byte piece[kPieceBytes];
  };
  // Steps whose slot may be read: a futex, and the order between a piece's writer and its readers.
  alignas(64) std::atomic<uint32_t> published;
  std::atomic<uint32_t> sleepers;  // ranks that sleep, or are about to, until `published` changes
  alignas(64) Slot slots[kSlots];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

void Sleep(std::atomic<uint32_t>& word, uint32_t seen, Clock::duration timeout) {
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(timeout).count();
  const timespec relative{.tv_sec = nanoseconds / 1'000'000'000, .tv_nsec = nanoseconds % 1'000'000'000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &relative, nullptr, 0);
}
void WakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// [size] mailboxes in memory that every rank has mapped.
class Mailboxes {
 public:
  static int64_t Bytes(int size) { return static_cast<int64_t>(sizeof(Mailbox)) * size; }

  static absl::StatusOr<std::shared_ptr<Mailboxes>> Map(int fd, int size) {
    const int flags = MAP_SHARED | MAP_POPULATE | (fd < 0 ? MAP_ANONYMOUS : 0);
    void* memory = mmap(nullptr, Bytes(size), PROT_READ | PROT_WRITE, flags, fd, 0);
    if (memory == MAP_FAILED) return absl::ErrnoToStatus(errno, "cannot map the ranks' shared memory");
    return std::shared_ptr<Mailboxes>(new Mailboxes(static_cast<Mailbox*>(memory), size));
  }
  ~Mailboxes() { munmap(boxes_, Bytes(size_)); }
  Mailboxes(const Mailboxes&) = delete;
  Mailboxes& operator=(const Mailboxes&) = delete;

  int size() const { return size_; }
  Mailbox& operator[](int rank) const { return boxes_[rank]; }

 private:
  Mailboxes(Mailbox* boxes, int size) : boxes_(boxes), size_(size) {}

  Mailbox* const boxes_;
  const int size_;
};

// Every collective is a number of steps, the same on all ranks. In each step a rank publishes one piece, which may be
// empty, and reads those it needs. A slot is written again kSlots steps later, when all peers have published a later
// step than the one in which they read it.
class SharedMemoryCommunicator final : public Communicator {
 public:
  SharedMemoryCommunicator(std::shared_ptr<Mailboxes> boxes, int rank)
      : boxes_(std::move(boxes)), rank_(rank), spin_for_(CpuCount() >= boxes_->size() ? kSpinFor : kSpinFor * 0) {}

  int rank() const override { return rank_; }
  int size() const override { return boxes_->size(); }
  std::string Description() const override {
    return absl::StrCat("shared memory, ", size(), size() == 1 ? " rank" : " ranks");
  }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(Begin(Collective::kAllReduceSum, timeout));
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    int64_t begin = 0;
    do {  // a step also where there is nothing to sum
      const std::span<float> piece = values.subspan(begin, std::min<int64_t>(kPieceFloats, values.size() - begin));
      const bool is_shared = size() >= kSharingRanks && static_cast<int64_t>(piece.size_bytes()) >= kSharingBytes;
      RW_RETURN_IF_ERROR(Publish(std::as_bytes(piece), bytes));
      for (int peer = 0; peer < size(); ++peer) RW_RETURN_IF_ERROR(Await(peer, bytes));
      const auto [first, last] = is_shared ? Share(rank_, piece.size()) : std::pair<int64_t, int64_t>(0, piece.size());
      SumInTree(piece.subspan(first, last - first), first);
      ++step_;
      if (is_shared) RW_RETURN_IF_ERROR(SwapShares(piece, bytes));
      begin += kPieceFloats;
    } while (begin < static_cast<int64_t>(values.size()));
    return absl::OkStatus();
  }

  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    CheckGatherShape(rank_, size(), part, part_counts, all);
    RW_RETURN_IF_ERROR(Begin(Collective::kGather, timeout));
    const int64_t longest = *std::ranges::max_element(part_counts);
    for (int64_t begin = 0; begin == 0 || begin < longest; begin += kPieceFloats) {
      const auto piece_of = [&](auto values) {
        const int64_t first = std::min<int64_t>(begin, values.size());
        return values.subspan(first, std::min<int64_t>(kPieceFloats, values.size() - first));
      };
      RW_RETURN_IF_ERROR(Publish(std::as_bytes(piece_of(part)), static_cast<int64_t>(part.size_bytes())));
      float* out = all.data();
      for (int peer = 0; rank_ == 0 && peer < size(); out += part_counts[peer], ++peer) {
        RW_RETURN_IF_ERROR(Await(peer, part_counts[peer] * static_cast<int64_t>(sizeof(float))));
        const std::span<float> piece = piece_of(std::span(out, part_counts[peer]));
        std::memcpy(piece.data(), PieceOf(peer), piece.size_bytes());
      }
      ++step_;
    }
    return absl::OkStatus();
  }

  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(Begin(Collective::kBroadcast, timeout));
    if (rank_ == 0) {
      if (absl::Status status = CheckMessageSize(0, "Broadcast", message); !status.ok()) return broken_ = status;
      for (size_t begin = 0; begin == 0 || begin < message.size(); begin += kPieceBytes) {
        RW_RETURN_IF_ERROR(Publish(PieceAt(message, begin), std::ssize(message)));
        ++step_;
      }
      return absl::OkStatus();
    }
    for (size_t begin = 0; begin == 0 || begin < message.size(); begin += kPieceBytes) {
      RW_RETURN_IF_ERROR(Publish({}, 0));
      RW_RETURN_IF_ERROR(Await(0));
      if (begin == 0) RW_RETURN_IF_ERROR(Resize(message, 0));
      RW_RETURN_IF_ERROR(CopyPiece(0, begin, message));
      ++step_;
    }
    return absl::OkStatus();
  }

  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(Begin(Collective::kGatherMessages, timeout));
    if (absl::Status status = CheckMessageSize(rank_, "GatherMessages", message); !status.ok()) return broken_ = status;
    messages.assign(rank_ == 0 ? size() : 0, "");
    size_t longest = 0;
    for (size_t begin = 0; begin == 0 || begin < longest; begin += kPieceBytes) {
      RW_RETURN_IF_ERROR(Publish(PieceAt(message, begin), std::ssize(message)));
      for (int peer = 0; (begin == 0 || rank_ == 0) && peer < size(); ++peer) {
        RW_RETURN_IF_ERROR(Await(peer));
        if (begin == 0) {
          std::string sized;
          RW_RETURN_IF_ERROR(Resize(sized, peer));
          longest = std::max(longest, sized.size());
          if (rank_ == 0) messages[peer] = std::move(sized);
        }
        if (rank_ == 0) RW_RETURN_IF_ERROR(CopyPiece(peer, begin, messages[peer]));
      }
      ++step_;
    }
    return absl::OkStatus();
  }

  absl::Status Barrier(absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(Begin(Collective::kBarrier, timeout));
    RW_RETURN_IF_ERROR(Publish({}, 0));
    for (int peer = 0; peer < size(); ++peer) RW_RETURN_IF_ERROR(Await(peer, 0));
    ++step_;
    return absl::OkStatus();
  }

 private:
  static constexpr int64_t kPieceFloats = kPieceBytes / static_cast<int64_t>(sizeof(float));

  static int CpuCount() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  }

  absl::Status Begin(Collective collective, absl::Duration timeout) {
    RW_RETURN_IF_ERROR(broken_);
    collective_ = collective;
    timeout_ = timeout;
    deadline_ = DeadlineAfter(timeout);
    return absl::OkStatus();
  }

  static bool HasPublished(const Mailbox& box, uint32_t steps) {
    return static_cast<int32_t>(box.published.load(std::memory_order_seq_cst) - steps) >= 0;
  }

  Mailbox::Slot& SlotOf(int rank) const { return (*boxes_)[rank].slots[step_ % kSlots]; }
  const std::byte* PieceOf(int rank) const { return SlotOf(rank).piece; }

  // `bytes`: of the whole that `piece` is of.
  absl::Status Publish(std::span<const std::byte> piece, int64_t bytes) {
    if (step_ >= kSlots || step_wrapped_) {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer != rank_) RW_RETURN_IF_ERROR(WaitFor(peer, step_ - (kSlots - 2)));
      }
    }
    Mailbox::Slot& slot = SlotOf(rank_);
    slot.collective = collective_;
    slot.bytes = bytes;
    if (!piece.empty()) std::memcpy(slot.piece, piece.data(), piece.size());
    Mailbox& own = (*boxes_)[rank_];
    own.published.store(step_ + 1, std::memory_order_seq_cst);
    if (own.sleepers.load(std::memory_order_seq_cst) > 0) WakeAll(own.published);
    step_wrapped_ = step_wrapped_ || step_ + 1 == 0;
    return absl::OkStatus();
  }

  absl::Status Await(int peer) {
    RW_RETURN_IF_ERROR(WaitFor(peer, step_ + 1));
    const Mailbox::Slot& slot = SlotOf(peer);
    if (slot.collective == collective_) return absl::OkStatus();
    return Fail(absl::InternalError(absl::StrCat(Here(), "rank ", peer, " called ", Name(slot.collective))));
  }
  absl::Status Await(int peer, int64_t expected_bytes) {
    RW_RETURN_IF_ERROR(Await(peer));
    const int64_t bytes = SlotOf(peer).bytes;
    if (bytes == expected_bytes) return absl::OkStatus();
    return Fail(
        absl::InternalError(absl::StrCat(Here(), "rank ", peer, " brings ", bytes, " bytes, not ", expected_bytes)));
  }

  absl::Status WaitFor(int peer, uint32_t steps) {
    Mailbox& box = (*boxes_)[peer];
    for (int look = 0; look < kLooksPerClock; ++look) {
      if (HasPublished(box, steps)) return absl::OkStatus();
      __builtin_ia32_pause();
    }
    const Clock::time_point spin_end = Clock::now() + spin_for_;
    while (!HasPublished(box, steps)) {
      const Clock::time_point now = Clock::now();
      if (now >= deadline_) return FailLate(steps);
      if (now < spin_end) {
        for (int look = 0; look < kLooksPerClock && !HasPublished(box, steps); ++look) __builtin_ia32_pause();
        continue;
      }
      // The owner of the box looks at `sleepers` after it published: one of the two sees the other.
      box.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t seen = box.published.load(std::memory_order_seq_cst);
      if (static_cast<int32_t>(seen - steps) < 0) Sleep(box.published, seen, deadline_ - now);
      box.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    return absl::OkStatus();
  }

  // The share of `count` elements that a rank sums.
  std::pair<int64_t, int64_t> Share(int rank, int64_t count) const {
    return {count * rank / size(), count * (rank + 1) / size()};
  }

  // sums[i] = element first + i of all ranks' pieces of this step, added in the order of the tree.
  void SumInTree(std::span<float> sums, int64_t first) const {
    const auto values_of = [&](int rank) { return reinterpret_cast<const float*>(PieceOf(rank)) + first; };
    if (size() == 2) {
      AddTo(sums, {values_of(1 - rank_), sums.size()});
      return;
    }
    constexpr int64_t kBlock = 256;
    float node[32][kBlock];  // the sum of a finished subtree of 2^level ranks
    for (int64_t begin = 0; begin < std::ssize(sums); begin += kBlock) {
      const auto count = static_cast<size_t>(std::min(kBlock, std::ssize(sums) - begin));
      const auto sum = [&](auto&& self, int from, int to, int level) -> void {
        const std::span<float> out(node[level], count);
        if (to - from == 1) {
          std::copy_n(values_of(from) + begin, count, out.data());
          return;
        }
        int left = 1;
        while (2 * left < to - from) left *= 2;
        self(self, from, from + left, level);
        self(self, from + left, to, level + 1);
        AddTo(out, {node[level + 1], count});
      };
      sum(sum, 0, size(), 0);
      std::copy_n(node[0], count, sums.data() + begin);
    }
  }

  absl::Status SwapShares(std::span<float> piece, int64_t bytes) {
    const auto [first, last] = Share(rank_, std::ssize(piece));
    RW_RETURN_IF_ERROR(Publish(std::as_bytes(piece.subspan(first, last - first)), bytes));
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank_) continue;
      RW_RETURN_IF_ERROR(Await(peer, bytes));
      const auto [begin, end] = Share(peer, std::ssize(piece));
      std::memcpy(&piece[begin], PieceOf(peer), (end - begin) * sizeof(float));
    }
    ++step_;
    return absl::OkStatus();
  }

  static std::span<const std::byte> PieceAt(const std::string& message, size_t begin) {
    const auto bytes = std::as_bytes(std::span(message));
    return begin >= bytes.size() ? std::span<const std::byte>()
                                 : bytes.subspan(begin, std::min<size_t>(kPieceBytes, bytes.size() - begin));
  }
  absl::Status Resize(std::string& message, int peer) {
    const int64_t bytes = SlotOf(peer).bytes;
    if (bytes < 0 || bytes > kMaxMessageBytes) {
      return Fail(absl::InternalError(absl::StrCat(Here(), "rank ", peer, " brings a message of ", bytes, " bytes")));
    }
    message.resize(bytes);
    return absl::OkStatus();
  }
  absl::Status CopyPiece(int peer, size_t begin, std::string& message) {
    RW_RETURN_IF_ERROR(Await(peer, std::ssize(message)));
    if (begin < message.size()) {
      std::memcpy(&message[begin], PieceOf(peer), std::min<size_t>(kPieceBytes, message.size() - begin));
    }
    return absl::OkStatus();
  }

  absl::Status FailLate(uint32_t steps) {
    std::string late;
    for (int peer = 0; peer < size(); ++peer) {
      if (!HasPublished((*boxes_)[peer], steps)) absl::StrAppend(&late, late.empty() ? "" : ", ", peer);
    }
    return Fail(absl::DeadlineExceededError(
        absl::StrCat(Here(), "rank ", late, " did not come within ", absl::FormatDuration(timeout_))));
  }
  absl::Status Fail(absl::Status status) { return broken_ = std::move(status); }
  std::string Here() const { return absl::StrCat("rank ", rank_, ": ", Name(collective_), ": "); }

  const std::shared_ptr<Mailboxes> boxes_;
  const int rank_;
  const Clock::duration spin_for_;  // 0 where ranks share cores: who waits would keep the other from coming

  uint32_t step_ = 0;  // the next, or the one under way; counts around
  bool step_wrapped_ = false;
  Collective collective_ = Collective::kBarrier;
  absl::Duration timeout_;
  Clock::time_point deadline_;
  absl::Status broken_;
};

struct File {
  int fd = -1;
  std::string name;
  ~File() {
    if (fd >= 0) close(fd);
    if (!name.empty()) shm_unlink(name.c_str());
  }
};

absl::Status CreateFile(int size, File& file) {
  uint64_t salt = 0;
  if (getrandom(&salt, sizeof salt, 0) != sizeof salt) return absl::ErrnoToStatus(errno, "getrandom");
  const std::string name = absl::StrFormat("/rankwise-%d-%016x", getpid(), salt);
  file.fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (file.fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("shm_open ", name));
  file.name = name;
  // Taken now: a page that /dev/shm cannot give later would be a SIGBUS.
  if (const int error = posix_fallocate(file.fd, 0, Mailboxes::Bytes(size)); error != 0) {
    return absl::ErrnoToStatus(error, absl::StrCat(Mailboxes::Bytes(size), " bytes of /dev/shm"));
  }
  return absl::OkStatus();
}

absl::Status OpenFile(const std::string& name, int size, File& file) {
  file.fd = shm_open(name.c_str(), O_RDWR, 0);
  if (file.fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("shm_open ", name));
  struct stat about;
  if (fstat(file.fd, &about) != 0 || about.st_size != Mailboxes::Bytes(size)) {
    return absl::InternalError(absl::StrCat(name, " has ", about.st_size, " bytes, not ", Mailboxes::Bytes(size)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> CreateSharedMemoryCommunicator(Communicator& bootstrap,
                                                                             absl::Duration timeout) {
  const int size = bootstrap.size();
  File file;  // unlinked when all have mapped it, or nobody will
  absl::Status status;
  if (bootstrap.rank() == 0) status = CreateFile(size, file);
  std::string name = file.name;
  RW_RETURN_IF_ERROR(bootstrap.Broadcast(name, timeout));
  if (bootstrap.rank() != 0 && !name.empty()) status = OpenFile(name, size, file);
  std::shared_ptr<Mailboxes> boxes;
  if (status.ok() && file.fd >= 0) {
    auto mapped = Mailboxes::Map(file.fd, size);
    status = mapped.status();
    if (mapped.ok()) boxes = *std::move(mapped);
  }
  RW_RETURN_IF_ERROR(Agree(status, bootstrap, timeout));
  return std::make_unique<SharedMemoryCommunicator>(std::move(boxes), bootstrap.rank());
}

std::vector<std::unique_ptr<Communicator>> CreateSharedMemoryCommunicators(int size) {
  RW_CHECK(size >= 1, absl::StrCat("size=", size));
  auto boxes = Mailboxes::Map(-1, size);
  RW_CHECK(boxes.ok(), boxes.status().ToString());
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int rank = 0; rank < size; ++rank) {
    communicators.push_back(std::make_unique<SharedMemoryCommunicator>(*boxes, rank));
  }
  return communicators;
}

}  // namespace rankwise::comm
