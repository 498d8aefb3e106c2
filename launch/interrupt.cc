#include "launch/interrupt.h"

#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <csignal>

#include "base/check.h"

namespace rankwise::launch {
namespace {

int BlockAndOpen(std::initializer_list<int> others) {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals, signal);
  for (const int signal : others) sigaddset(&signals, signal);
  RW_CHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0);
  return signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

}  // namespace

Interrupt::Interrupt(std::initializer_list<int> others) : fd_(BlockAndOpen(others)) { RW_CHECK(fd_ >= 0); }

Interrupt::~Interrupt() { close(fd_); }

bool Interrupt::has_come() const {
  pollfd event{fd_, POLLIN, 0};
  return poll(&event, 1, 0) == 1;
}

void Interrupt::Acknowledge() {
  signalfd_siginfo info;
  while (read(fd_, &info, sizeof(info)) > 0) {
  }
}

}  // namespace rankwise::launch
