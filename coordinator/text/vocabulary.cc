#include "coordinator/text/vocabulary.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "coordinator/text/json_file.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {

absl::Status Vocabulary::Add(int32_t id, Piece piece) {
  if (at(id).kind != PieceKind::kAbsent)
    return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is both '", ToValidUtf8(at(id).bytes), "' and '",
                                                   ToValidUtf8(piece.bytes), "'"));
  Replace(id, std::move(piece));
  return absl::OkStatus();
}

void Vocabulary::Replace(int32_t id, Piece piece) {
  RW_CHECK(id >= 0 && id < kTokenIdLimit, absl::StrCat("id=", id));
  if (id >= size()) pieces_.resize(static_cast<size_t>(id) + 1);
  pieces_[static_cast<size_t>(id)] = std::move(piece);
}

const Piece& Vocabulary::at(int32_t id) const {
  static const Piece kNoPiece;
  return id >= 0 && id < size() ? pieces_[static_cast<size_t>(id)] : kNoPiece;
}

}  // namespace rankwise::text
