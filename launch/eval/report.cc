#include "launch/eval/report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "launch/eval/csv.h"
#include "launch/eval/scoring.h"
#include "launch/eval/statistics.h"

namespace rankwise::eval {
namespace {

using nlohmann::json;

// What an item's value is, and how values become a cell.
enum class Kind : uint8_t {
  kShare,       // 0 or 1; the mean in percent
  kPerplexity,  // a negative log-likelihood; exp of the mean
  kDivergence,  // from the first configuration; the mean
  kAgreement,   // with the first configuration, in [0, 1]; the mean in percent
};

// What is wrong with an answer from a file.
absl::Status Malformed(const Item& item, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("the answer to ", item.id, " ", what));
}

// The log-probability a JSON number holds: not positive but for rounding. A probability of 0 is no number in JSON.
bool IsLogProbability(const json& value) { return value.is_number() && value.get<double>() <= 1e-3; }

absl::StatusOr<std::vector<double>> LogProbabilities(const Item& item, const json& answer) {
  const auto it = answer.find("logprobs");
  if (it == answer.end() || !it->is_array() || it->empty() || !std::ranges::all_of(*it, IsLogProbability))
    return Malformed(item, "has no \"logprobs\"");
  return it->get<std::vector<double>>();
}

absl::StatusOr<std::vector<KnownTokens>> Distributions(const Item& item, const json& answer) {
  RW_ASSIGN_OR_RETURN(const std::vector<double> chosen, LogProbabilities(item, answer));
  const auto top = answer.find("top");
  if (top == answer.end() || !top->is_array() || top->size() != chosen.size() ||
      chosen.size() + 1 != item.tokens.size())
    return Malformed(item, "has not one distribution for each token");
  std::vector<KnownTokens> positions;
  for (size_t i = 0; i < chosen.size(); ++i) {
    KnownTokens known{.id = item.tokens[i + 1], .log_probability = chosen[i]};
    const json& pairs = (*top)[i];
    if (!pairs.is_array() || pairs.empty() || pairs.size() % 2 != 0) return Malformed(item, "has a broken \"top\"");
    for (size_t j = 0; j < pairs.size(); j += 2) {
      if (!pairs[j].is_number_integer() || !IsLogProbability(pairs[j + 1]))
        return Malformed(item, "has a broken \"top\"");
      known.top.emplace_back(pairs[j].get<int32_t>(), pairs[j + 1].get<double>());
    }
    positions.push_back(std::move(known));
  }
  return positions;
}

absl::StatusOr<double> MeanNegative(const Item& item, const json& answer) {
  RW_ASSIGN_OR_RETURN(const std::vector<double> log_probabilities, LogProbabilities(item, answer));
  double sum = 0;
  for (const double value : log_probabilities) sum -= value;
  return sum / static_cast<double>(log_probabilities.size());
}

absl::StatusOr<double> IsRightChoice(const Item& item, const json& answer, bool is_per_byte) {
  RW_ASSIGN_OR_RETURN(const std::vector<double> log_probabilities, LogProbabilities(item, answer));
  if (log_probabilities.size() != item.choices.size())
    return Malformed(item, absl::StrCat("has not one log-probability for each of ", item.choices.size(), " choices"));
  return BestChoice(item, log_probabilities, is_per_byte) == item.right_choice ? 1.0 : 0.0;
}

absl::StatusOr<double> IsRightText(const Item& item, const json& answer) {
  const auto it = answer.find("text");
  if (it == answer.end() || !it->is_string()) return Malformed(item, "has no \"text\"");
  return IsCorrect(item, it->get_ref<const std::string&>()) ? 1.0 : 0.0;
}

absl::StatusOr<double> IsGreedy(const Item& item, const json& answer) {
  const auto it = answer.find("greedy");
  if (it == answer.end() || !it->is_boolean()) return Malformed(item, "has no \"greedy\"");
  return it->get<bool>() ? 1.0 : 0.0;
}

absl::StatusOr<double> WordNegative(const Item& item, const json& answer) {
  const auto it = answer.find("logprob");
  if (it == answer.end() || !IsLogProbability(*it)) return Malformed(item, "has no \"logprob\"");
  return -it->get<double>();
}

absl::StatusOr<double> MeanDivergence(const Item& item, const json& baseline, const json& answer) {
  RW_ASSIGN_OR_RETURN(const std::vector<KnownTokens> p, Distributions(item, baseline));
  RW_ASSIGN_OR_RETURN(const std::vector<KnownTokens> q, Distributions(item, answer));
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += KlLowerBound(p[i], q[i]);
  return sum / static_cast<double>(p.size());
}

absl::StatusOr<double> SameTop(const Item& item, const json& baseline, const json& answer) {
  RW_ASSIGN_OR_RETURN(const std::vector<KnownTokens> p, Distributions(item, baseline));
  RW_ASSIGN_OR_RETURN(const std::vector<KnownTokens> q, Distributions(item, answer));
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += p[i].top[0].first == q[i].top[0].first;
  return sum / static_cast<double>(p.size());
}

struct Metric {
  std::string task, name;
  Kind kind;
  std::function<absl::StatusOr<double>(const Item& item, const json& baseline, const json& answer)> measure;
};

std::vector<Metric> MetricsOf(const Task& task, const std::vector<std::string>& text_rows) {
  const TaskSpec& spec = task.spec;
  // A measure of one answer alone.
  const auto alone = [](auto measure) {
    return [measure](const Item& item, const json&, const json& answer) { return measure(item, answer); };
  };
  switch (spec.rule) {
    case Rule::kChoice: {
      const auto choose = [](bool is_per_byte) {
        return [is_per_byte](const Item& item, const json&, const json& answer) {
          return IsRightChoice(item, answer, is_per_byte);
        };
      };
      if (!spec.is_per_byte) return {{spec.name, spec.metric, Kind::kShare, choose(false)}};
      return {{spec.name, spec.metric + "/byte", Kind::kShare, choose(true)},
              {spec.name, spec.metric, Kind::kShare, choose(false)}};
    }
    case Rule::kGenerate:
      return {{spec.name, spec.metric, Kind::kShare, alone(IsRightText)}};
    case Rule::kLastWord:
      return {{spec.name, spec.metric, Kind::kShare, alone(IsGreedy)},
              {spec.name, "perplexity of word", Kind::kPerplexity, alone(WordNegative)}};
    case Rule::kText:
      break;
  }
  std::vector<Metric> metrics;
  for (const std::string& name : text_rows) {
    if (name == "ppl") {
      metrics.push_back({name, "perplexity", Kind::kPerplexity, alone(MeanNegative)});
    } else {
      metrics.push_back({name, "KL, at least", Kind::kDivergence, MeanDivergence});
      metrics.push_back({name, "same top token", Kind::kAgreement, SameTop});
    }
  }
  return metrics;
}

// An item that every configuration answered.
struct Answered {
  const Item* item;
  std::vector<const json*> answers;
  double weight = 1;
};

Cell Compare(Kind kind, const std::vector<double>& baseline, const std::vector<double>& values,
             const std::vector<double>& weights, bool is_baseline) {
  const Estimate own = WeightedMean(values, weights);
  Cell cell;
  if (kind == Kind::kDivergence || kind == Kind::kAgreement) {
    const double scale = kind == Kind::kAgreement ? 100 : 1;
    cell.value = scale * own.mean;
    if (!is_baseline) cell.standard_error = scale * own.standard_error;
    return cell;
  }
  const bool is_share = kind == Kind::kShare;
  cell.value = is_share ? 100 * own.mean : std::exp(own.mean);
  if (is_baseline) return cell;
  const Estimate paired = PairedDifference(baseline, values, weights);
  if (is_share) {
    cell.difference = 100 * paired.mean;
    cell.standard_error = 100 * paired.standard_error;
    cell.wins = cell.losses = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      *cell.wins += values[i] > baseline[i];
      *cell.losses += values[i] < baseline[i];
    }
    cell.p_value = SignTest(*cell.wins, *cell.losses);
    return cell;
  }
  // exp(b + d) - exp(b), and its first-order error.
  cell.difference = cell.value - cell.value / std::exp(paired.mean);
  cell.standard_error = cell.value * paired.standard_error;
  if (values.size() > 1) cell.p_value = paired.mean == 0 ? 1.0 : NormalTwoSided(paired.mean / paired.standard_error);
  return cell;
}

