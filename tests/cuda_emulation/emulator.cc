#include "tests/cuda_emulation/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/cuda_emulation/fiber.h"

namespace rankwise::cuda_emulation {
namespace {

struct KernelFault {
  std::string cause;
};

enum class ThreadState { kReady, kAtBarrier, kInMeeting, kGone };

// Who touched a word of shared memory last, and when: epochs count the barriers of the block and of the warp.
struct Touch {
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
};
struct WordShadow {
  bool is_written = false, is_on_its_way = false;
  Touch write;
  // The last reader, and the last before it that is another thread. What other threads of the same warp read was no
  // later than those; whether other warps read in the same epoch of the block is kept as well.
  Touch read, earlier_read;
  bool several_warps_read = false;
};

struct Copy {
  int64_t word;
  int count;
  const void* from;  // null: zeros
  int group;
};

struct Thread {
  Fiber fiber;
  int number = 0;
  Index index;
  ThreadState state = ThreadState::kReady;
  const char* place_file = "";
  int place_line = 0;
  std::string fault;
  std::vector<Copy> copies;  // on their way, in their order
  int groups = 0;            // committed
};

struct Warp {
  const char* meeting_name = nullptr;  // null: nobody waits
  int arrived = 0;
  uint32_t epoch = 0;
  Meeting meeting;
};

// The block that runs on this OS thread. Fibers, warps and memory are kept from block to block.
struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  int thread_count = 0;
  Index index;
  uint32_t epoch = 0;
  std::vector<uint32_t> shared;
  std::vector<WordShadow> shadow;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  Thread* current = nullptr;
  std::mt19937_64 random;
};

Block& ThisBlock() {
  static thread_local Block block;
  return block;
}

uint64_t Seed() {
  const char* seed = std::getenv("RANKWISE_EMULATION_SEED");
  return seed ? std::strtoull(seed, nullptr, 10) : 20240917;
}

void ThreadMain(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  Block& block = ThisBlock();
  try {
    block.body(block.context);
    if (!thread->copies.empty()) Fault("ends with copies on their way");
  } catch (const KernelFault& fault) {
    thread->fault = fault.cause;
  } catch (const std::exception& error) {
    thread->fault = error.what();
  }
  thread->state = ThreadState::kGone;
  thread->fiber.Finish();
}

std::string Where(const Block& block, int thread) {
  return absl::StrCat("block (", block.index.x, ", ", block.index.y, ", ", block.index.z, ") thread ", thread, ": ");
}

void Wait(ThreadState state) {
  Block& block = ThisBlock();
  Thread* thread = block.current;
  thread->state = state;
  thread->fiber.Leave();
}

void StartBlock(Block& block, int64_t shared_bytes) {
  while (static_cast<int>(block.threads.size()) < block.thread_count) {
    block.threads.push_back(std::make_unique<Thread>());
  }
  while (static_cast<int>(block.warps.size()) * kLanes < block.thread_count) {
    block.warps.push_back(std::make_unique<Warp>());
  }
  block.epoch = 1;
  block.shared.assign((shared_bytes + 3) / 4, 0xffffffff);
  block.shadow.assign(block.shared.size(), WordShadow());
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = *block.threads[i];
    thread.number = i;
    thread.index = {.x = static_cast<unsigned>(i)};
    thread.state = ThreadState::kReady;
    thread.fault.clear();
    thread.copies.clear();
    thread.groups = 0;
    thread.fiber.Start(ThreadMain, &thread);
  }
  for (int w = 0; w < block.thread_count / kLanes; ++w) {
    block.warps[w]->meeting_name = nullptr;
    block.warps[w]->arrived = 0;
    block.warps[w]->epoch = 1;
  }
}

// Runs a warp as far as it gets. True if any thread moved.
bool RunWarp(Block& block, int warp, const std::vector<int>& lanes) {
  bool has_moved = false;
  for (bool moves = true; moves;) {
    moves = false;
    for (const int lane : lanes) {
      Thread& thread = *block.threads[warp * kLanes + lane];
      if (thread.state != ThreadState::kReady) continue;
      moves = has_moved = true;
      block.current = &thread;
      thread.fiber.Resume();
      if (!thread.fault.empty()) throw KernelFault{Where(block, thread.number) + thread.fault};
    }
  }
  return has_moved;
}

