#include "worker/weights/model_folder.h"

#include <unistd.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;

absl::Status CannotWrite(const std::string& folder, const std::error_code& error) {
  return absl::InternalError(absl::StrCat("cannot write ", folder, ": ", error.message()));
}

// Puts `temporary` in the place of `folder`; what is there is removed when the other is in place.
absl::Status MoveInto(const std::string& temporary, const std::string& folder) {
  const std::string replaced = temporary + ".old";
  std::error_code error, ignored;
  const bool exists = fs::exists(folder, ignored);
  if (exists) fs::rename(folder, replaced, error);
  if (!error) {
    fs::rename(temporary, folder, error);
    if (error && exists) fs::rename(replaced, folder, ignored);
  }
  if (error) return CannotWrite(folder, error);
  if (exists) fs::remove_all(replaced, ignored);
  return absl::OkStatus();
}

absl::Status FillAndMove(const std::string& temporary, const std::string& folder,
                         const std::function<absl::Status(const std::string&)>& fill) {
  std::error_code error;
  fs::create_directories(temporary, error);
  if (error) return CannotWrite(temporary, error);
  RW_RETURN_IF_ERROR(fill(temporary));
  return MoveInto(temporary, folder);
}

bool IsTokenizerFile(const fs::path& path) {
  const std::string name = path.filename(), extension = path.extension();
  if (extension == ".json") return !absl::EndsWith(name, ".index.json");
  return extension == ".model" || extension == ".tiktoken" || name == "merges.txt";
}

}  // namespace

absl::Status WriteFolder(const std::string& destination, const FolderOptions& options,
                         const std::function<absl::Status(const std::string& folder)>& fill) {
  std::error_code error;
  const fs::path path = fs::absolute(destination, error).lexically_normal();
  const std::string folder = path.has_filename() ? path : path.parent_path();  // "x/" is x
  const bool exists = !error && fs::exists(folder, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(destination, ": ", error.message()));
  if (exists && !options.replaces) {
    return absl::AlreadyExistsError(absl::StrCat(folder, " exists; --force replaces it"));
  }
  if (exists && !fs::exists(folder + "/" + options.marker, error)) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder, " has no ", options.marker, ", so it is none of ours and is not replaced"));
  }
  const std::string temporary = absl::StrCat(folder, ".", getpid(), ".tmp");
  if (fs::exists(temporary, error)) return absl::AlreadyExistsError(absl::StrCat(temporary, " exists"));
  const absl::Status written = FillAndMove(temporary, folder, fill);
  if (!written.ok()) fs::remove_all(temporary, error);
  return written;
}

absl::Status CopyTokenizerFiles(const std::string& model_dir, const std::string& folder) {
  std::error_code error;
  const fs::directory_iterator entries(model_dir, error);
  if (error) return absl::InternalError(absl::StrCat("cannot read ", model_dir, ": ", error.message()));
  for (const fs::directory_entry& entry : entries) {
    if (!entry.is_regular_file() || !IsTokenizerFile(entry.path())) continue;
    const fs::path copy = fs::path(folder) / entry.path().filename();
    fs::copy_file(entry.path(), copy, fs::copy_options::skip_existing, error);
    if (error) return absl::InternalError(absl::StrCat("cannot write ", copy.string(), ": ", error.message()));
  }
  return absl::OkStatus();
}

}  // namespace rankwise::weights
