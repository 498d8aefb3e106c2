#include "tests/chaos/hostile_bytes.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"

namespace rankwise::chaos {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr uint8_t kData = 0, kHeaders = 1, kSettings = 4, kWindowUpdate = 8;
constexpr uint8_t kEndStream = 1, kEndHeaders = 4;

uint64_t Draw(std::mt19937_64& random, uint64_t least, uint64_t most) {
  return std::uniform_int_distribution<uint64_t>(least, most)(random);
}

std::string BigEndian(uint64_t value, int bytes) {
  std::string text;
  for (int i = bytes - 1; i >= 0; --i) text.push_back(static_cast<char>(value >> (8 * i)));
  return text;
}

std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, const std::string& payload, uint64_t length) {
  return absl::StrCat(BigEndian(length, 3), BigEndian(type, 1), BigEndian(flags, 1), BigEndian(stream, 4), payload);
}
std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, const std::string& payload) {
  return Frame(type, flags, stream, payload, payload.size());
}

// A header field as HPACK's literal without indexing. Lengths below 127 fit their first byte.
std::string Field(const std::string& name, const std::string& value) {
  const auto text = [](const std::string& of) {
    if (of.size() < 127) return absl::StrCat(BigEndian(of.size(), 1), of);
    std::string length = BigEndian(127, 1);
    for (size_t rest = of.size() - 127;; rest >>= 7) {
      length.push_back(static_cast<char>(rest < 128 ? rest : (rest & 127) | 128));
      if (rest < 128) break;
    }
    return length + of;
  };
  return absl::StrCat(BigEndian(0, 1), text(name), text(value));
}

std::string Noise(std::mt19937_64& random, size_t most) {
  std::string bytes(Draw(random, 0, most), '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

// Flips, cuts, repeats and inserts.
void Mutate(std::string& bytes, std::mt19937_64& random) {
  for (uint64_t changes = Draw(random, 1, 8); changes > 0 && !bytes.empty(); --changes) {
    const size_t at = Draw(random, 0, bytes.size() - 1);
    switch (Draw(random, 0, 5)) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << Draw(random, 0, 7)));
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, Draw(random, 1, 64)));
        break;
      case 4:
        bytes.insert(at, Noise(random, 32));
        break;
      default:
        bytes.replace(at, std::min<size_t>(4, bytes.size() - at), "\xff\xff\xff\xff");
    }
  }
}

std::string Frames(std::mt19937_64& random) {
  std::string bytes = absl::StrCat(kPreface, Frame(kSettings, 0, 0, ""));
  for (uint64_t count = Draw(random, 1, 20); count > 0; --count) {
    const std::string payload = Noise(random, 300);
    const bool lies = Draw(random, 0, 3) == 0;
    absl::StrAppend(&bytes, Frame(static_cast<uint8_t>(Draw(random, 0, 12)), static_cast<uint8_t>(random()),
                                  static_cast<uint32_t>(Draw(random, 0, 1) == 0 ? Draw(random, 0, 9) : random()),
                                  payload, lies ? Draw(random, 0, 0xffffff) : payload.size()));
  }
  return bytes;
}

std::string ClientHello(std::mt19937_64& random) {
  std::string body = absl::StrCat("\x03\x03", Noise(random, 0), std::string(32, 'r'), BigEndian(0, 1), BigEndian(4, 2),
                                  BigEndian(0x1301c02f, 4), BigEndian(1, 1), BigEndian(0, 1));
  const std::string extensions = Noise(random, 400);
  absl::StrAppend(&body, BigEndian(extensions.size(), 2), extensions);
  const std::string handshake = absl::StrCat(BigEndian(1, 1), BigEndian(body.size(), 3), body);
  return absl::StrCat("\x16\x03\x01", BigEndian(handshake.size(), 2), handshake);
}

}  // namespace

std::string WireCall(const std::string& path, const std::string& token, const std::string& message) {
  std::string fields =
      absl::StrCat(Field(":method", "POST"), Field(":scheme", "http"), Field(":path", path), Field(":authority", "x"),
                   Field("content-type", "application/grpc"), Field("te", "trailers"));
  if (!token.empty()) absl::StrAppend(&fields, Field("authorization", absl::StrCat("Bearer ", token)));
  return absl::StrCat(kPreface, Frame(kSettings, 0, 0, ""), Frame(kHeaders, kEndHeaders, 1, fields),
                      Frame(kData, kEndStream, 1, absl::StrCat(BigEndian(0, 1), BigEndian(message.size(), 4), message)),
                      Frame(kWindowUpdate, 0, 0, BigEndian(1 << 20, 4)));
}

std::string HostileBytes(std::mt19937_64& random) {
  static constexpr std::array kPaths = {"/rankwise.v1.Inference/Generate", "/rankwise.v1.Inference/GetLoad",
                                        "/rankwise.worker.v1.Groups/Attach", "/grpc.health.v1.Health/Check",
                                        "/grpc.health.v1.Health/Watch"};
  switch (Draw(random, 0, 9)) {
    case 0:
      return Noise(random, Draw(random, 0, 9) == 0 ? 65536 : 600);
    case 1:
      return absl::StrCat(kPreface, Noise(random, 2000));
    case 2:
    case 3:
      return Frames(random);
    case 4: {  // 4 GiB are announced and do not come
      const std::string head = absl::StrCat(BigEndian(0, 1), BigEndian(0xffffffff - Draw(random, 0, 1 << 20), 4));
      std::string call = WireCall(kPaths[Draw(random, 0, kPaths.size() - 1)], "", "");
      return call.replace(call.rfind(std::string(5, '\0')), 5, head);
    }
    case 5: {
      std::string bytes = ClientHello(random);
      if (Draw(random, 0, 1) == 0) Mutate(bytes, random);
      return bytes;
    }
    case 6:
      return absl::StrCat("GET /", std::string(Draw(random, 0, 9000), 'a'), " HTTP/1.1\r\nHost: x\r\n\r\n");
    default: {
      std::string bytes = WireCall(kPaths[Draw(random, 0, kPaths.size() - 1)],
                                   Draw(random, 0, 1) == 0 ? "" : "0123456789abcdef0123", Noise(random, 200));
      Mutate(bytes, random);
      return bytes;
    }
  }
}

}  // namespace rankwise::chaos
