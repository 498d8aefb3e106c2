#include "worker/weights/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "kernels/number_formats.h"
#include "worker/weights/activation_scaling.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/grouped_words.h"
#include "worker/weights/json.h"
#include "worker/weights/matrix_parts.h"
#include "worker/weights/model_folder.h"
#include "worker/weights/safetensors.h"

namespace rankwise::weights {
namespace {

using kernels::MatrixView;

constexpr char kMarker[] = "quantized_by_rankwise.json";

// Element [i] of scales that may be absent.
float At(const std::vector<float>& scales, int64_t i) { return scales.empty() ? 1.0f : scales[i]; }

absl::StatusOr<GroupedWords> QuantizeMatrix(const MatrixView& w, const TensorScaling& scaling,
                                            const QuantizeOptions& options) {
  GroupedWords words(w.rows, w.cols, options.bits, options.group_size);
  std::vector<float> values(options.group_size), importance(options.group_size);
  for (int64_t out = 0; out < w.rows; ++out) {
    for (int64_t group = 0; group < w.cols / options.group_size; ++group) {
      for (int32_t i = 0; i < options.group_size; ++i) {
        const int64_t in = group * options.group_size + i;
        const float widened = At(scaling.cols, in);
        values[i] = kernels::ElementAt(w, out, in) * widened * At(scaling.rows, out);
        importance[i] = At(scaling.mean_square, in) / (widened * widened);
      }
      const QuantizedGroup quantized = QuantizeGroup(values, (1 << options.bits) - 1, importance);
      if (quantized.q.empty())
        return absl::InvalidArgumentError("holds a value that is not finite, or a range beyond f16");
      words.SetGroup(group, out, static_cast<uint32_t>(quantized.zero), quantized.scale);
      for (int32_t i = 0; i < options.group_size; ++i) {
        words.SetWeight(group * options.group_size + i, out, static_cast<uint32_t>(quantized.q[i]));
      }
    }
  }
  return words;
}

template <typename T>
void WriteAll(std::ofstream& file, const std::vector<T>& values) {
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

std::string LayerName(const std::string& weight) {
  return weight.substr(0, weight.size() - std::string("weight").size());
}

std::vector<TensorHeader> Headers(const std::vector<NamedTensor>& tensors, const QuantizeOptions& options) {
  const int64_t per_word = 32 / options.bits;
  std::vector<TensorHeader> headers;
  for (const NamedTensor& tensor : tensors) {
    const MatrixView& view = tensor.view;
    if (tensor.is_linear) {
      const int64_t groups = view.cols / options.group_size;
      const std::string name = LayerName(tensor.name);
      headers.push_back({name + "qweight", "I32", {view.cols, view.rows / per_word}});
      headers.push_back({name + "qzeros", "I32", {groups, view.rows / per_word}});
      headers.push_back({name + "scales", "F16", {groups, view.rows}});
      continue;
    }
    const char* dtype = view.dtype == kernels::DType::kF32   ? "F32"
                        : view.dtype == kernels::DType::kF16 ? "F16"
                                                             : "BF16";
    headers.push_back(
        {tensor.name, dtype,
         tensor.is_vector ? std::vector<int64_t>{view.rows} : std::vector<int64_t>{view.rows, view.cols}});
  }
  return headers;
}

absl::Status CheckShapes(const std::vector<NamedTensor>& tensors, const QuantizeOptions& options) {
  for (const NamedTensor& tensor : tensors) {
    if (!tensor.is_linear) continue;
    if (tensor.view.rows % (32 / options.bits) != 0 || tensor.view.cols % options.group_size != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          tensor.name, " [", tensor.view.rows, ", ", tensor.view.cols, "]: outputs must be a multiple of ",
          32 / options.bits, " and inputs of group_size=", options.group_size, "; choose a smaller --group-size"));
    }
  }
  return absl::OkStatus();
}

// A vector times its scales, in its own dtype.
absl::StatusOr<std::vector<std::byte>> ScaledVector(const MatrixView& view, const TensorScaling& scaling) {
  const int64_t size = kernels::DTypeBytes(view.dtype);
  std::vector<std::byte> bytes(view.rows * size);
  for (int64_t i = 0; i < view.rows; ++i) {
    const float value = kernels::ElementAt(view, i, 0) * At(scaling.rows, i);
    if (view.dtype == kernels::DType::kF32) {
      std::memcpy(&bytes[i * size], &value, size);
    } else {
      const uint16_t word = RoundTo16(value, view.dtype);
      const uint16_t exponent = view.dtype == kernels::DType::kBF16 ? 0x7F80 : 0x7C00;
      if ((word & exponent) == exponent) {
        return absl::OutOfRangeError(
            absl::StrCat("scaled by activations has a value that ", kernels::DTypeName(view.dtype), " cannot hold"));
      }
      std::memcpy(&bytes[i * size], &word, size);
    }
  }
  return bytes;
}

absl::Status WriteTensors(const std::vector<NamedTensor>& tensors, const Scalings& scalings, const std::string& path,
                          const QuantizeOptions& options, const QuantizeProgress& progress) {
  int64_t total = 0, done = 0;
  for (const NamedTensor& tensor : tensors) total += tensor.view.rows * tensor.view.cols;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << SafetensorsHeader(Headers(tensors, options), {{"format", "pt"}});
  for (const NamedTensor& tensor : tensors) {
    const MatrixView& view = tensor.view;
    const auto scaled = scalings.find(tensor.name);
    static const TensorScaling kNone;
    const TensorScaling& scaling = scaled == scalings.end() ? kNone : scaled->second;
    if (tensor.is_linear) {
      const absl::StatusOr<GroupedWords> words = QuantizeMatrix(view, scaling, options);
      if (!words.ok()) {
        return absl::Status(words.status().code(),
                            absl::StrCat(tensor.name, " ", std::string(words.status().message())));
      }
      WriteAll(file, words->qweight);
      WriteAll(file, words->qzeros);
      WriteAll(file, words->scales);
    } else if (!scaling.rows.empty()) {
      const absl::StatusOr<std::vector<std::byte>> bytes = ScaledVector(view, scaling);
      if (!bytes.ok()) {
        return absl::Status(bytes.status().code(),
                            absl::StrCat(tensor.name, " ", std::string(bytes.status().message())));
      }
      WriteAll(file, *bytes);
    } else {
      file.write(reinterpret_cast<const char*>(view.data), view.rows * view.cols * kernels::DTypeBytes(view.dtype));
    }
    done += view.rows * view.cols;
    if (progress) progress("quantize", done, total);
  }
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", path));
}

absl::StatusOr<Scalings> ScalingsOf(const TensorListing& listing, const QuantizeOptions& options,
                                    const QuantizeProgress& progress) {
  if (options.statistics_dir.empty()) return Scalings();
  const std::string path = absl::StrCat(options.statistics_dir, "/", InputStatistics::kFileName);
  RW_ASSIGN_OR_RETURN(const InputStatistics statistics, ReadInputStatistics(path, listing.checkpoint->config()));
  if (statistics.model_fingerprint != listing.checkpoint->fingerprint()) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is of model ", statistics.model_fingerprint, ", not of ",
                                                      listing.checkpoint->fingerprint(),
                                                      "; `rankwise calibrate` this model"));
  }
  return ScaleByActivations(listing, statistics, options, progress);
}

