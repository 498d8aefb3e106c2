#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace rankwise::text {

// Byte-level BPE spells each byte as one printable character (GPT-2's bytes_to_unicode): a space is "Ġ". Vocabulary
// files hold these spellings.
std::string ToByteSymbols(std::string_view bytes);

// Absent when some character spells no byte.
std::optional<std::string> FromByteSymbols(std::string_view symbols);

// "<0x0A>" is byte 10, as SentencePiece spells byte tokens.
std::optional<uint8_t> ParseByteToken(std::string_view name);
std::string ByteTokenName(uint8_t byte);

}  // namespace rankwise::text
