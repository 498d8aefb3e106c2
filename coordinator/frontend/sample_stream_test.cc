#include "coordinator/frontend/sample_stream.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/time/clock.h"
#include "coordinator/text/test_models.h"

namespace rankwise::frontend {
namespace {

TEST(SampleStreamTest, WhatAClientDoesNotReadIsJoined) {
  const text::ModelFolder folder;
  folder.Write("tokenizer.json", text::ByteLevelModel({}));
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  auto stream =
      SampleStream::Create(rankwise::v1::GenerateRequest(), {.tokenizer = tokenizer->get(), .started = absl::Now()});
  ASSERT_TRUE(stream.ok());
  std::string said;
  for (uint32_t i = 0; i < 1000; ++i) {
    worker::v1::SequenceOutput output;
    output.set_token_offset(i);
    output.add_tokens()->set_id('a' + i % 26);
    said.push_back(static_cast<char>('a' + i % 26));
    output.set_finished(i == 999);
    output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(stream->Take(output, 0, absl::Now()), i == 999);
  }
  std::string text;
  int pieces = 0;
  for (; stream->has_piece(); ++pieces) text += stream->TakePiece().text();
  EXPECT_EQ(text, said);
  EXPECT_EQ(pieces, 2);
}

}  // namespace
}  // namespace rankwise::frontend