absl::StatusOr<Row> MakeRow(const Metric& metric, const std::vector<Answered>& answered, size_t configuration_count) {
  Row row{.task = metric.task, .metric = metric.name, .items = std::ssize(answered)};
  if (metric.kind == Kind::kShare || metric.kind == Kind::kAgreement) row.unit = "%";
  if (metric.kind == Kind::kShare) row.test = "sign test";
  if (metric.kind == Kind::kPerplexity) row.test = "paired z";
  if (answered.empty()) return row;
  std::vector<double> weights;
  for (const Answered& a : answered) weights.push_back(a.weight);
  std::vector<double> baseline;
  for (size_t c = 0; c < configuration_count; ++c) {
    std::vector<double> values;
    for (const Answered& a : answered) {
      RW_ASSIGN_OR_RETURN(values.emplace_back(), metric.measure(*a.item, *a.answers[0], *a.answers[c]));
    }
    if (c == 0) baseline = values;
    row.cells.push_back(Compare(metric.kind, baseline, values, weights, c == 0));
  }
  return row;
}

// So that each group weighs the same.
void WeighGroups(std::vector<Answered>& answered) {
  std::map<std::string, int64_t> sizes;
  for (const Answered& a : answered) ++sizes[a.item->group];
  for (Answered& a : answered) a.weight = 1.0 / static_cast<double>(sizes[a.item->group]);
}

