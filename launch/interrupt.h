#pragma once

#include <initializer_list>

namespace rankwise::launch {

// Ctrl-C and its kin as something to wait for. Blocks SIGINT, SIGTERM, SIGHUP and `others` for this thread and those it
// starts: create it before any other thread.
class Interrupt {
 public:
  explicit Interrupt(std::initializer_list<int> others = {});
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  int fd() const { return fd_; }  // readable once a signal has come
  bool has_come() const;
  void Acknowledge();  // so that the next one can be told from this one

 private:
  const int fd_;
};

}  // namespace rankwise::launch
