#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/comm/activity.h"

namespace rankwise::comm {

// What every rank tells the ranks that watch it, several times a second. Plain bytes.
struct Beat {
  ActivitySnapshot activity;
  uint32_t is_leaving = 0;  // the last one: the rank ends in good order
  char host[60] = {};       // ends with a zero
};

// Tells when a group of ranks has ceased to act as one. Rank 0 watches all ranks, the others watch rank 0: so each
// silence is noticed by somebody who can still speak. Two things are wrong: a rank from which nothing is heard
// (stopped, wedged, or behind a cut link), and, told by rank 0 alone, a group in which every rank waits in a collective
// and none gets on. A rank that computes, however long, is well; the deadlines of the collectives limit that.
//
// Pure: no thread, clock or socket of its own. `now` is any clock that does not jump.
class GroupWatch {
 public:
  GroupWatch(int rank, int size, absl::Duration patience, absl::Duration now);

  // The watched ranks: whose beats are wanted, and who wants ours.
  const std::vector<int>& peers() const { return peers_; }
  // `rank` is a peer or this rank itself.
  void Take(int rank, const Beat& beat, absl::Duration now);
  // DeadlineExceeded names the host, rank, step and collective of who is silent, or of all when they are stuck.
  absl::Status Check(absl::Duration now) const;

 private:
  struct Seen {
    Beat beat;
    absl::Duration heard;  // the latest beat
    absl::Duration moved;  // the latest beat that differed from the one before
  };

  std::string Describe(int rank) const;
  absl::Status CheckStuck(absl::Duration now) const;

  const int rank_;
  const absl::Duration patience_;
  std::vector<int> peers_;
  std::vector<Seen> seen_;  // [size]
};

}  // namespace rankwise::comm
