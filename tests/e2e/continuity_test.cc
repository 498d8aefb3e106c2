// What outlives its client's connection, its coordinator and the whole deployment; who may use it; and its end.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/client.h"
#include "launch/resuming_stream.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using ::testing::HasSubstr;

constexpr char kPrompt[] = "Once upon a time";

// Other streams, so many that one alone does not end within milliseconds, from its creation to its end.
class Company {
 public:
  explicit Company(rankwise::v1::Inference::Stub& stub) {
    for (int i = 0; i < 24; ++i) {
      threads_.emplace_back([this, &stub, i] {
        GenerateRequest request = Sampled(kPrompt, 900, 100 + i);
        request.mutable_sampling()->set_ignore_eos(true);
        while (!is_over_) {
          if (!Generate(stub, request, {.should_cancel = [this](const Reply&) { return is_over_.load(); }})
                   .status.ok()) {
            absl::SleepFor(absl::Milliseconds(10));
          }
        }
      });
    }
  }
  ~Company() {
    is_over_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> is_over_ = false;
  std::vector<std::thread> threads_;
};

class KilledCoordinator : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Journal, KilledCoordinator, ::testing::Bool());

TEST_P(KilledCoordinator, ItsStreamsGoOn) {
  const bool has_journal = GetParam();
  const std::string journal = absl::StrCat(ScratchFolder(), "/journal");
  GenerateRequest request = Sampled(kPrompt, 900, 11);
  request.mutable_sampling()->set_ignore_eos(true);
  std::vector<std::string> flags;
  if (has_journal) flags = {"--journal", journal};
  const auto cluster = Serve({.tp = 2, .coordinator_flags = flags});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  const Reply undisturbed = Generate(stub, request);
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;
  Stream reading(stub, request, {.is_resuming = true});
  int kills = 0;
  for (; kills < 2; ++kills) {
    const size_t before = reading.received();
    ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return reading.received() > before + 20; }));
    // With a journal the stream goes on before its client is back, and may have ended by then.
    if (kills == 1 && reading.is_finished()) break;
    ASSERT_FALSE(reading.is_finished());
    kill((*cluster)->pid(-1), SIGKILL);
    ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return (*cluster)->failures() == kills + 1; }));
  }
  ASSERT_TRUE(SuperviseUntil(**cluster, [&] { return reading.is_finished(); }));
  const Reply reply = reading.Join();
  EXPECT_GE(reply.resumes, kills);
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_EQ(reply.ids, undisturbed.ids);
  EXPECT_EQ(reply.text, undisturbed.text);
  EXPECT_TRUE((*cluster)->Drain().ok());
}