std::string Number(const Row& row, double value, bool is_signed) {
  if (!std::isfinite(value)) return "-";
  std::string text;
  if (row.unit == "%") {
    text = absl::StrFormat("%.2f", value);
  } else if (row.task == "kl") {
    text = absl::StrFormat("%.2e", value);
  } else {
    text = std::abs(value) >= 1e4 ? absl::StrFormat("%.4g", value) : absl::StrFormat("%.4f", value);
  }
  return is_signed && value >= 0 ? absl::StrCat("+", text) : text;
}

std::string Probability(double p) { return p < 0.001 ? "<0.001" : absl::StrFormat("%.3f", p); }

std::string Optional(const std::optional<double>& value) {
  return value && std::isfinite(*value) ? absl::StrFormat("%.10g", *value) : "";
}

json OptionalJson(const std::optional<double>& value) { return value && std::isfinite(*value) ? json(*value) : json(); }

std::string Padded(const std::string& text, size_t width, bool is_left = false) {
  const std::string padding(width > text.size() ? width - text.size() : 0, ' ');
  return is_left ? text + padding : padding + text;
}

}  // namespace

absl::StatusOr<std::vector<Row>> MakeRows(const Task& task, size_t limit, int shots, size_t configuration_count,
                                          const std::vector<std::string>& text_rows, const FindAnswer& find) {
  std::vector<Answered> answered;
  int64_t skipped = 0, fewer_shots = 0;
  for (size_t i = 0; i < std::min(limit, task.items.size()); ++i) {
    const Item& item = task.items[i];
    Answered entry{.item = &item};
    bool is_skipped = false;
    for (size_t c = 0; c < configuration_count; ++c) {
      const json* answer = find(c, item);
      if (answer == nullptr) return Malformed(item, "is missing");
      is_skipped = is_skipped || answer->contains("skipped");
      entry.answers.push_back(answer);
    }
    if (is_skipped) {
      ++skipped;
      continue;
    }
    const Exemplars* exemplars = FindExemplars(task, item);
    const int most = exemplars == nullptr ? 0 : std::min<int>(shots, static_cast<int>(exemplars->solved.size()));
    const auto used = entry.answers[0]->find("shots");
    fewer_shots += used != entry.answers[0]->end() && used->is_number_integer() && used->get<int64_t>() < most;
    answered.push_back(std::move(entry));
  }
  if (task.spec.has_group_mean) WeighGroups(answered);
  std::vector<Row> rows;
  for (const Metric& metric : MetricsOf(task, text_rows)) {
    RW_ASSIGN_OR_RETURN(Row row, MakeRow(metric, answered, configuration_count));
    row.skipped = skipped;
    row.fewer_shots = fewer_shots;
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<std::string> Notes(const Report& report) {
  std::vector<std::string> notes;
  bool has_kl = false;
  std::string told;
  for (const Row& row : report.rows) {
    has_kl = has_kl || row.task == "kl";
    if (row.task == told) continue;
    told = row.task;
    if (row.skipped > 0)
      notes.push_back(absl::StrCat(row.task, ": ", row.skipped, " items did not fit the context and are left out."));
    if (row.fewer_shots > 0)
      notes.push_back(
          absl::StrCat(row.task, ": ", row.fewer_shots, " items got fewer exemplars, for the context's sake."));
  }
  if (report.configurations.size() > 1) {
    notes.push_back(
        "± is the standard error of the paired difference. p: two-sided, by the exact sign test on the items that "
        "changed (%) or the normal approximation of the paired difference (perplexity), not corrected for the number "
        "of rows.");
  }
  if (has_kl) {
    notes.push_back(
        "KL: mean over positions of KL(baseline ‖ configuration) in nats, on the tokens among both's likeliest 20 and "
        "one bucket for the rest: a lower bound. ± is the standard error over windows.");
  }
  return notes;
}

std::string ToTable(const Report& report) {
  std::vector<std::vector<std::string>> lines(1);
  lines[0] = {"task", "metric", "n"};
  for (size_t c = 0; c < report.configurations.size(); ++c) {
    lines[0].push_back(report.configurations[c].name);
    if (c > 0) lines[0].insert(lines[0].end(), {"diff", "±", "p"});
  }
  for (const Row& row : report.rows) {
    std::vector<std::string>& line = lines.emplace_back();
    line = {row.task, row.unit.empty() ? row.metric : absl::StrCat(row.metric, " ", row.unit), absl::StrCat(row.items)};
    for (size_t c = 0; c < row.cells.size(); ++c) {
      const Cell& cell = row.cells[c];
      line.push_back(Number(row, cell.value, false));
      if (c == 0) continue;
      line.push_back(cell.difference ? Number(row, *cell.difference, true) : "");
      line.push_back(cell.standard_error ? Number(row, *cell.standard_error, false) : "");
      line.push_back(cell.p_value ? Probability(*cell.p_value) : "");
    }
  }
  std::vector<size_t> widths(lines[0].size());
  const auto width = [](const std::string& text) {  // "±" is one column of two bytes
    return static_cast<size_t>(std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; }));
  };
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], width(line[i]));
  }
  std::string table;
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) {
      const size_t bytes = widths[i] + line[i].size() - width(line[i]);
      absl::StrAppend(&table, i > 0 ? "  " : "", Padded(line[i], bytes, i < 2));
    }
    absl::StrAppend(&table, "\n");
  }
  for (const std::string& note : Notes(report)) absl::StrAppend(&table, "\n", note);
  return absl::StrCat(table, "\n");
}

