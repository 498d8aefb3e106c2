#include "worker/comm/group_watch.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::comm {

GroupWatch::GroupWatch(int rank, int size, absl::Duration patience, absl::Duration now)
    : rank_(rank), patience_(patience), seen_(size, Seen{.heard = now, .moved = now}) {
  if (rank > 0) peers_ = {0};
  for (int peer = 1; rank == 0 && peer < size; ++peer) peers_.push_back(peer);
}

void GroupWatch::Take(int rank, const Beat& beat, absl::Duration now) {
  Seen& seen = seen_.at(rank);
  const ActivitySnapshot &old = seen.beat.activity, &news = beat.activity;
  if (old.step != news.step || old.calls != news.calls || old.collective != news.collective) seen.moved = now;
  seen.beat = beat;
  seen.beat.host[sizeof(beat.host) - 1] = '\0';
  seen.heard = now;
}

absl::Status GroupWatch::Check(absl::Duration now) const {
  for (const int peer : peers_) {
    const Seen& seen = seen_[peer];
    if (seen.beat.is_leaving || now - seen.heard <= patience_) continue;
    return absl::DeadlineExceededError(
        absl::StrCat("nothing heard for ", absl::FormatDuration(absl::Trunc(now - seen.heard, absl::Milliseconds(1))),
                     " from ", Describe(peer), "; meanwhile ", Describe(rank_)));
  }
  return rank_ == 0 ? CheckStuck(now) : absl::OkStatus();
}

absl::Status GroupWatch::CheckStuck(absl::Duration now) const {
  const auto is_stuck = [&](const Seen& seen) {
    return seen.beat.activity.collective != Collective::kNone && now - seen.moved > patience_;
  };
  if (seen_.size() < 2 || !std::ranges::all_of(seen_, is_stuck)) return absl::OkStatus();
  std::string all;
  for (size_t rank = 0; rank < seen_.size(); ++rank) {
    absl::StrAppend(&all, rank == 0 ? "" : ", ", Describe(static_cast<int>(rank)));
  }
  return absl::DeadlineExceededError(absl::StrCat("every rank waits and none gets on: ", all));
}

std::string GroupWatch::Describe(int rank) const {
  const Beat& beat = seen_[rank].beat;
  return absl::StrCat("rank ", rank, " on ", beat.host[0] == '\0' ? "an unknown host" : beat.host, " (step ",
                      beat.activity.step, ", ", Name(beat.activity.collective), ", call ", beat.activity.calls, ")");
}

}  // namespace rankwise::comm
