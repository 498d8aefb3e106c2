#include "kernels/amx_emulation/amx_emulator.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "base/check.h"

namespace rankwise::amx_emulation {
namespace {

constexpr int kRegisters = 8, kRows = 16, kRowBytes = 64;

struct Matrix {
  int rows = 0, row_bytes = 0;  // 0 before it has a shape
  uint8_t bytes[kRows][kRowBytes] = {};

  int words() const { return row_bytes / 4; }
  uint32_t Word(int row, int i) const {
    uint32_t word;
    std::memcpy(&word, bytes[row] + 4 * i, sizeof(word));
    return word;
  }
};

thread_local Matrix matrices[kRegisters];
thread_local bool has_shapes = false;
std::atomic<int64_t> product_count = 0;

[[noreturn]] void Fault(const char* why) {
  constexpr char kName[] = "AMX emulator: ";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, kName, sizeof(kName) - 1) +
                                        write(STDERR_FILENO, why, std::strlen(why)) + write(STDERR_FILENO, "\n", 1);
  std::abort();
}

Matrix& Shaped(int i) {
  if (i >= kRegisters || matrices[i].rows == 0) Fault("a register without a shape");
  if (matrices[i].row_bytes % 4 != 0) Fault("a register whose rows are no whole words");
  return matrices[i];
}

void Clear() {
  std::fill(std::begin(matrices), std::end(matrices), Matrix{});
  has_shapes = false;
}

void SetShapes(const uint8_t* config) {
  Clear();
  if (config[0] == 0) return;
  if (config[0] != 1 || config[1] != 0) Fault("a palette other than 1, or a first row other than 0");
  const auto is_zero = [&](int begin, int end) {
    return std::all_of(config + begin, config + end, [](uint8_t x) { return x == 0; });
  };
  if (!is_zero(2, 16) || !is_zero(32, 48) || !is_zero(56, 64)) Fault("a shape of a register that does not exist");
  for (int i = 0; i < kRegisters; ++i) {
    const int row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    if (rows > kRows || row_bytes > kRowBytes) Fault("a shape of more than 16 rows of 64 bytes");
    if ((rows == 0) != (row_bytes == 0)) Fault("a shape that is empty in one direction alone");
    matrices[i].rows = rows;
    matrices[i].row_bytes = row_bytes;
  }
  has_shapes = true;
}

void Load(int i, const uint8_t* from, int64_t stride) {
  Matrix& to = Shaped(i);
  std::memset(to.bytes, 0, sizeof(to.bytes));
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.bytes[r], from + r * stride, to.row_bytes);
}

void Store(int i, uint8_t* to, int64_t stride) {
  const Matrix& from = Shaped(i);
  for (int r = 0; r < from.rows; ++r) std::memcpy(to + r * stride, from.bytes[r], from.row_bytes);
}

void Zero(int i) {
  Matrix& matrix = Shaped(i);
  std::memset(matrix.bytes, 0, sizeof(matrix.bytes));
}

int32_t ByteOf(uint32_t word, int i, bool is_signed) {
  const auto byte = static_cast<uint8_t>(word >> (8 * i));
  return is_signed ? static_cast<int8_t>(byte) : byte;
}

void MultiplyBytes(int sum_index, int a_index, int b_index, bool a_is_signed, bool b_is_signed) {
  if (sum_index == a_index || a_index == b_index || sum_index == b_index) Fault("a product with one register twice");
  Matrix& sum = Shaped(sum_index);
  const Matrix &a = Shaped(a_index), &b = Shaped(b_index);
  if (sum.rows != a.rows || sum.row_bytes != b.row_bytes || a.words() != b.rows) {
    Fault("a product of shapes that do not match");
  }
  for (int m = 0; m < sum.rows; ++m) {
    for (int n = 0; n < sum.words(); ++n) {
      uint32_t total = sum.Word(m, n);
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 4; ++i) {
          total += static_cast<uint32_t>(ByteOf(a.Word(m, k), i, a_is_signed) * ByteOf(b.Word(k, n), i, b_is_signed));
        }
      }
      std::memcpy(sum.bytes[m] + 4 * n, &total, sizeof(total));
    }
  }
  ++product_count;
}

