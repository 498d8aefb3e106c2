#include "launch/load_table.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace rankwise::launch {

using rankwise::v1::GetLoadResponse;
using rankwise::v1::GetModelInfoResponse;
using rankwise::v1::GroupLoad;

std::string Mebibytes(uint64_t bytes) { return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20)); }

std::string ActivationsWords(const GetModelInfoResponse& m) {
  return m.activations().empty() || m.activations() == "float" ? "" : ", " + m.activations() + " activations";
}

std::string ModelLines(const GetModelInfoResponse& m) {
  return absl::StrFormat("model    %s (%s, fingerprint %s)\n", m.model_name(), m.family(), m.fingerprint()) +
         absl::StrFormat("shape    %d layers, %d heads, %d KV heads of %d, hidden %d, intermediate %d, vocabulary %d\n",
                         m.n_layers(), m.n_heads(), m.n_kv_heads(), m.head_dim(), m.hidden_size(),
                         m.intermediate_size(), m.vocab_size()) +
         absl::StrFormat("serving  tp %d, kv %s%s%s, up to %d tokens a request, %s\n", m.tp(), m.kv_format(),
                         m.kv_scales_id().empty() ? "" : " (scales " + m.kv_scales_id() + ")", ActivationsWords(m),
                         m.max_tokens(), m.backend());
}

std::string CacheLine(const GetModelInfoResponse& m, const GetLoadResponse& load) {
  uint64_t bytes = 0, tokens = 0;
  for (const auto& g : load.groups()) {
    tokens += uint64_t{g.blocks_total()} * g.block_tokens();
    for (const auto& r : g.ranks()) bytes += r.kv_bytes();
  }
  if (tokens == 0 || m.n_kv_heads() == 0) return "";
  const uint64_t copies = std::max(1u, m.tp() / m.n_kv_heads());  // KV heads are replicated beyond one rank each
  const uint64_t f16_bytes = tokens * copies * m.n_layers() * m.n_kv_heads() * m.head_dim() * 2 /* K and V */ * 2;
  return absl::StrFormat("cache    %d tokens, %d bytes each over all ranks; as f16 it would be %d: %s instead of %s\n",
                         tokens, bytes / tokens, f16_bytes / tokens, Mebibytes(bytes), Mebibytes(f16_bytes));
}

std::string RequestsLine(const GetLoadResponse& load) {
  return absl::StrFormat("requests %d live of %d, %d queued%s\n", load.live(), load.max_live(), load.queued(),
                         load.draining() ? ", draining" : "");
}

std::string GroupTable(const GetLoadResponse& load) {
  std::string table =
      absl::StrFormat("%5s %5s %-11s %7s %7s %13s %9s %9s %10s %10s %8s %15s\n", "group", "epoch", "state", "running",
                      "waiting", "blocks free", "steps", "step ms", "prompt", "generated", "cached", "guessed right");
  for (const auto& g : load.groups())
    absl::StrAppendFormat(&table, "%5d %5d %-11s %7d %7d %13s %9d %9.2f %10d %10d %8d %15s\n", g.group(), g.epoch(),
                          g.serving() ? "serving" : "not serving", g.running(), g.waiting(),
                          absl::StrFormat("%d/%d", g.blocks_free(), g.blocks_total()), g.steps(),
                          g.step_seconds() * 1e3, g.prompt_tokens(), g.generated_tokens(), g.cached_tokens(),
                          absl::StrFormat("%d/%d", g.accepted_tokens(), g.drafted_tokens()));
  return table;
}

