#include "worker/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/kv_histogram.h"
#include "worker/model/rope_table.h"

namespace rankwise::model {
namespace {

using kernels::Backend;

// Rows whose logits are computed at once: enough for a whole decode batch to share one pass over the output matrix.
constexpr int32_t kLogitRows = 64;

kernels::SumTree OneChunk(int64_t n_in) { return {.boundaries = {0, n_in}}; }

}  // namespace

Decoder::Decoder(const weights::ModelConfig& config, const shard::ShardPlan& plan, Backend& backend,
                 comm::Communicator& communicator, const DecoderOptions& options)
    : config_(config),
      plan_(plan),
      options_(options),
      backend_(backend),
      communicator_(communicator),
      stream_(communicator.on_stream()),
      attention_{.n_heads_local = static_cast<int>(plan.heads.count()),
                 .n_kv_heads_local = static_cast<int>(plan.kv_heads.count()),
                 .head_dim = config.head_dim,
                 .score_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)))},
      rope_(MakeRopeTable(config.rope, options.max_positions)),
      final_norm_(nullptr, nullptr),
      x_(nullptr, nullptr),
      normed_(nullptr, nullptr),
      qkv_(nullptr, nullptr),
      attended_(nullptr, nullptr),
      delta_(nullptr, nullptr),
      gate_up_(nullptr, nullptr),
      activated_(nullptr, nullptr),
      picked_(nullptr, nullptr),
      logits_local_(nullptr, nullptr),
      logits_gathered_(nullptr, nullptr) {}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const weights::Checkpoint& checkpoint,
                                                         const shard::ShardPlan& plan, Backend& backend,
                                                         comm::Communicator& communicator,
                                                         const DecoderOptions& options) {
  RW_CHECK(plan.rank == communicator.rank() && plan.world_size == communicator.size());
  auto decoder = std::unique_ptr<Decoder>(new Decoder(checkpoint.config(), plan, backend, communicator, options));
  RW_RETURN_IF_ERROR(decoder->Load(checkpoint));
  RW_RETURN_IF_ERROR(decoder->TakeBuffers());
  const bool has_repeatable_sums = communicator.size() == 1 || decoder->stream_ != nullptr;
  if (has_repeatable_sums && !options.observes) {
    decoder->repeated_layers_ = backend.Repeat([raw = decoder.get()] { return raw->RunLayers(); });
  }
  if (decoder->has_whole_logits() && !options.observes) {
    for (auto& tokens : decoder->issued_tokens_) {
      RW_ASSIGN_OR_RETURN(tokens, backend.CreateDrawnTokens(options.max_rows));
    }
  }
  return decoder;
}

absl::StatusOr<Backend::Floats> Decoder::Upload(const std::vector<float>& host) {
  if (host.empty()) return Backend::Floats(nullptr, nullptr);
  RW_ASSIGN_OR_RETURN(Backend::Floats device, backend_.Allocate(static_cast<int64_t>(host.size())));
  RW_RETURN_IF_ERROR(backend_.CopyToDevice(host, device.get()));
  return device;
}

