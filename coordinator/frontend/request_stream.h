#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/frontend/sample_stream.h"
#include "coordinator/journal/journal.h"

namespace rankwise::frontend {

// Who carries a stream to a client. Called with the stream's lock held: it may not call the stream.
class StreamReader {
 public:
  virtual ~StreamReader() = default;
  // One at a time: the next comes after RequestStream::OnWritten.
  virtual void StartWriting(rankwise::v1::GenerateResponse piece) = 0;
  // No call follows.
  virtual void EndStream(const absl::Status& status) = 0;
};

// One accepted request: what its samples have said so far, and at most one reader that gets it. A request that lingers
// keeps all of it, so that a later reader can have it from any token on; the others keep what is not yet written.
// Thread-safe. Lock order: cluster, stream, reader.
class RequestStream final : public cluster::SampleListener {
 public:
  struct Options {
    rankwise::v1::GenerateRequest request;  // with request_id and seed
    uint32_t prompt_tokens = 0;
    const text::Tokenizer* tokenizer = nullptr;  // null: token ids only
    journal::Journal* journal = nullptr;         // of a request that lingers; null: none. Must outlive the stream.
    absl::Time started;
  };
  // InvalidArgument for stop strings that cannot be.
  static absl::StatusOr<std::shared_ptr<RequestStream>> Create(Options options);

  const std::string& request_id() const { return options_.request.request_id(); }
  const rankwise::v1::GenerateRequest& request() const { return options_.request; }
  absl::Time started() const { return options_.started; }
  absl::Duration linger() const { return absl::Milliseconds(options_.request.linger_ms()); }
  bool lingers() const { return options_.request.linger_ms() > 0; }
  // Whether `request` asks for what this stream gives.
  bool IsOf(const rankwise::v1::GenerateRequest& request) const;

  // Gives `reader`, until it is detached or told the end, what follows the offsets. An earlier reader is told ABORTED.
  void Attach(StreamReader* reader, const rankwise::v1::Resume& resume);
  // Idempotent.
  void Detach(StreamReader* reader, absl::Time now);
  void OnWritten(StreamReader* reader);

  // Of the request in the cluster; 0 before it is submitted.
  cluster::RequestKey key() const { return key_; }
  void set_key(cluster::RequestKey key) { key_ = key; }

  // What a journal kept, before anything else. Returns what the cluster has to know of each sample.
  std::vector<cluster::Delivered> Restore(const std::vector<worker::v1::SequenceOutput>& samples);

  struct State {
    bool is_over = false;  // every sample has ended, or the request has failed
    bool has_failed = false;
    bool is_read = false;  // it has a reader
    absl::Time unread_since;
    size_t bytes = 0;  // of what is kept
  };
  State state() const;

  bool OnOutput(uint32_t sample, const worker::v1::SequenceOutput& output, uint32_t replays) override;
  void OnEnd(uint32_t sample, cluster::Ending ending, uint32_t replays) override;
  void OnFailed(const absl::Status& status) override;

 private:
  struct Sample {
    explicit Sample(SampleStream stream) : stream(std::move(stream)) {}
    SampleStream stream;
    worker::v1::SequenceOutput kept;  // all outputs in one, of a request that lingers
    uint32_t replays = 0;
    bool is_over = false;
    bool is_ready = false;  // in ready_
  };

  explicit RequestStream(Options options);
  absl::StatusOr<SampleStream> MakeStream(uint32_t index, uint32_t skipped_tokens) const;
  bool TakeKept(Sample& sample, SampleStream& stream) const;
  void Keep(uint32_t index, const worker::v1::SequenceOutput& output) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Ready(uint32_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  std::atomic<cluster::RequestKey> key_{};

  mutable absl::Mutex mutex_;
  std::vector<Sample> samples_ ABSL_GUARDED_BY(mutex_);
  std::deque<uint32_t> ready_ ABSL_GUARDED_BY(mutex_);  // samples with a piece, each once, in turn
  size_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status ending_ ABSL_GUARDED_BY(mutex_);  // once nothing is unfinished and all is written
  StreamReader* reader_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time unread_since_ ABSL_GUARDED_BY(mutex_);
  size_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace rankwise::frontend