// No thread can move: all are gone (false), or all are at one barrier and pass it.
bool PassBarrier(Block& block) {
  int gone = 0, waiting = 0;
  const Thread* first = nullptr;
  for (int i = 0; i < block.thread_count; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.state == ThreadState::kGone) ++gone;
    if (thread.state == ThreadState::kInMeeting) {
      throw KernelFault{absl::StrCat(Where(block, i), "waits for its warp in ", block.warps[i / kLanes]->meeting_name,
                                     ", and not all lanes come")};
    }
    if (thread.state != ThreadState::kAtBarrier) continue;
    ++waiting;
    if (first == nullptr) first = &thread;
    if (thread.place_line != first->place_line || std::strcmp(thread.place_file, first->place_file) != 0) {
      throw KernelFault{absl::StrCat(Where(block, i), "is at the barrier of line ", thread.place_line, ", thread ",
                                     first->number, " at that of line ", first->place_line)};
    }
  }
  if (waiting == 0) return false;
  if (gone > 0) {
    throw KernelFault{absl::StrCat(Where(block, first->number), "waits at the barrier of line ", first->place_line,
                                   " for ", gone, " threads that are gone")};
  }
  ++block.epoch;
  for (int i = 0; i < block.thread_count; ++i) block.threads[i]->state = ThreadState::kReady;
  return true;
}

void RunBlock(Block& block, int64_t shared_bytes) {
  StartBlock(block, shared_bytes);
  std::vector<int> warps(block.thread_count / kLanes), lanes(kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::shuffle(warps.begin(), warps.end(), block.random);
  std::shuffle(lanes.begin(), lanes.end(), block.random);
  do {
    for (bool moves = true; moves;) {
      moves = false;
      for (const int warp : warps) moves |= RunWarp(block, warp, lanes);
    }
  } while (PassBarrier(block));
}

// Whether `touch` is this thread's own, or happened before what it does now.
bool IsBefore(const Block& block, const Touch& touch) {
  const int self = block.current->number, warp = self / kLanes;
  if (touch.thread == self || touch.block_epoch < block.epoch) return true;
  return touch.thread / kLanes == warp && touch.warp_epoch < block.warps[warp]->epoch;
}

void Race(int64_t word, const char* what, int other) {
  Fault(absl::StrCat(what, " word ", word, " of shared memory, of thread ", other, ", with no barrier between"));
}

void CheckRead(Block& block, int64_t word) {
  WordShadow& shadow = block.shadow[word];
  if (shadow.is_on_its_way) Fault(absl::StrCat("reads word ", word, " of shared memory, which is on its way"));
  const int self = block.current->number;
  if (!shadow.is_written) Fault(absl::StrCat("reads word ", word, " of shared memory, which nobody wrote"));
  if (!IsBefore(block, shadow.write)) Race(word, "reads", shadow.write.thread);
  if (shadow.read.block_epoch < block.epoch) {
    shadow.several_warps_read = false;
    shadow.earlier_read = {};
  } else if (shadow.read.thread != self) {
    shadow.several_warps_read |= shadow.read.thread / kLanes != self / kLanes;
    shadow.earlier_read = shadow.read;
  }
  shadow.read = {self, block.epoch, block.warps[self / kLanes]->epoch};
}

void CheckWrite(Block& block, int64_t word) {
  WordShadow& shadow = block.shadow[word];
  if (shadow.is_on_its_way) Fault(absl::StrCat("writes word ", word, " of shared memory, which is on its way"));
  const int self = block.current->number;
  if (shadow.is_written && !IsBefore(block, shadow.write)) Race(word, "overwrites", shadow.write.thread);
  if (shadow.several_warps_read && shadow.read.block_epoch == block.epoch) {
    Race(word, "writes what other warps read in", shadow.read.thread);
  }
  for (const Touch& read : {shadow.read, shadow.earlier_read}) {
    if (!IsBefore(block, read)) Race(word, "writes what is read in", read.thread);
  }
  shadow.is_written = true;
  shadow.write = {self, block.epoch, block.warps[self / kLanes]->epoch};
}

}  // namespace