absl::Status Decoder::Load(const weights::Checkpoint& checkpoint) {
  const weights::OuterWeights outer = checkpoint.Outer(plan_);
  embedding_ = outer.embedding;
  RW_RETURN_IF_ERROR(backend_.KeepTable(embedding_));
  RW_ASSIGN_OR_RETURN(final_norm_, Upload(outer.final_norm));
  RW_ASSIGN_OR_RETURN(output_, backend_.Pack(std::span(&outer.output, 1), OneChunk(config_.hidden_size)));
  layers_.reserve(config_.n_layers);
  for (int i = 0; i < config_.n_layers; ++i) RW_RETURN_IF_ERROR(LoadLayer(checkpoint, i));

  const kernels::KvShape shape{.n_layers = config_.n_layers,
                               .n_kv_heads_local = attention_.n_kv_heads_local,
                               .head_dim = config_.head_dim,
                               .format = options_.kv_format};
  RW_ASSIGN_OR_RETURN(kv_pool_, backend_.CreateKvPool(shape, options_.block_count));
  if (options_.kv_format == kernels::KvFormat::kInt8) {
    RW_RETURN_IF_ERROR(backend_.SetKvScales(*kv_pool_, options_.kv_scales));
  }
  if (options_.observes) {
    const size_t count = static_cast<size_t>(attention_.n_kv_heads_local) * config_.head_dim;
    const std::vector<float> highest(count, std::numeric_limits<float>::infinity());
    const std::vector<float> lowest(count, -std::numeric_limits<float>::infinity());
    const std::vector<uint64_t> counts(static_cast<size_t>(attention_.n_kv_heads_local) * kernels::kHistogramBins);
    observations_.assign(config_.n_layers, {.k_min = highest,
                                            .k_max = lowest,
                                            .v_min = highest,
                                            .v_max = lowest,
                                            .k_histogram = counts,
                                            .v_histogram = counts});
    const std::vector<double> hidden(config_.hidden_size), heads(plan_.heads.count() * config_.head_dim),
        intermediate(plan_.intermediate.count());
    input_observations_.assign(config_.n_layers, {.qkv = hidden, .o = heads, .gate_up = hidden, .down = intermediate});
  }
  return absl::OkStatus();
}

absl::Status Decoder::LoadLayer(const weights::Checkpoint& checkpoint, int index) {
  const weights::LayerWeights source = checkpoint.Layer(index, plan_);
  const kernels::SumTree hidden = OneChunk(config_.hidden_size);
  const kernels::SumTree wo_tree{.boundaries = plan_.wo_boundaries};
  const kernels::SumTree w2_tree{.boundaries = plan_.w2_boundaries};
  RW_ASSIGN_OR_RETURN(auto attention_norm, Upload(source.attention_norm));
  RW_ASSIGN_OR_RETURN(auto mlp_norm, Upload(source.mlp_norm));
  RW_ASSIGN_OR_RETURN(auto qkv_bias, Upload(source.qkv_bias));
  RW_ASSIGN_OR_RETURN(auto q_norm, Upload(source.q_norm));
  RW_ASSIGN_OR_RETURN(auto k_norm, Upload(source.k_norm));
  RW_ASSIGN_OR_RETURN(auto wo_bias, Upload(source.wo_bias));
  RW_ASSIGN_OR_RETURN(auto gate_up_bias, Upload(source.gate_up_bias));
  RW_ASSIGN_OR_RETURN(auto w2_bias, Upload(source.w2_bias));
  RW_ASSIGN_OR_RETURN(auto qkv, backend_.Pack(source.qkv, hidden));
  RW_ASSIGN_OR_RETURN(auto wo, backend_.Pack(std::span(&source.wo, 1), wo_tree));
  RW_ASSIGN_OR_RETURN(auto gate_up, backend_.Pack(source.gate_up, hidden));
  RW_ASSIGN_OR_RETURN(auto w2, backend_.Pack(std::span(&source.w2, 1), w2_tree));
  layers_.push_back({.attention_norm = std::move(attention_norm),
                     .mlp_norm = std::move(mlp_norm),
                     .qkv_bias = std::move(qkv_bias),
                     .q_norm = std::move(q_norm),
                     .k_norm = std::move(k_norm),
                     .wo_bias = std::move(wo_bias),
                     .gate_up_bias = std::move(gate_up_bias),
                     .w2_bias = std::move(w2_bias),
                     .qkv = std::move(qkv),
                     .wo = std::move(wo),
                     .gate_up = std::move(gate_up),
                     .w2 = std::move(w2)});
  return absl::OkStatus();
}

