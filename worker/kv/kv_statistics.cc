#include "worker/kv/kv_statistics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "kernels/kv_histogram.h"
#include "worker/weights/safetensors.h"

namespace rankwise::kv {
namespace {

using kernels::kHistogramBins;

static_assert(std::endian::native == std::endian::little);

constexpr char kFormat[] = "rankwise-kv-statistics-1";
constexpr float kMostValue = 1e38f;                 // max - min and min + max stay finite
constexpr uint64_t kMostCount = uint64_t{1} << 40;  // of one bin; sums over heads stay within 64 bits

std::string Binning() {
  return absl::StrCat("f32 from 2^", kernels::kHistogramLowExponent, " to 2^", kernels::kHistogramHighExponent, " in ",
                      kernels::kHistogramBinsPerOctave, " bins per octave and sign, one around 0, in order of value");
}

// One head's counts against its extremes: the outermost bins in use are those of the extremes.
absl::Status CheckHistogram(const uint64_t* counts, float min, float max) {
  int first = 0, last = kHistogramBins - 1;
  while (first < last && counts[first] == 0) ++first;
  while (last > first && counts[last] == 0) --last;
  if (counts[first] == 0) return absl::InvalidArgumentError("statistics hold a histogram that counts nothing");
  if (first != kernels::HistogramBin(min) || last != kernels::HistogramBin(max)) {
    return absl::InvalidArgumentError(
        absl::StrCat("statistics hold a histogram of other extremes than ", min, " and ", max));
  }
  if (*std::max_element(counts + first, counts + last + 1) > kMostCount) {
    return absl::InvalidArgumentError(absl::StrCat("statistics hold a count beyond ", kMostCount));
  }
  return absl::OkStatus();
}

absl::Status CheckHistograms(const KvStatistics& s) {
  if (s.k_histogram.empty() && s.v_histogram.empty()) return absl::OkStatus();
  const size_t heads = static_cast<size_t>(s.n_layers) * s.n_kv_heads;
  for (const bool of_keys : {true, false}) {
    const std::vector<uint64_t>& histogram = of_keys ? s.k_histogram : s.v_histogram;
    if (histogram.size() != heads * kHistogramBins) {
      return absl::InvalidArgumentError(
          absl::StrCat("statistics hold ", histogram.size(), " bins instead of ", heads * kHistogramBins));
    }
    for (size_t head = 0; head < heads; ++head) {
      const auto low = (of_keys ? s.k_min : s.v_min).begin() + static_cast<ptrdiff_t>(head * s.head_dim);
      const auto high = (of_keys ? s.k_max : s.v_max).begin() + static_cast<ptrdiff_t>(head * s.head_dim);
      RW_RETURN_IF_ERROR(CheckHistogram(&histogram[head * kHistogramBins], *std::min_element(low, low + s.head_dim),
                                        *std::max_element(high, high + s.head_dim)));
    }
  }
  return absl::OkStatus();
}

// The tensor [n_layers, n_kv_heads, last_dim] of the statistics' shape, in `values`.
template <typename T>
absl::Status ReadTensor(const weights::SafetensorsFile& file, const std::string& name, const char* dtype,
                        const std::vector<int64_t>& shape, std::vector<T>& values) {
  const auto found = file.tensors().find(name);
  if (found == file.tensors().end() || found->second.dtype != dtype || found->second.shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is not a ", dtype, " tensor [", shape[0], ", ", shape[1], ", ", shape[2], "]"));
  }
  values.resize(found->second.bytes / sizeof(T));
  std::memcpy(values.data(), found->second.data, found->second.bytes);
  return absl::OkStatus();
}

absl::Status ReadTensors(const weights::SafetensorsFile& file, KvStatistics& s) {
  const auto first = file.tensors().find("key.min");
  if (first == file.tensors().end() || first->second.shape.size() != 3) {
    return absl::InvalidArgumentError("key.min is not a tensor [layers, KV heads, channels]");
  }
  const std::vector<int64_t>& shape = first->second.shape;
  for (const int64_t dim : shape) {
    if (dim < 1 || dim > (1 << 20)) return absl::InvalidArgumentError(absl::StrCat("key.min has a dimension of ", dim));
  }
  s.n_layers = static_cast<int>(shape[0]);
  s.n_kv_heads = static_cast<int>(shape[1]);
  s.head_dim = static_cast<int>(shape[2]);
  RW_RETURN_IF_ERROR(ReadTensor(file, "key.min", "F32", shape, s.k_min));
  RW_RETURN_IF_ERROR(ReadTensor(file, "key.max", "F32", shape, s.k_max));
  RW_RETURN_IF_ERROR(ReadTensor(file, "value.min", "F32", shape, s.v_min));
  RW_RETURN_IF_ERROR(ReadTensor(file, "value.max", "F32", shape, s.v_max));
  if (!file.tensors().contains("key.histogram") && !file.tensors().contains("value.histogram")) return absl::OkStatus();
  if (file.Metadata("histogram") != Binning()) {
    return absl::InvalidArgumentError(
        absl::StrCat("its histogram is \"", file.Metadata("histogram"), "\"; this build reads \"", Binning(), "\""));
  }
  const std::vector<int64_t> bins = {shape[0], shape[1], kHistogramBins};
  RW_RETURN_IF_ERROR(ReadTensor(file, "key.histogram", "U64", bins, s.k_histogram));
  return ReadTensor(file, "value.histogram", "U64", bins, s.v_histogram);
}

}  // namespace

std::vector<float> KvStatistics::AbsMax(bool of_keys) const {
  const std::vector<float>&low = of_keys ? k_min : v_min, &high = of_keys ? k_max : v_max;
  std::vector<float> absmax(low.size());
  for (size_t i = 0; i < absmax.size(); ++i) absmax[i] = std::max(std::abs(low[i]), std::abs(high[i]));
  return absmax;
}

ValueSpread KvStatistics::Spread(bool of_keys, int layer, shard::Range heads) const {
  const int64_t row = int64_t{layer} * n_kv_heads;
  const auto begin = (row + heads.begin) * head_dim, end = (row + heads.end) * head_dim;
  const std::vector<float>&low = of_keys ? k_min : v_min, &high = of_keys ? k_max : v_max;
  ValueSpread spread{.min = *std::min_element(low.begin() + begin, low.begin() + end),
                     .max = *std::max_element(high.begin() + begin, high.begin() + end)};
  const std::vector<uint64_t>& histogram = of_keys ? k_histogram : v_histogram;
  if (histogram.empty()) return spread;
  spread.histogram.resize(kHistogramBins);
  for (int64_t head = row + heads.begin; head < row + heads.end; ++head) {
    for (int b = 0; b < kHistogramBins; ++b) spread.histogram[b] += histogram[head * kHistogramBins + b];
  }
  return spread;
}

absl::Status CheckStatistics(const KvStatistics& s) {
  const auto count = static_cast<size_t>(s.n_layers) * s.n_kv_heads * s.head_dim;
  if (count == 0) return absl::InvalidArgumentError("statistics of no layer or head");
  for (const auto* values : {&s.k_min, &s.k_max, &s.v_min, &s.v_max}) {
    if (values->size() != count) {
      return absl::InvalidArgumentError(absl::StrCat("statistics hold ", values->size(), " values instead of ", count));
    }
    for (const float value : *values) {
      if (!(std::abs(value) <= kMostValue)) {
        return absl::InvalidArgumentError(
            absl::StrCat("statistics hold ", value, ", which is not finite or beyond ", kMostValue));
      }
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (s.k_min[i] > s.k_max[i] || s.v_min[i] > s.v_max[i]) {
      return absl::InvalidArgumentError("statistics hold a minimum above its maximum");
    }
  }
  return CheckHistograms(s);
}

absl::Status WriteKvStatistics(const std::string& path, const KvStatistics& statistics) {
  RW_RETURN_IF_ERROR(CheckStatistics(statistics));
  const std::vector<int64_t> shape = {statistics.n_layers, statistics.n_kv_heads, statistics.head_dim};
  const std::vector<int64_t> bins = {statistics.n_layers, statistics.n_kv_heads, kHistogramBins};
  const std::vector<float> k_absmax = statistics.AbsMax(true), v_absmax = statistics.AbsMax(false);
  std::vector<weights::TensorHeader> headers;
  std::string data;
  const auto add = [&](const char* name, const char* dtype, const std::vector<int64_t>& dims, const auto& values) {
    headers.push_back({.name = name, .dtype = dtype, .shape = dims});
    data.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0]));
  };
  add("key.min", "F32", shape, statistics.k_min);
  add("key.max", "F32", shape, statistics.k_max);
  add("key.absmax", "F32", shape, k_absmax);
  add("value.min", "F32", shape, statistics.v_min);
  add("value.max", "F32", shape, statistics.v_max);
  add("value.absmax", "F32", shape, v_absmax);
  std::map<std::string, std::string> metadata = {{"format", kFormat},
                                                 {"model", statistics.model_fingerprint},
                                                 {"dataset", statistics.dataset},
                                                 {"samples", absl::StrCat(statistics.sample_count)},
                                                 {"sample_tokens", absl::StrCat(statistics.sample_tokens)},
                                                 {"seed", absl::StrCat(statistics.seed)}};
  if (!statistics.k_histogram.empty()) {
    add("key.histogram", "U64", bins, statistics.k_histogram);
    add("value.histogram", "U64", bins, statistics.v_histogram);
    metadata["histogram"] = Binning();
  }
  return WriteFileAtomically(path, weights::SafetensorsHeader(headers, metadata) + data);
}

absl::StatusOr<KvStatistics> ReadKvStatistics(const std::string& path) {
  RW_ASSIGN_OR_RETURN(const weights::SafetensorsFile file, weights::SafetensorsFile::Open(path));
  if (file.Metadata("format") != kFormat) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a KV statistics file"));
  }
  KvStatistics statistics{.model_fingerprint = file.Metadata("model"), .dataset = file.Metadata("dataset")};
  if (!absl::SimpleAtoi(file.Metadata("samples"), &statistics.sample_count)) statistics.sample_count = 0;
  if (!absl::SimpleAtoi(file.Metadata("sample_tokens"), &statistics.sample_tokens)) statistics.sample_tokens = 0;
  if (!absl::SimpleAtoi(file.Metadata("seed"), &statistics.seed)) statistics.seed = 0;
  absl::Status status = ReadTensors(file, statistics);
  if (status.ok()) status = CheckStatistics(statistics);
  if (!status.ok()) return absl::Status(status.code(), absl::StrCat(path, ": ", std::string(status.message())));
  return statistics;
}

}  // namespace rankwise::kv
