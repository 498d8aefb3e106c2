#include "coordinator/text/byte_symbols.h"

#include <array>

#include "absl/strings/str_format.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

// Printable Latin-1 characters spell themselves, the 68 other bytes follow from U+0100 on.
constexpr uint32_t kSymbolCount = 256 + 68;

struct Tables {
  std::array<std::string, 256> symbols;
  std::array<int16_t, kSymbolCount> bytes;
};

const Tables& ByteTables() {
  static const Tables tables = [] {
    Tables made;
    made.bytes.fill(-1);
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const uint32_t code_point = printable ? byte : next++;
      AppendUtf8(code_point, made.symbols[byte]);
      made.bytes[code_point] = static_cast<int16_t>(byte);
    }
    return made;
  }();
  return tables;
}

}  // namespace

std::string ToByteSymbols(std::string_view bytes) {
  const Tables& tables = ByteTables();
  std::string symbols;
  symbols.reserve(bytes.size() * 2);
  for (const char c : bytes) symbols += tables.symbols[static_cast<uint8_t>(c)];
  return symbols;
}

std::optional<std::string> FromByteSymbols(std::string_view symbols) {
  const Tables& tables = ByteTables();
  std::string bytes;
  for (size_t at = 0; at < symbols.size();) {
    const Utf8Step step = ReadUtf8(symbols.substr(at));
    if (step.state != Utf8Step::State::kCharacter || step.code_point >= kSymbolCount) return std::nullopt;
    const int16_t byte = tables.bytes[step.code_point];
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(byte);
    at += step.length;
  }
  return bytes;
}

std::optional<uint8_t> ParseByteToken(std::string_view name) {
  if (name.size() != 6 || name.substr(0, 3) != "<0x" || name[5] != '>') return std::nullopt;
  uint8_t byte = 0;
  for (const char c : name.substr(3, 2)) {
    const bool is_digit = c >= '0' && c <= '9';
    if (!is_digit && !(c >= 'A' && c <= 'F')) return std::nullopt;
    byte = static_cast<uint8_t>(byte * 16 + (is_digit ? c - '0' : c - 'A' + 10));
  }
  return byte;
}

std::string ByteTokenName(uint8_t byte) { return absl::StrFormat("<0x%02X>", byte); }

}  // namespace rankwise::text