absl::Status Decoder::TakeBuffers() {
  const int64_t rows = options_.max_rows;
  const int64_t heads_width = plan_.heads.count() * config_.head_dim;
  const int64_t qkv_width = heads_width + 2 * plan_.kv_heads.count() * config_.head_dim;
  RW_ASSIGN_OR_RETURN(x_, backend_.Allocate(rows * config_.hidden_size));
  RW_ASSIGN_OR_RETURN(normed_, backend_.Allocate(rows * config_.hidden_size));
  RW_ASSIGN_OR_RETURN(delta_, backend_.Allocate(rows * config_.hidden_size));
  RW_ASSIGN_OR_RETURN(qkv_, backend_.Allocate(rows * qkv_width));
  RW_ASSIGN_OR_RETURN(attended_, backend_.Allocate(rows * heads_width));
  RW_ASSIGN_OR_RETURN(gate_up_, backend_.Allocate(rows * 2 * plan_.intermediate.count()));
  RW_ASSIGN_OR_RETURN(activated_, backend_.Allocate(rows * plan_.intermediate.count()));
  RW_ASSIGN_OR_RETURN(picked_, backend_.Allocate(kLogitRows * config_.hidden_size));
  RW_ASSIGN_OR_RETURN(logits_local_, backend_.Allocate(kLogitRows * plan_.vocab.count()));
  if (!has_whole_logits()) part_.resize(kLogitRows * plan_.vocab.count());
  for (int rank = 0; rank < plan_.world_size; ++rank) {
    RW_ASSIGN_OR_RETURN(const shard::ShardPlan other,
                        shard::PlanShard(config_.dims(), {.rank = rank, .world_size = plan_.world_size}));
    vocab_counts_.push_back(other.vocab.count());
  }
  if (plan_.rank == 0) {
    logits_.resize(config_.vocab_size);
    if (plan_.world_size > 1 && has_whole_logits()) {
      RW_ASSIGN_OR_RETURN(logits_gathered_, backend_.Allocate(kLogitRows * config_.vocab_size));
    }
    if (!has_whole_logits()) {
      gathered_.resize(kLogitRows * config_.vocab_size);
      draw_.emplace(static_cast<int32_t>(config_.vocab_size));
    }
  }
  return absl::OkStatus();
}

int64_t Decoder::weight_bytes() const {
  int64_t bytes = output_->bytes();
  for (const Layer& layer : layers_) {
    bytes += layer.qkv->bytes() + layer.wo->bytes() + layer.gate_up->bytes() + layer.w2->bytes();
  }
  return bytes;
}

int64_t Decoder::multiply_adds() const {
  int64_t count = 0;
  for (const Layer& layer : layers_) {
    for (const auto* matrix : {layer.qkv.get(), layer.wo.get(), layer.gate_up.get(), layer.w2.get()}) {
      count += matrix->n_in() * matrix->n_out();
    }
  }
  return count;
}

int64_t Decoder::output_multiply_adds() const { return output_->n_in() * output_->n_out(); }

kernels::Activations Decoder::activations() const {
  for (const Layer& layer : layers_) {
    for (const auto* matrix : {layer.qkv.get(), layer.wo.get(), layer.gate_up.get(), layer.w2.get()}) {
      if (matrix->activations() != kernels::Activations::kFloat) return matrix->activations();
    }
  }
  return output_->activations();
}

absl::Status Decoder::Forward(const kernels::StepRows& rows, std::span<const int32_t> logit_rows, const RowSink& sink) {
  RW_CHECK(sink.rules.empty() || sink.rules.size() == logit_rows.size());
  RW_CHECK(uncollected_ == 0);
  // The last step's sums, when nobody asked for its logits: the backend itself would wait for them without a deadline.
  RW_RETURN_IF_ERROR(communicator_.Wait(options_.collective_timeout));
  rules_.clear();
  if (has_whole_logits()) {
    // Rows whose logits are taken are drawn from too, in the cheapest way.
    for (const auto& rule : sink.rules) rules_.push_back(rule.value_or(kernels::DrawRule{.temperature = 0}));
  }
  RW_RETURN_IF_ERROR(Compute(rows, logit_rows));
  RW_RETURN_IF_ERROR(EmitLogits(logit_rows, sink));
  backend_.EndStep();
  return absl::OkStatus();
}

