#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace rankwise::comm {

// What a communicator of a device does there as work of the device's stream alone, beside its sums: everything is in
// memory of the rank's device, and is issued when a call returns.
class StreamCollectives {
 public:
  // all [row_count, Σ widths] = [rank 0's columns | rank 1's | ...], each rank's part being [row_count, widths[rank]];
  // on a rank that does not want them `all` is empty.
  virtual absl::Status GatherColumns(std::span<const float> part, std::span<const int64_t> widths, int64_t row_count,
                                     std::span<float> all, absl::Duration timeout) = 0;
  // Rank 0's values become everybody's, as bits.
  virtual absl::Status Share(std::span<float> values, absl::Duration timeout) = 0;
  // Until `has_come` says so, as Communicator::Wait. Not collective.
  virtual absl::Status WaitUntil(const std::function<absl::StatusOr<bool>()>& has_come, absl::Duration timeout) = 0;

 protected:
  ~StreamCollectives() = default;
};

// The ranks of one group acting as one. Every method is collective: all ranks call the same methods in the same order
// with the same sizes. One thread per rank calls it.
//
// Errors: DeadlineExceeded naming a waiting rank and the collective when a peer did not come in time; Internal when the
// transport failed or the ranks did not call the same; InvalidArgument for a message over kMaxMessageBytes. After any
// error the communicator is broken and every later call returns that error: the group ends.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string Description() const = 0;  // "mpi, 2 ranks"

  // What the calls that follow belong to: for the words of whoever watches. Not collective.
  virtual void EnterStep(uint64_t /*step*/) {}

  // values [count] of every rank become their sum over ranks. Order of the additions, element by element: the sum of n
  // > 1 ranks is the sum of the first p plus the sum of the others, with p the largest power of two below n. So 2, 4, 8
  // ranks make a balanced binary tree, ((r0 + r1) + (r2 + r3)) + ..., and 5, 6, 7 the one of 8 in which a subtree
  // without ranks adds nothing. The bits (of a NaN: that it is one) are the same on all ranks, in every run, and for
  // every count.
  //
  // `values` is in the memory of the rank's device. A communicator of a device may return before the sum is made, which
  // then comes in the order of the device's stream; an error on the way there is the next call's.
  virtual absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) = 0;

  // Not null where sums of several ranks are work of a device's stream alone, which can be recorded there and done
  // again (Backend::Repeat). Lives as long as the communicator.
  virtual StreamCollectives* on_stream() { return nullptr; }

  // Until all sums called for are made, and all else that this rank's device was given before. Not collective. To be
  // called before anything else waits for the device, which a lost peer would make endless: this call has a deadline.
  virtual absl::Status Wait(absl::Duration /*timeout*/) { return absl::OkStatus(); }

  // Rank 0's `all` becomes rank r's `part` at offset Σ_{i<r} part_counts[i]. `all` is empty on other ranks.
  virtual absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                              absl::Duration timeout) = 0;

  // `message` of rank 0 becomes everybody's. At most `kMaxMessageBytes`. The others may wait long: after a short spin
  // they sleep between looks, so that an idle group costs under 3 % of a core.
  virtual absl::Status Broadcast(std::string& message, absl::Duration timeout) = 0;
  static constexpr int64_t kMaxMessageBytes = int64_t{64} << 20;

  // Rank 0's `messages` becomes every rank's `message`, in rank order; empty on the others.
  virtual absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                                      absl::Duration timeout) = 0;

  virtual absl::Status Barrier(absl::Duration timeout) = 0;
};

// One rank alone: every collective is the identity.
std::unique_ptr<Communicator> CreateSoloCommunicator();

// `size` communicators for threads of one process, rank i at index i. For tests and for one-process groups.
std::vector<std::unique_ptr<Communicator>> CreateThreadCommunicators(int size);

}  // namespace rankwise::comm