std::string ToCsv(const Report& report) {
  std::string csv =
      "task,metric,unit,n,skipped,fewer_shots,configuration,value,difference,standard_error,p_value,test,wins,losses\n";
  for (const Row& row : report.rows) {
    for (size_t c = 0; c < row.cells.size(); ++c) {
      const Cell& cell = row.cells[c];
      absl::StrAppend(&csv, CsvCell(row.task), ",", CsvCell(row.metric), ",", row.unit, ",", row.items, ",");
      absl::StrAppend(&csv, row.skipped, ",", row.fewer_shots, ",", CsvCell(report.configurations[c].name), ",");
      absl::StrAppend(&csv, Optional(cell.value), ",", Optional(cell.difference), ",", Optional(cell.standard_error),
                      ",", Optional(cell.p_value), ",", row.test, ",");
      absl::StrAppend(&csv, cell.wins ? absl::StrCat(*cell.wins) : "", ",",
                      cell.losses ? absl::StrCat(*cell.losses) : "", "\n");
    }
  }
  return csv;
}

json ToJson(const Report& report) {
  json configurations = json::array();
  for (const Configuration& configuration : report.configurations) {
    configurations.push_back({{"name", configuration.name},
                              {"kv_format", configuration.kv_format},
                              {"kv_scales", configuration.kv_scales},
                              {"activations", configuration.activations},
                              {"tp", configuration.tp},
                              {"backend", configuration.backend}});
  }
  json rows = json::array();
  for (const Row& row : report.rows) {
    json values = json::array();
    for (size_t c = 0; c < row.cells.size(); ++c) {
      const Cell& cell = row.cells[c];
      values.push_back({{"configuration", report.configurations[c].name},
                        {"value", OptionalJson(cell.value)},
                        {"difference", OptionalJson(cell.difference)},
                        {"standard_error", OptionalJson(cell.standard_error)},
                        {"p_value", OptionalJson(cell.p_value)},
                        {"wins", cell.wins ? json(*cell.wins) : json()},
                        {"losses", cell.losses ? json(*cell.losses) : json()}});
    }
    rows.push_back({{"task", row.task},
                    {"metric", row.metric},
                    {"unit", row.unit},
                    {"test", row.test},
                    {"n", row.items},
                    {"skipped", row.skipped},
                    {"fewer_shots", row.fewer_shots},
                    {"values", std::move(values)}});
  }
  return {{"model", report.model},
          {"fingerprint", report.fingerprint},
          {"seed", report.seed},
          {"baseline", report.configurations[0].name},
          {"configurations", std::move(configurations)},
          {"rows", std::move(rows)},
          {"notes", Notes(report)}};
}

}  // namespace rankwise::eval