absl::Status Decoder::Issue(const kernels::StepRows& rows, std::span<const int32_t> logit_rows,
                            std::span<const kernels::DrawRule> rules, TokenSource source) {
  RW_CHECK(can_issue() && uncollected_ < 2 && rules.size() == (plan_.rank == 0 ? logit_rows.size() : 0));
  std::swap(issued_tokens_[0], issued_tokens_[1]);
  kernels::DrawnTokens &tokens = *issued_tokens_[0], &before = *issued_tokens_[1];
  kernels::StepRows step = rows;
  if (source == TokenSource::kKnown) {
    RW_RETURN_IF_ERROR(communicator_.Wait(options_.collective_timeout));
  } else {
    // The step before the one that runs: the backend itself would wait for it without a deadline.
    if (stream_ != nullptr) {
      RW_RETURN_IF_ERROR(stream_->WaitUntil([&] { return tokens.HasCome(); }, options_.collective_timeout));
      RW_RETURN_IF_ERROR(stream_->Share(before.bits().first(issued_count_), options_.collective_timeout));
    }
    step.drawn = &before;
  }
  rules_.assign(rules.begin(), rules.end());
  RW_RETURN_IF_ERROR(Compute(step, logit_rows));
  for (size_t begin = 0; begin < logit_rows.size(); begin += kLogitRows) {
    const size_t count = std::min<size_t>(kLogitRows, logit_rows.size() - begin);
    RW_RETURN_IF_ERROR(MultiplyOutput(logit_rows.subspan(begin, count)));
    RW_ASSIGN_OR_RETURN(const float* whole, WholeLogits(static_cast<int32_t>(count)));
    if (plan_.rank != 0) continue;
    RW_RETURN_IF_ERROR(tokens.Draw(static_cast<int64_t>(begin), whole, std::span(rules_).subspan(begin, count),
                                   static_cast<int32_t>(config_.vocab_size)));
  }
  issued_count_ = static_cast<int32_t>(logit_rows.size());
  RW_RETURN_IF_ERROR(tokens.Send(plan_.rank == 0 ? issued_count_ : 0));
  if (plan_.rank == 0) ++uncollected_;
  backend_.EndStep();
  return absl::OkStatus();
}

absl::StatusOr<std::span<const int32_t>> Decoder::Collect() {
  RW_CHECK(uncollected_ > 0);
  kernels::DrawnTokens& tokens = *issued_tokens_[--uncollected_];
  if (stream_ != nullptr) {
    RW_RETURN_IF_ERROR(stream_->WaitUntil([&] { return tokens.HasCome(); }, options_.collective_timeout));
  }
  return tokens.Take();
}

absl::Status Decoder::Compute(const kernels::StepRows& rows, std::span<const int32_t> logit_rows) {
  RW_CHECK(rows.row_count() > 0 && rows.row_count() <= options_.max_rows, absl::StrCat(rows.row_count(), " rows"));
  kernels::StepRows step = rows;
  step.rope = &rope_;
  step.query_group = attention_.n_heads_local / attention_.n_kv_heads_local;
  step.picked = logit_rows;
  step.rules = rules_;
  RW_RETURN_IF_ERROR(backend_.BeginStep(step));
  RW_RETURN_IF_ERROR(backend_.Embed(embedding_, x_.get()));
  row_count_ = rows.row_count();
  RW_RETURN_IF_ERROR(repeated_layers_ == nullptr ? RunLayers() : repeated_layers_->Run());
  observed_rows_ += rows.row_count();
  return absl::OkStatus();
}

absl::Status Decoder::RunLayers() {
  RW_RETURN_IF_ERROR(backend_.RmsNorm(normed_.get(), x_.get(), layers_.front().attention_norm.get(),
                                      config_.hidden_size, config_.rms_norm_eps));
  for (int i = 0; i < config_.n_layers; ++i) {
    backend_.EnterLayer(i);
    RW_RETURN_IF_ERROR(RunLayer(i, row_count_));
  }
  backend_.LeaveLayers();
  return absl::OkStatus();
}

