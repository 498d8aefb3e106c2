#include "worker/comm/mpi_communicator.h"

#include <mpi.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/comm/collective.h"
#include "worker/comm/pacer.h"
#include "worker/comm/packet.h"
#include "worker/comm/preconditions.h"
#include "worker/comm/shared_memory_communicator.h"
#include "worker/comm/sum.h"

namespace rankwise::comm {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);
constexpr absl::Duration kFinishTimeout = absl::Seconds(30);

// From this size on, an all-reduce moves fewer bytes in more steps. Measured on 2 cores of an EPYC, Open MPI 4.1.4,
// shared memory: at 256 KiB 4 ranks gain a third to a half, 2 ranks gain nothing and lose nothing.
constexpr int64_t kHalvingBytes = 64 << 10;

// Up to this size, values travel in pieces that shared memory takes without asking the receiver (Packet is of that
// size). Same machine, 2 ranks: 4 KiB in 1.5 us instead of 5.7, 16 KiB in 6.3 instead of 8.7, 32 KiB no gain.
constexpr int64_t kPiecesBytes = 16 << 10;
constexpr int64_t kPieceFloats = sizeof(Packet) / sizeof(float);

std::string MpiError(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return absl::StrCat("MPI error ", code);
  return std::string(text, length);
}

// Polls one request of a collective that has no peer to name. False when it is still under way at the deadline.
absl::StatusOr<bool> Complete(MPI_Request& request, absl::Duration timeout) {
  Pacer pacer(DeadlineAfter(timeout));
  while (true) {
    int done = 0;
    if (int code = MPI_Test(&request, &done, MPI_STATUS_IGNORE); code != MPI_SUCCESS) {
      return absl::InternalError(MpiError(code));
    }
    if (done) return true;
    if (!pacer.Pause()) return false;
  }
}

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MPI_Comm comm, int rank, int size)
      : comm_(comm), rank_(rank), size_(size), buffers_(std::make_unique<Buffers>()), packet_bytes_(size) {
    buffers_->packets.resize(size);
  }

  // Never MPI_Comm_free: a peer may still send for a call that this rank left, and the next communicator would get it.
  ~MpiCommunicator() override {
    if (!requests_.empty()) buffers_.release();  // MPI may still write to them.
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string Description() const override { return absl::StrCat("mpi, ", size_, size_ == 1 ? " rank" : " ranks"); }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override;
  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override;
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override;
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override;
  absl::Status Barrier(absl::Duration timeout) override;

 private:
  // What MPI writes to and reads from, apart from the arguments of a call.
  struct Buffers {
    std::vector<float> scratch;   // A peer's values; as large as the largest all-reduce so far.
    std::vector<Packet> packets;  // [size] the outgoing one at rank(), incoming ones at the peer's rank
    std::string inbox;
  };
  struct Transfer {
    int peer;
    int64_t expected_bytes;   // of a receive
    int64_t* received_bytes;  // Instead, where the peer decides.
    bool is_receive;
  };

  absl::Status Begin(Collective collective, absl::Duration timeout);
  absl::Status SumByDoubling(std::span<float> values);
  absl::Status SumByHalving(std::span<float> values, int distance);

  // Send and Receive only post; Wait completes all that was posted, and has its errors.
  void Send(const void* data, int64_t bytes, int peer);
  void Receive(void* data, int64_t bytes, int peer) { Receive(data, bytes, nullptr, peer); }
  void Receive(void* data, int64_t bytes_max, int64_t* received_bytes, int peer);
  void SendValues(std::span<const float> values, int peer);
  void ReceiveValues(std::span<float> values, int peer);
  absl::Status Wait();
  absl::Status CheckReceived();

  absl::Status Pack(const std::string& message);
  void SendPacked(const std::string& message, int peer);
  void ReceivePacket(int peer) { Receive(&buffers_->packets[peer], sizeof(Packet), &packet_bytes_[peer], peer); }
  // Sizes `message`, fills in what the packet has of it and posts the receive of the rest.
  absl::Status Unpack(int peer, std::string& message);

  absl::Status Fail(absl::Status status);
  absl::Status FailLate();
  std::string Here() const { return absl::StrCat("rank ", rank_, ": ", Name(collective_), ": "); }

  const MPI_Comm comm_;
  const int rank_;
  const int size_;
  std::unique_ptr<Buffers> buffers_;
  std::vector<int64_t> packet_bytes_;  // [size]

  Collective collective_ = Collective::kBarrier;
  absl::Duration timeout_;
  Clock::time_point deadline_;
  int tag_ = 0;
  int64_t calls_ = 0;
  absl::Status broken_;

  std::vector<Transfer> transfers_;    // posted since the last Wait
  std::vector<MPI_Request> requests_;  // of transfers_
  std::vector<MPI_Status> statuses_;   // of requests_
  int post_error_ = MPI_SUCCESS;
};