std::string RankTable(const GetLoadResponse& load) {
  std::string table = absl::StrFormat("%5s %5s %-24s %8s %12s %12s %11s %8s %6s\n", "group", "rank", "host", "pid",
                                      "weights", "kv", "compute ms", "wait ms", "skew");
  for (const auto& g : load.groups()) {
    double mean = 0;
    for (const auto& r : g.ranks()) mean += r.step_compute_seconds() / g.ranks_size();
    for (const auto& r : g.ranks()) {
      absl::StrAppendFormat(&table, "%5d %5d %-24s %8d %12s %12s", g.group(), r.rank(), r.host(), r.pid(),
                            Mebibytes(r.weight_bytes()), Mebibytes(r.kv_bytes()));
      if (r.recent_steps() > 0 && mean > 0) {
        absl::StrAppendFormat(&table, " %11.3f %8.3f %+5.0f%%", r.step_compute_seconds() * 1e3,
                              r.step_collective_seconds() * 1e3, (r.step_compute_seconds() / mean - 1) * 100);
      } else {
        absl::StrAppendFormat(&table, " %11s %8s %6s", "-", "-", "-");
      }
      table += "\n";
    }
  }
  return table;
}

std::string SaturationLines(const GetLoadResponse& load) {
  std::string lines;
  for (const auto& g : load.groups()) {
    for (const auto& r : g.ranks()) {
      if (r.saturated_values() == 0) continue;
      std::vector<std::string> layers;
      for (int layer = 0; layer < r.saturated_by_layer_size(); ++layer) {
        if (const uint64_t count = r.saturated_by_layer(layer); count > 0)
          layers.push_back(absl::StrCat(count, " in layer ", layer));
      }
      absl::StrAppendFormat(
          &lines,
          "group %d, rank %d: %d K and V values were out of the cache format's range and stored at its end: %s\n",
          g.group(), r.rank(), r.saturated_values(), absl::StrJoin(layers, ", "));
    }
  }
  return lines;
}

std::map<uint64_t, GroupRate> RatesBetween(const GetLoadResponse& before, const GetLoadResponse& after,
                                           absl::Duration passed) {
  std::map<uint64_t, GroupRate> rates;
  const double seconds = absl::ToDoubleSeconds(passed);
  if (seconds <= 0) return rates;
  for (const GroupLoad& now : after.groups()) {
    const auto then = std::find_if(before.groups().begin(), before.groups().end(), [&](const GroupLoad& g) {
      return g.epoch() == now.epoch() && g.group() == now.group();
    });
    if (then == before.groups().end() || now.steps() < then->steps()) continue;
    const auto per_second = [&](uint64_t a, uint64_t b) { return b >= a ? static_cast<double>(b - a) / seconds : 0.0; };
    rates[now.epoch()] = {.generated = per_second(then->generated_tokens(), now.generated_tokens()),
                          .prompt = per_second(then->prompt_tokens(), now.prompt_tokens()),
                          .steps = per_second(then->steps(), now.steps()),
                          .step_ms = now.steps() > then->steps() ? now.step_seconds() * 1e3 : 0};
  }
  return rates;
}

std::string RateTable(const GetLoadResponse& load, const std::map<uint64_t, GroupRate>& rates) {
  constexpr int kBar = 20;
  std::string table = absl::StrFormat("%5s %5s %-11s %7s %7s %10s %10s %8s %9s  %s\n", "group", "epoch", "state",
                                      "running", "waiting", "tokens/s", "prompt/s", "steps/s", "step ms", "KV in use");
  GroupRate sum;
  for (const GroupLoad& g : load.groups()) {
    const auto it = rates.find(g.epoch());
    const GroupRate rate = it == rates.end() ? GroupRate() : it->second;
    sum.generated += rate.generated;
    sum.prompt += rate.prompt;
    const double used =
        g.blocks_total() == 0 ? 0 : 1.0 - static_cast<double>(g.blocks_free()) / static_cast<double>(g.blocks_total());
    const int filled = std::clamp(static_cast<int>(used * kBar + 0.5), 0, kBar);
    absl::StrAppendFormat(&table, "%5d %5d %-11s %7d %7d %10.1f %10.1f %8.1f %9.2f  [%s%s] %3.0f %%\n", g.group(),
                          g.epoch(), g.serving() ? "serving" : "not serving", g.running(), g.waiting(), rate.generated,
                          rate.prompt, rate.steps, rate.step_ms, std::string(filled, '#'),
                          std::string(kBar - filled, '.'), used * 100);
  }
  absl::StrAppendFormat(&table, "%39s %10.1f %10.1f\n", "all groups", sum.generated, sum.prompt);
  return table;
}

}  // namespace rankwise::launch