// Reads `normed`, leaves the next layer's input (or the output matrix's) there.
absl::Status Decoder::RunLayer(int index, int32_t row_count) {
  const Layer& layer = layers_[index];
  const float eps = config_.rms_norm_eps;
  kernels::AttentionShape shape = attention_;
  shape.sliding_window = config_.sliding_window[index];
  kernels::KvObservation* observation = observations_.empty() ? nullptr : &observations_[index];
  const float* next_norm = index + 1 < config_.n_layers ? layers_[index + 1].attention_norm.get() : final_norm_.get();

  RW_RETURN_IF_ERROR(Observe(normed_.get(), row_count, index, &InputObservation::qkv));
  RW_RETURN_IF_ERROR(backend_.MatMul(qkv_.get(), normed_.get(), row_count, *layer.qkv, layer.qkv_bias.get()));
  RW_RETURN_IF_ERROR(backend_.RopeAppend(qkv_.get(), shape, rope_, layer.q_norm.get(), layer.k_norm.get(), eps,
                                         *kv_pool_, index, observation));
  RW_RETURN_IF_ERROR(backend_.Attention(attended_.get(), qkv_.get(), shape, *kv_pool_, index));
  RW_RETURN_IF_ERROR(Observe(attended_.get(), row_count, index, &InputObservation::o));
  RW_RETURN_IF_ERROR(backend_.MatMul(delta_.get(), attended_.get(), row_count, *layer.wo, nullptr));
  RW_RETURN_IF_ERROR(ReduceDelta(row_count));
  RW_RETURN_IF_ERROR(backend_.AddRmsNorm(normed_.get(), x_.get(), delta_.get(), layer.wo_bias.get(),
                                         layer.mlp_norm.get(), config_.hidden_size, eps));
  RW_RETURN_IF_ERROR(Observe(normed_.get(), row_count, index, &InputObservation::gate_up));
  RW_RETURN_IF_ERROR(
      backend_.MatMul(gate_up_.get(), normed_.get(), row_count, *layer.gate_up, layer.gate_up_bias.get()));
  RW_RETURN_IF_ERROR(backend_.SiluMul(activated_.get(), gate_up_.get(), plan_.intermediate.count()));
  RW_RETURN_IF_ERROR(Observe(activated_.get(), row_count, index, &InputObservation::down));
  RW_RETURN_IF_ERROR(backend_.MatMul(delta_.get(), activated_.get(), row_count, *layer.w2, nullptr));
  RW_RETURN_IF_ERROR(ReduceDelta(row_count));
  return backend_.AddRmsNorm(normed_.get(), x_.get(), delta_.get(), layer.w2_bias.get(), next_norm, config_.hidden_size,
                             eps);
}

absl::Status Decoder::Observe(const float* x, int32_t row_count, int layer,
                              std::vector<double> InputObservation::*sums) {
  if (input_observations_.empty()) return absl::OkStatus();
  std::vector<double>& sum = input_observations_[layer].*sums;
  std::vector<float> host(row_count * sum.size());
  RW_RETURN_IF_ERROR(communicator_.Wait(options_.collective_timeout));
  RW_RETURN_IF_ERROR(backend_.CopyToHost(x, host));
  for (int32_t row = 0; row < row_count; ++row) {
    const float* from = &host[row * sum.size()];
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(from[i]) * from[i];
  }
  return absl::OkStatus();
}

absl::Status Decoder::ReduceDelta(int32_t row_count) {
  return communicator_.AllReduceSum({delta_.get(), static_cast<size_t>(row_count * config_.hidden_size)},
                                    options_.collective_timeout);
}