absl::Status MpiCommunicator::AllReduceSum(std::span<float> values, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin(Collective::kAllReduceSum, timeout));
  if (buffers_->scratch.size() < values.size()) buffers_->scratch.resize(values.size());
  const bool can_halve = std::has_single_bit(static_cast<unsigned>(size_));
  return can_halve && std::ssize(values) * kFloatBytes >= kHalvingBytes ? SumByHalving(values, 1)
                                                                        : SumByDoubling(values);
}

// One level of the tree per turn. At a node, each rank of one side needs the sum of the other side, which all ranks
// there hold: equal positions swap, and a right side with fewer ranks serves the left ones in turn.
absl::Status MpiCommunicator::SumByDoubling(std::span<float> values) {
  const std::span<float> scratch = std::span(buffers_->scratch).first(values.size());
  for (int distance = 1; distance < size_; distance *= 2) {
    const int first = rank_ - rank_ % (2 * distance);
    const int middle = first + distance;
    if (middle >= size_) continue;
    const int right_count = std::min(distance, size_ - middle);
    if (rank_ < middle) {
      const int position = rank_ - first;
      ReceiveValues(scratch, middle + position % right_count);
      if (position < right_count) SendValues(values, middle + position);
    } else {
      const int position = rank_ - middle;
      ReceiveValues(scratch, first + position);
      for (int left = position; left < distance; left += right_count) SendValues(values, first + left);
    }
    RW_RETURN_IF_ERROR(Wait());
    AddTo(values, scratch);  // Left + right here is right + left there: the same bits.
  }
  return absl::OkStatus();
}

// The same tree for 2^k ranks. The two partners of a level split `values`: each sums one half, on this and the further
// levels, and then they swap the sums.
absl::Status MpiCommunicator::SumByHalving(std::span<float> values, int distance) {
  if (distance == size_) return absl::OkStatus();
  const int partner = rank_ ^ distance;
  std::span<float> mine = values.first(values.size() / 2);
  std::span<float> theirs = values.subspan(values.size() / 2);
  if (partner < rank_) std::swap(mine, theirs);

  const std::span<float> scratch = std::span(buffers_->scratch).first(mine.size());
  ReceiveValues(scratch, partner);
  SendValues(theirs, partner);
  RW_RETURN_IF_ERROR(Wait());
  AddTo(mine, scratch);

  RW_RETURN_IF_ERROR(SumByHalving(mine, 2 * distance));
  ReceiveValues(theirs, partner);
  SendValues(mine, partner);
  return Wait();
}

absl::Status MpiCommunicator::Gather(std::span<const float> part, std::span<const int64_t> part_counts,
                                     std::span<float> all, absl::Duration timeout) {
  CheckGatherShape(rank_, size_, part, part_counts, all);
  RW_RETURN_IF_ERROR(Begin(Collective::kGather, timeout));
  if (rank_ != 0) {
    Send(part.data(), static_cast<int64_t>(part.size_bytes()), 0);
    return Wait();
  }
  float* out = std::ranges::copy(part, all.data()).out;
  for (int peer = 1; peer < size_; ++peer) {
    Receive(out, part_counts[peer] * kFloatBytes, peer);
    out += part_counts[peer];
  }
  return Wait();
}

