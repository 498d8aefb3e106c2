#include "coordinator/text/sentencepiece_model.h"

#include <dlfcn.h>

#include "base/program_folder.h"

namespace rankwise::text {
namespace {

using NewModel = SentencePieceModel* (*)();

struct Plugin {
  NewModel new_model = nullptr;
  std::string error;
};

// Sanitizers refuse RTLD_DEEPBIND. Without it the plugin works only where no other protobuf is loaded.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kIsSanitized = true;
constexpr int kOpenFlags = RTLD_NOW | RTLD_LOCAL;
#else
constexpr bool kIsSanitized = false;
constexpr int kOpenFlags = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif
constexpr char kProtobufSymbol[] = "_ZN6google8protobuf8internal13VerifyVersionEiiPKc";

Plugin OpenPlugin() {
  if (kIsSanitized && dlsym(RTLD_DEFAULT, kProtobufSymbol) != nullptr) {
    return {.error = "a program built with a sanitizer cannot load SentencePiece models beside protobuf"};
  }
  const std::string path = ProgramFolder() + "/librankwise_sentencepiece.so";
  void* library = dlopen(path.c_str(), kOpenFlags);
  if (library == nullptr) return {.error = std::string("cannot open the SentencePiece plugin: ") + dlerror()};
  Plugin plugin{.new_model = reinterpret_cast<NewModel>(dlsym(library, "RankwiseNewSentencePieceModel"))};
  if (plugin.new_model == nullptr) plugin.error = path + " is not the SentencePiece plugin";
  return plugin;
}

}  // namespace

std::unique_ptr<SentencePieceModel> SentencePieceModel::Create(std::string& error) {
  static const Plugin plugin = OpenPlugin();
  error = plugin.error;
  return std::unique_ptr<SentencePieceModel>(plugin.new_model == nullptr ? nullptr : plugin.new_model());
}

}  // namespace rankwise::text