absl::Status WriteConfig(const std::string& model_dir, const std::string& folder, const QuantizeOptions& options) {
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(model_dir + "/config.json", 1 << 20));
  RW_ASSIGN_OR_RETURN(nlohmann::json config, ParseJsonObject(text, "config.json"));
  config["quantization_config"] = {
      {"quant_method", "awq"}, {"bits", options.bits}, {"group_size", options.group_size},
      {"version", "gemm"},     {"zero_point", true},   {"modules_to_not_convert", nullptr}};
  return WriteFileAtomically(folder + "/config.json", config.dump(2) + "\n");
}

absl::Status Fill(const TensorListing& listing, const Scalings& scalings, const std::string& model_dir,
                  const std::string& folder, const QuantizeOptions& options, const QuantizeProgress& progress) {
  RW_RETURN_IF_ERROR(WriteTensors(listing.tensors, scalings, folder + "/model.safetensors", options, progress));
  RW_RETURN_IF_ERROR(WriteConfig(model_dir, folder, options));
  RW_RETURN_IF_ERROR(CopyTokenizerFiles(model_dir, folder));
  const nlohmann::json marker = {
      {"model", listing.checkpoint->fingerprint()},
      {"bits", options.bits},
      {"group_size", options.group_size},
      {"method", scalings.empty() ? "round to nearest, clipped ranges" : "activation-aware"}};
  return WriteFileAtomically(folder + "/" + kMarker, marker.dump(2) + "\n");
}

}  // namespace

QuantizedGroup QuantizeGroup(std::span<const float> weights, int levels, std::span<const float> importance) {
  const auto [low, high] = std::minmax_element(weights.begin(), weights.end());
  const float min = std::min(*low, 0.0f), max = std::max(*high, 0.0f);
  QuantizedGroup best;
  double least = INFINITY;
  for (int percent = 100; percent >= 50; percent -= 5) {
    QuantizedGroup group{
        .scale = kernels::FloatToHalf((max - min) * static_cast<float>(percent) / 100.0f / static_cast<float>(levels))};
    const float scale = kernels::HalfToFloat(group.scale), divisor = scale > 0 ? scale : 1.0f;
    group.zero =
        std::clamp(static_cast<int>(std::nearbyint(-min * static_cast<float>(percent) / 100.0f / divisor)), 0, levels);
    double error = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const float w = weights[i];
      const float q = std::nearbyint(w / divisor) + static_cast<float>(group.zero);
      group.q.push_back(static_cast<int>(std::clamp(q, 0.0f, static_cast<float>(levels))));
      const double difference = static_cast<double>(group.q.back() - group.zero) * scale - w;
      error += difference * difference * (importance.empty() ? 1.0 : importance[i]);
    }
    if (error < least) {
      least = error;
      best = std::move(group);
    }
  }
  return best;
}

absl::Status WriteQuantized(const std::string& model_dir, const std::string& destination,
                            const QuantizeOptions& options, const QuantizeProgress& progress) {
  if ((options.bits != 4 && options.bits != 8) || options.group_size < 1) {
    return absl::InvalidArgumentError(absl::StrCat("bits=", options.bits, ", group_size=", options.group_size,
                                                   ": bits are 4 or 8, a group has inputs"));
  }
  RW_ASSIGN_OR_RETURN(const TensorListing listing, ListTensors(model_dir));
  if (listing.checkpoint->config().weight_bits > 0) {
    return absl::FailedPreconditionError(absl::StrCat(model_dir, " is quantised already"));
  }
  RW_RETURN_IF_ERROR(CheckShapes(listing.tensors, options));
  return WriteFolder(destination, {.replaces = options.replaces, .marker = kMarker},
                     [&](const std::string& folder) -> absl::Status {
                       RW_ASSIGN_OR_RETURN(const Scalings scalings, ScalingsOf(listing, options, progress));
                       return Fill(listing, scalings, model_dir, folder, options, progress);
                     });
}

}  // namespace rankwise::weights