// Rank 0 sends to each rank itself: on a tree, the pauses of the ranks on a path would add up.
absl::Status MpiCommunicator::Broadcast(std::string& message, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin(Collective::kBroadcast, timeout));
  if (rank_ == 0) {
    RW_RETURN_IF_ERROR(Pack(message));
    for (int peer = 1; peer < size_; ++peer) SendPacked(message, peer);
    return Wait();
  }
  ReceivePacket(0);
  RW_RETURN_IF_ERROR(Wait());
  RW_RETURN_IF_ERROR(Unpack(0, buffers_->inbox));
  RW_RETURN_IF_ERROR(Wait());
  message.swap(buffers_->inbox);
  return absl::OkStatus();
}

absl::Status MpiCommunicator::GatherMessages(const std::string& message, std::vector<std::string>& messages,
                                             absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin(Collective::kGatherMessages, timeout));
  RW_RETURN_IF_ERROR(Pack(message));
  if (rank_ != 0) {
    messages.clear();
    SendPacked(message, 0);
    return Wait();
  }
  messages.assign(size_, "");
  messages[0] = message;
  for (int peer = 1; peer < size_; ++peer) ReceivePacket(peer);
  RW_RETURN_IF_ERROR(Wait());
  for (int peer = 1; peer < size_; ++peer) RW_RETURN_IF_ERROR(Unpack(peer, messages[peer]));
  return Wait();
}

absl::Status MpiCommunicator::Barrier(absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin(Collective::kBarrier, timeout));
  // After the turn of distance d a rank knows that the 2d ranks up to itself are here.
  for (int distance = 1; distance < size_; distance *= 2) {
    Receive(nullptr, 0, (rank_ - distance + size_) % size_);
    Send(nullptr, 0, (rank_ + distance) % size_);
    RW_RETURN_IF_ERROR(Wait());
  }
  return absl::OkStatus();
}

absl::Status MpiCommunicator::Begin(Collective collective, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(broken_);
  collective_ = collective;
  timeout_ = timeout;
  deadline_ = DeadlineAfter(timeout);
  // With the number of the call in the tag, what was sent for an abandoned call is never taken for a part of a later
  // one. MPI promises tags up to 32767.
  tag_ = static_cast<int>(++calls_ % 4096) * 8 + static_cast<int>(collective);
  return absl::OkStatus();
}

void MpiCommunicator::Send(const void* data, int64_t bytes, int peer) {
  RW_CHECK(bytes <= INT_MAX, absl::StrCat("bytes=", bytes));
  transfers_.push_back({.peer = peer, .expected_bytes = 0, .received_bytes = nullptr, .is_receive = false});
  requests_.push_back(MPI_REQUEST_NULL);
  const int code = MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag_, comm_, &requests_.back());
  if (code != MPI_SUCCESS) post_error_ = code;
}

void MpiCommunicator::Receive(void* data, int64_t bytes_max, int64_t* received_bytes, int peer) {
  RW_CHECK(bytes_max <= INT_MAX, absl::StrCat("bytes=", bytes_max));
  transfers_.push_back(
      {.peer = peer, .expected_bytes = bytes_max, .received_bytes = received_bytes, .is_receive = true});
  requests_.push_back(MPI_REQUEST_NULL);
  const int code = MPI_Irecv(data, static_cast<int>(bytes_max), MPI_BYTE, peer, tag_, comm_, &requests_.back());
  if (code != MPI_SUCCESS) post_error_ = code;
}

int64_t PieceFloats(std::span<const float> values) {
  return std::ssize(values) * kFloatBytes <= kPiecesBytes ? kPieceFloats : std::ssize(values);
}