std::string RunGrid(const Index& grid, int threads, int64_t shared_bytes, void (*body)(const void*),
                    const void* context) {
  constexpr int kMostThreads = 1024;
  constexpr int64_t kMostSharedBytes = 163 << 10;  // of sm_80
  if (threads < 1 || threads > kMostThreads || threads % kLanes != 0) {
    return absl::StrCat(threads, " threads in a block");
  }
  if (shared_bytes < 0 || shared_bytes > kMostSharedBytes) return absl::StrCat(shared_bytes, " bytes of shared memory");
  if (grid.y > 65535 || grid.z > 65535) return absl::StrCat("a grid of ", grid.x, ", ", grid.y, ", ", grid.z);
  static thread_local uint64_t launch = 0;
  Block& block = ThisBlock();
  block.random.seed(Seed() + launch++);
  block.thread_count = threads;
  block.body = body;
  block.context = context;
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          block.index = {x, y, z};
          RunBlock(block, shared_bytes);
        }
      }
    }
  } catch (const KernelFault& fault) {
    return fault.cause;
  }
  return CheckAllocations();
}

const Index& ThreadIndex() { return ThisBlock().current->index; }
const Index& BlockIndex() { return ThisBlock().index; }
int Lane() { return ThisBlock().current->number % kLanes; }

void Fault(const std::string& cause) { throw KernelFault{cause}; }

void BlockBarrier(const char* file, int line) {
  Thread* thread = ThisBlock().current;
  thread->place_file = file;
  thread->place_line = line;
  Wait(ThreadState::kAtBarrier);
}

void WarpBarrier() {
  Meet("__syncwarp", nullptr, 0, nullptr, 0, [](Meeting&) {
    Block& block = ThisBlock();
    ++block.warps[block.current->number / kLanes]->epoch;
  });
}

void Meet(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes, void (*compute)(Meeting&)) {
  Block& block = ThisBlock();
  const int self = block.current->number, lane = self % kLanes;
  Warp& warp = *block.warps[self / kLanes];
  if (warp.arrived > 0 && std::strcmp(warp.meeting_name, name) != 0) {
    Fault(absl::StrCat("is in ", name, " while other lanes are in ", warp.meeting_name));
  }
  warp.meeting_name = name;
  if (in_bytes > 0) std::memcpy(warp.meeting.in[lane], in, in_bytes);
  if (++warp.arrived == kLanes) {
    compute(warp.meeting);
    warp.arrived = 0;
    for (int i = 0; i < kLanes; ++i) block.threads[self - lane + i]->state = ThreadState::kReady;
  } else {
    Wait(ThreadState::kInMeeting);
  }
  if (out_bytes > 0) std::memcpy(out, warp.meeting.out[lane], out_bytes);
}

void CopyLater(int64_t word, int count, const void* from) {
  SharedWords(word, count, Access::kWrite);
  Block& block = ThisBlock();
  for (int64_t i = word; i < word + count; ++i) block.shadow[i].is_on_its_way = true;
  block.current->copies.push_back({word, count, from, block.current->groups});
}

void CommitCopies() { ++ThisBlock().current->groups; }

void WaitForCopies(int groups_left) {
  Block& block = ThisBlock();
  auto& copies = block.current->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < block.current->groups - groups_left; ++copy) {
    for (int64_t i = copy->word; i < copy->word + copy->count; ++i) block.shadow[i].is_on_its_way = false;
    uint32_t* to = SharedWords(copy->word, copy->count, Access::kWrite);
    if (copy->from == nullptr) {
      std::fill_n(to, copy->count, 0);
    } else {
      std::memcpy(to, copy->from, copy->count * sizeof(uint32_t));
    }
  }
  copies.erase(copies.begin(), copy);
}

uint32_t* SharedWords(int64_t word, int count, Access access) {
  Block& block = ThisBlock();
  if (word < 0 || word + count > static_cast<int64_t>(block.shared.size())) {
    Fault(absl::StrCat("touches word ", word, " of ", block.shared.size(), " of shared memory"));
  }
  for (int64_t i = word; i < word + count; ++i) access == Access::kRead ? CheckRead(block, i) : CheckWrite(block, i);
  return block.shared.data() + word;
}

}  // namespace rankwise::cuda_emulation