absl::Status Decoder::EmitLogits(std::span<const int32_t> logit_rows, const RowSink& sink) {
  for (size_t begin = 0; begin < logit_rows.size(); begin += kLogitRows) {
    const auto rows = logit_rows.subspan(begin, std::min<size_t>(kLogitRows, logit_rows.size() - begin));
    const auto first = static_cast<int32_t>(begin), count = static_cast<int32_t>(rows.size());
    RW_RETURN_IF_ERROR(MultiplyOutput(rows));
    const float* whole = nullptr;
    if (has_whole_logits()) {
      RW_ASSIGN_OR_RETURN(whole, WholeLogits(count));
    }
    RW_RETURN_IF_ERROR(communicator_.Wait(options_.collective_timeout));
    if (!has_whole_logits()) {
      RW_RETURN_IF_ERROR(EmitGatheredRows(first, count, sink));
    } else if (plan_.rank == 0) {
      RW_RETURN_IF_ERROR(EmitWholeRows(whole, first, count, sink));
    }
  }
  return absl::OkStatus();
}

absl::Status Decoder::MultiplyOutput(std::span<const int32_t> logit_rows) {
  RW_RETURN_IF_ERROR(backend_.PickRows(picked_.get(), normed_.get(), logit_rows, config_.hidden_size));
  return backend_.MatMul(logits_local_.get(), picked_.get(), std::ssize(logit_rows), *output_, nullptr);
}

absl::StatusOr<const float*> Decoder::WholeLogits(int32_t count) {
  if (plan_.world_size == 1) return logits_local_.get();
  const std::span<const float> part(logits_local_.get(), count * plan_.vocab.count());
  const std::span<float> all(logits_gathered_.get(), plan_.rank == 0 ? count * config_.vocab_size : 0);
  RW_RETURN_IF_ERROR(stream_->GatherColumns(part, vocab_counts_, count, all, options_.collective_timeout));
  return logits_gathered_.get();
}

absl::Status Decoder::EmitWholeRows(const float* logits, int32_t begin, int32_t count, const RowSink& sink) {
  const auto rule_of = [&](int32_t i) { return sink.rules.empty() ? std::nullopt : sink.rules[begin + i]; };
  bool draws = false;
  for (int32_t i = 0; i < count; ++i) draws |= rule_of(i).has_value();
  drawn_.resize(count);
  if (draws) {
    RW_RETURN_IF_ERROR(backend_.Draw(drawn_, logits, std::span(rules_).subspan(begin, count),
                                     static_cast<int32_t>(config_.vocab_size)));
  }
  for (int32_t i = 0; i < count; ++i) {
    if (rule_of(i).has_value()) {
      RW_RETURN_IF_ERROR(sink.take_token(begin + i, drawn_[i]));
    } else {
      RW_RETURN_IF_ERROR(backend_.CopyToHost(logits + i * config_.vocab_size, logits_));
      RW_RETURN_IF_ERROR(sink.take_logits(begin + i, logits_));
    }
  }
  return absl::OkStatus();
}

absl::Status Decoder::EmitGatheredRows(int32_t begin, int32_t count, const RowSink& sink) {
  const std::span<float> part(part_.data(), count * plan_.vocab.count());
  RW_RETURN_IF_ERROR(backend_.CopyToHost(logits_local_.get(), part));
  std::vector<int64_t> counts = vocab_counts_;
  for (int64_t& n : counts) n *= count;
  const std::span<float> all(gathered_.data(), plan_.rank == 0 ? count * config_.vocab_size : 0);
  RW_RETURN_IF_ERROR(communicator_.Gather(part, counts, all, options_.collective_timeout));
  if (plan_.rank != 0) return absl::OkStatus();
  for (int32_t i = 0; i < count; ++i) {
    float* destination = logits_.data();
    const float* source = all.data();
    for (const int64_t width : vocab_counts_) {
      destination = std::copy_n(source + i * width, width, destination);
      source += count * width;
    }
    if (!sink.rules.empty() && sink.rules[begin + i].has_value()) {
      RW_RETURN_IF_ERROR(sink.take_token(begin + i, draw_->Draw(logits_, *sink.rules[begin + i])));
    } else {
      RW_RETURN_IF_ERROR(sink.take_logits(begin + i, logits_));
    }
  }
  return absl::OkStatus();
}

}  // namespace rankwise::model
