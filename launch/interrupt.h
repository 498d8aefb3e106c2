#pragma once

namespace rankwise::launch {

// Ctrl-C and its kin as something to wait for. Blocks SIGINT, SIGTERM and SIGHUP for this thread and those it starts:
// create it before any other thread.
class Interrupt {
 public:
  Interrupt();
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