void MpiCommunicator::SendValues(std::span<const float> values, int peer) {
  const int64_t piece = PieceFloats(values);
  for (int64_t i = 0; i < std::ssize(values); i += piece) {
    Send(&values[i], std::min(piece, std::ssize(values) - i) * kFloatBytes, peer);
  }
}

void MpiCommunicator::ReceiveValues(std::span<float> values, int peer) {
  const int64_t piece = PieceFloats(values);
  for (int64_t i = 0; i < std::ssize(values); i += piece) {
    Receive(&values[i], std::min(piece, std::ssize(values) - i) * kFloatBytes, peer);
  }
}

absl::Status MpiCommunicator::Wait() {
  if (statuses_.size() < requests_.size()) statuses_.resize(requests_.size());
  Pacer pacer(deadline_);
  int done = 0;
  while (!done) {
    int code = post_error_;
    // Two looks: Testall of Open MPI 4.1 tells what it knew before it polled.
    for (int look = 0; look < 2 && code == MPI_SUCCESS && !done; ++look) {
      code = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, statuses_.data());
    }
    for (size_t i = 0; code == MPI_ERR_IN_STATUS && i < requests_.size(); ++i) {
      if (statuses_[i].MPI_ERROR != MPI_ERR_PENDING && statuses_[i].MPI_ERROR != MPI_SUCCESS) {
        code = statuses_[i].MPI_ERROR;
      }
    }
    if (code != MPI_SUCCESS) return Fail(absl::InternalError(absl::StrCat(Here(), MpiError(code))));
    if (!done && !pacer.Pause()) return FailLate();
  }
  return CheckReceived();
}

absl::Status MpiCommunicator::CheckReceived() {
  for (size_t i = 0; i < transfers_.size(); ++i) {
    const Transfer& transfer = transfers_[i];
    if (!transfer.is_receive) continue;
    int bytes = 0;
    MPI_Get_count(&statuses_[i], MPI_BYTE, &bytes);
    if (transfer.received_bytes != nullptr) {
      *transfer.received_bytes = bytes;
    } else if (bytes != transfer.expected_bytes) {
      return Fail(absl::InternalError(
          absl::StrCat(Here(), "rank ", transfer.peer, " sent ", bytes, " bytes, not ", transfer.expected_bytes)));
    }
  }
  transfers_.clear();
  requests_.clear();
  return absl::OkStatus();
}

absl::Status MpiCommunicator::Pack(const std::string& message) {
  if (absl::Status status = CheckMessageSize(rank_, Name(collective_), message); !status.ok()) return Fail(status);
  Packet& packet = buffers_->packets[rank_];
  packet.message_bytes = std::ssize(message);
  std::copy_n(message.data(), packet.head_bytes(), packet.head);
  return absl::OkStatus();
}

void MpiCommunicator::SendPacked(const std::string& message, int peer) {
  const Packet& packet = buffers_->packets[rank_];
  Send(&packet, packet.bytes(), peer);
  if (const int64_t rest_bytes = packet.message_bytes - packet.head_bytes(); rest_bytes > 0) {
    Send(message.data() + packet.head_bytes(), rest_bytes, peer);
  }
}

absl::Status MpiCommunicator::Unpack(int peer, std::string& message) {
  const Packet& packet = buffers_->packets[peer];
  const absl::StatusOr<int64_t> message_bytes = MessageBytes(packet, packet_bytes_[peer]);
  if (!message_bytes.ok()) {
    return Fail(absl::InternalError(absl::StrCat(Here(), "rank ", peer, ": ", message_bytes.status().message())));
  }
  message.resize(*message_bytes);
  std::copy_n(packet.head, packet.head_bytes(), message.data());
  if (const int64_t rest_bytes = *message_bytes - packet.head_bytes(); rest_bytes > 0) {
    Receive(message.data() + packet.head_bytes(), rest_bytes, peer);
  }
  return absl::OkStatus();
}