// An instruction of VEX map 0F38 with a ModRM byte behind its opcode.
struct Instruction {
  int prefix;  // pp: 0 none, 1 66, 2 F3, 3 F2
  int opcode;
  int vvvv;
  bool is_register;  // mod 11
  int reg, rm;
  bool has_sib;
  int64_t address, stride;  // of memory operands; stride of those with a SIB byte: its scaled index
  int64_t next;
};

int64_t RegisterOf(const ucontext_t& context, int i) {
  static constexpr int kNames[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kNames[i]];
}

// False for what is not of that form.
bool Decode(const ucontext_t& context, Instruction& out) {
  const auto* p = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return false;
  const int x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
  if ((p[1] & 0x80) == 0) return false;  // no ninth matrix register
  const uint8_t modrm = p[4];
  const int mod = modrm >> 6;
  out = {.prefix = p[2] & 3,
         .opcode = p[3],
         .vvvv = ~p[2] >> 3 & 15,
         .is_register = mod == 3,
         .reg = modrm >> 3 & 7,
         .rm = (modrm & 7) | (mod == 3 ? b : 0),
         .has_sib = mod != 3 && (modrm & 7) == 4,
         .address = 0,
         .stride = 0,
         .next = 0};
  p += 5;
  int32_t displacement = 0;
  bool has_base = true, is_relative = false;
  int base = (modrm & 7) | b;
  if (out.has_sib) {
    const uint8_t sib = *p++;
    const int index = (sib >> 3 & 7) | x;
    if (index != 4) out.stride = RegisterOf(context, index) << (sib >> 6);
    base = (sib & 7) | b;
    has_base = mod != 0 || (sib & 7) != 5;
  } else if (mod == 0 && (modrm & 7) == 5) {
    has_base = false;
    is_relative = true;
  }
  if (mod == 1) displacement = static_cast<int8_t>(*p++);
  if (mod == 2 || (mod == 0 && !has_base)) {
    std::memcpy(&displacement, p, sizeof(displacement));
    p += sizeof(displacement);
  }
  out.next = reinterpret_cast<int64_t>(p);
  if (!out.is_register) {
    out.address = displacement + (has_base ? RegisterOf(context, base) : is_relative ? out.next : 0);
  }
  return true;
}

// False for an instruction that is none of AMX-TILE and AMX-INT8.
bool CarryOut(const Instruction& it) {
  auto* memory = reinterpret_cast<uint8_t*>(it.address);
  switch (it.opcode) {
    case 0x49:
      if (it.is_register && it.prefix == 0 && it.reg == 0 && it.rm == 0) {
        Clear();
      } else if (it.is_register && it.prefix == 3 && it.rm == 0) {
        Zero(it.reg);
      } else if (!it.is_register && it.prefix == 0 && it.reg == 0) {
        SetShapes(memory + (it.has_sib ? it.stride : 0));
      } else {
        return false;
      }
      return true;
    case 0x4b:
      if (!it.has_sib || it.prefix == 0) return false;
      if (it.prefix == 2) {
        Store(it.reg, memory, it.stride);
      } else {
        Load(it.reg, memory, it.stride);
      }
      return true;
    case 0x5e:
      if (!it.is_register) return false;
      MultiplyBytes(it.reg, it.rm, it.vvvv, it.prefix >= 2, it.prefix == 1 || it.prefix == 3);
      return true;
    default:
      return false;
  }
}

void OnIllegalInstruction(int, siginfo_t*, void* context_pointer) {
  auto& context = *static_cast<ucontext_t*>(context_pointer);
  Instruction instruction;
  if (Decode(context, instruction) && CarryOut(instruction)) {
    context.uc_mcontext.gregs[REG_RIP] = instruction.next;
  } else {
    signal(SIGILL, SIG_DFL);  // and meets it again
  }
}

}  // namespace

void Install() {
  struct sigaction action = {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO;
  RW_CHECK(sigaction(SIGILL, &action, nullptr) == 0, "sigaction of SIGILL");
}

int64_t ProductCount() { return product_count; }
bool IsInUse() { return has_shapes; }

}  // namespace rankwise::amx_emulation