TEST(Journal, GoesOnWithoutAClientInTheNextDeployment) {
  const std::string journal = absl::StrCat(ScratchFolder(), "/journal-of-two");
  GenerateRequest request = Sampled(kPrompt, 600, 3);
  request.mutable_sampling()->set_ignore_eos(true);
  GenerateRequest lingering = request;
  lingering.set_request_id("mine");
  lingering.set_linger_ms(600'000);
  {
    const auto cluster = Serve({.coordinator_flags = {"--journal", journal}});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    {
      const Company company((*cluster)->stub());
      const Reply cut = Generate((*cluster)->stub(), lingering,
                                 {.should_cancel = [](const Reply& reply) { return reply.ids.size() > 20; }});
      ASSERT_TRUE(absl::IsCancelled(cut.status)) << cut.status;
    }
    absl::SleepFor(absl::Milliseconds(30));  // the journal writes what comes together in one transaction
    (*cluster)->Kill();
  }
  const auto cluster = Serve({.coordinator_flags = {"--journal", journal}});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto& stub = (*cluster)->stub();
  ASSERT_TRUE(WaitIdle(stub).ok());  // it was finished without a client
  const auto load = Load(stub);
  ASSERT_TRUE(load.ok());
  EXPECT_EQ(load->kept_streams(), 1u);
  const uint64_t generated = load->groups(0).generated_tokens();
  EXPECT_LT(generated, 600u);  // of the 600, what was delivered was not computed again
  lingering.mutable_resume();
  const Reply rest = Generate(stub, lingering);
  EXPECT_TRUE(rest.status.ok()) << rest.status;
  EXPECT_EQ(rest.ids, Generate(stub, request).ids);
}

TEST(Drain, EndsWithinItsTimeWhateverIsLive) {
  GenerateRequest request = Sampled(kPrompt, 900, 3);
  request.mutable_sampling()->set_ignore_eos(true);
  const std::string folder = absl::StrCat(ScratchFolder(), "/drained");
  std::filesystem::create_directories(folder);
  const std::string endpoint_file = folder + "/endpoint";
  auto serve = launch::ChildProcess::Start(
      {.command = {ProgramFolder() + "/rankwise", "serve", DemoModel(), "--tp", "2", "--kv", "f16", "--threads", "1",
                   "--endpoint-file", endpoint_file, "--drain-timeout", "2"},
       .environment = {absl::StrCat("HOME=", folder)},
       .log_path = folder + "/log"});
  ASSERT_TRUE(serve.ok()) << serve.status();
  for (const absl::Time deadline = absl::Now() + kPatience; !std::filesystem::exists(endpoint_file);) {
    ASSERT_LT(absl::Now(), deadline) << (*serve)->LogTail();
    absl::SleepFor(absl::Milliseconds(10));
  }
  const auto stub = launch::Connect({.endpoint_file = endpoint_file});
  ASSERT_TRUE(stub.ok()) << stub.status();
  // By its address alone, its user finds the token at home.
  const std::string endpoint(absl::StripAsciiWhitespace(ReadTextFile(endpoint_file).value()));
  EXPECT_TRUE(std::filesystem::exists(absl::StrCat(folder, "/.rankwise/tokens/", endpoint)));
  std::atomic<bool> has_begun = false;
  Reply reply;
  // As many as take longer than the drain may.
  std::vector<std::thread> clients;
  for (int i = 0; i < 96; ++i) {
    clients.emplace_back([&, i] {
      const Reply ended = Generate(**stub, request, {.should_cancel = [&](const Reply&) {
        has_begun = true;
        return false;
      }});
      if (i == 95) reply = ended;
    });
  }
  for (const absl::Time give_up = absl::Now() + kPatience; !has_begun && absl::Now() < give_up;) {
    absl::SleepFor(absl::Milliseconds(2));
  }
  const absl::Time begin = absl::Now();
  (*serve)->Signal(SIGTERM);
  const auto state = (*serve)->Wait(absl::Now() + kPatience);
  const absl::Duration took = absl::Now() - begin;
  for (std::thread& client : clients) client.join();
  ASSERT_TRUE(state);
  EXPECT_TRUE(state->is_success()) << state->ToString() << "\n" << (*serve)->LogTail();
  EXPECT_LT(took, absl::Seconds(2 + 4));  // and the groups' goodbye
  EXPECT_TRUE(absl::IsUnavailable(reply.status)) << reply.status;
  EXPECT_FALSE(std::filesystem::exists(absl::StrCat(folder, "/.rankwise/tokens/", endpoint)));
  EXPECT_FALSE(std::filesystem::exists(launch::TokenFileOf(endpoint_file)));
}

// The credentials that a deployment makes for itself.
TEST(Credentials, AreAskedForByDefault) {
  const auto cluster = Serve({.has_tokens = true});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  EXPECT_TRUE(Generate((*cluster)->stub(), Greedy(kPrompt, 4)).status.ok());
  const auto stranger = launch::ConnectTo((*cluster)->endpoint());
  EXPECT_TRUE(absl::IsUnauthenticated(Generate(*stranger, Greedy(kPrompt, 4)).status));
  const auto refused = RunProgram("rankwise", {"status", "--endpoint", (*cluster)->endpoint()});
  ASSERT_TRUE(refused.ok());
  EXPECT_NE(refused->state.code, 0);
  EXPECT_THAT(refused->log, HasSubstr("Bearer"));
  const auto shown = RunProgram(
      "rankwise", {"status", "--endpoint", (*cluster)->endpoint(), "--token-file", (*cluster)->token_file()});
  ASSERT_TRUE(shown.ok());
  EXPECT_EQ(shown->state.code, 0) << shown->log;
  // Tokens are in files, not in what everybody on the host can read of a process.
  std::ifstream file(absl::StrCat("/proc/", (*cluster)->pid(-1), "/cmdline"));
  std::string command((std::istreambuf_iterator<char>(file)), {});
  EXPECT_THAT(command, ::testing::Not(HasSubstr((*cluster)->credentials().token)));
  EXPECT_TRUE((*cluster)->Drain().ok());
}

TEST(GenerateCommand, GoesOnWhenTheCoordinatorComesBack) {
  const auto cluster = Serve({.tp = 2});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const std::vector<std::string> command = {ProgramFolder() + "/rankwise",
                                            "generate",
                                            "--endpoint",
                                            (*cluster)->endpoint(),
                                            "--max-tokens",
                                            "900",
                                            "--ignore-eos",
                                            "--seed",
                                            "5",
                                            kPrompt};
  const auto run = [&](bool kills) {
    static int count = 0;
    auto child = launch::ChildProcess::Start(
        {.command = command, .log_path = absl::StrCat(ScratchFolder(), "/generate-resumed-", count++)});
    EXPECT_TRUE(child.ok()) << child.status();
    const auto text = [&] { return (*child)->LogTail(10'000); };
    if (kills) {
      EXPECT_TRUE(SuperviseUntil(**cluster, [&] { return text().size() > 100; }));
      kill((*cluster)->pid(-1), SIGKILL);
    }
    std::optional<launch::ExitState> state;
    EXPECT_TRUE(SuperviseUntil(**cluster, [&] { return (state = (*child)->Wait(absl::InfinitePast())).has_value(); }));
    EXPECT_TRUE(state && state->is_success()) << text();
    return text();
  };
  const std::string undisturbed = run(false), resumed = run(true);
  EXPECT_THAT(resumed, HasSubstr("going on"));
  // The text, without the two lines on stderr.
  const auto without_notes = [](std::string text) {
    std::string kept;
    for (size_t at = 0; at < text.size();) {
      if (text[at] == '[') {
        at = std::min(text.find(']', at), text.size() - 1) + 1;
        while (at < text.size() && text[at] == '\n') ++at;
        continue;
      }
      kept.push_back(text[at++]);
    }
    std::erase(kept, '\n');
    return kept;
  };
  EXPECT_EQ(without_notes(resumed), without_notes(undisturbed));
  EXPECT_TRUE((*cluster)->Drain().ok());
}

}  // namespace
}  // namespace rankwise::e2e