absl::Status MpiCommunicator::FailLate() {
  std::string late;
  for (size_t i = 0; i < requests_.size(); ++i) {
    int done = 0;
    if (MPI_Test(&requests_[i], &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done) continue;
    absl::StrAppend(&late, late.empty() ? "" : ", ", transfers_[i].peer);
  }
  return Fail(absl::DeadlineExceededError(
      absl::StrCat(Here(), "rank ", late, " did not come within ", absl::FormatDuration(timeout_))));
}

// Keeps in requests_ what MPI could not be made to let go of: Open MPI cancels a receive that nothing has arrived for,
// and nothing else.
absl::Status MpiCommunicator::Fail(absl::Status status) {
  for (size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL) continue;
    if (transfers_[i].is_receive) MPI_Cancel(&requests_[i]);
    int done = 0;
    MPI_Test(&requests_[i], &done, MPI_STATUS_IGNORE);
  }
  std::erase(requests_, MPI_REQUEST_NULL);
  return broken_ = std::move(status);
}

}  // namespace

absl::StatusOr<std::unique_ptr<MpiSession>> MpiSession::Start() {
  int provided = 0;
  if (int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided); code != MPI_SUCCESS) {
    return absl::InternalError(absl::StrCat("MPI_Init_thread: ", MpiError(code)));
  }
  std::unique_ptr<MpiSession> session(new MpiSession);
  if (provided < MPI_THREAD_MULTIPLE) {
    return absl::FailedPreconditionError(absl::StrCat("this MPI library offers thread level ", provided,
                                                      ", MPI_THREAD_MULTIPLE is ", MPI_THREAD_MULTIPLE));
  }
  MPI_Comm_rank(MPI_COMM_WORLD, &session->rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &session->size_);
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_rank(host, &session->host_rank_);
  MPI_Comm_size(host, &session->host_size_);
  MPI_Comm_free(&host);
  return session;
}

MpiSession::~MpiSession() {
  MPI_Request all_here = MPI_REQUEST_NULL;
  MPI_Ibarrier(MPI_COMM_WORLD, &all_here);
  if (absl::StatusOr<bool> done = Complete(all_here, kFinishTimeout); !done.ok() || !*done) {
    spdlog::error("rank {}: the other ranks did not finish within {}", rank_, absl::FormatDuration(kFinishTimeout));
    Abort(EXIT_FAILURE);
  }
  MPI_Finalize();
}

void MpiSession::Abort(int code) const {
  MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

absl::StatusOr<std::unique_ptr<Communicator>> CreateMpiCommunicator(const MpiSession& session, absl::Duration timeout) {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Request duplicated = MPI_REQUEST_NULL;
  if (int code = MPI_Comm_idup(MPI_COMM_WORLD, &comm, &duplicated); code != MPI_SUCCESS) {
    return absl::InternalError(absl::StrCat("MPI_Comm_idup: ", MpiError(code)));
  }
  RW_ASSIGN_OR_RETURN(const bool done, Complete(duplicated, timeout));
  if (!done) {
    return absl::DeadlineExceededError(absl::StrCat("rank ", session.rank(), ": CreateMpiCommunicator: not all of ",
                                                    session.size(), " ranks came within ",
                                                    absl::FormatDuration(timeout)));
  }
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  return std::make_unique<MpiCommunicator>(comm, session.rank(), session.size());
}

absl::StatusOr<std::unique_ptr<Communicator>> CreateGroupCommunicator(const MpiSession& session,
                                                                      absl::Duration timeout) {
  RW_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> mpi, CreateMpiCommunicator(session, timeout));
  if (session.host_size() != session.size() || session.size() == 1) return mpi;
  absl::StatusOr<std::unique_ptr<Communicator>> shared = CreateSharedMemoryCommunicator(*mpi, timeout);
  if (shared.ok()) return shared;
  if (absl::IsDeadlineExceeded(shared.status())) return shared.status();
  if (session.rank() == 0) spdlog::warn("no shared memory, so MPI: {}", std::string(shared.status().message()));
  return mpi;
}

}  // namespace rankwise::comm
