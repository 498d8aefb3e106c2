#pragma once

#include <cstdint>
#include <random>
#include <string>

// Bytes that nobody should send, drawn by a seed.
namespace rankwise::chaos {

// A gRPC call as it is on the wire, from the HTTP/2 preface on: POST `path` with `token` (empty: none), one message.
std::string WireCall(const std::string& path, const std::string& token, const std::string& message);

// One connection's worth: noise, HTTP/2 that begins well, frames that lie about their length, calls with flipped and
// missing bytes, messages that announce 4 GiB, TLS, HTTP/1.
std::string HostileBytes(std::mt19937_64& random);

}  // namespace rankwise::chaos
