#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "launch/eval/tasks.h"

// From what a model answered to numbers. Pure.
namespace rankwise::eval {

// A number without thousands separators, currency signs and a fraction of zeros ("$1,234.00" gives "1234"): what is
// behind the last "####", else the last number in the text. Empty when there is none.
std::string ExtractNumber(const std::string& text);

// See Extraction.
std::string ExtractOption(const std::string& text);
std::string ExtractPhrase(const std::string& text);
std::string ExtractLetter(const std::string& text, char last_letter);
std::string ExtractFirstCapital(const std::string& text);

// "The Beatles, of course" gives "beatles".
std::string NormalizeFact(const std::string& text);
// The first line of an answer, behind its last "answer is".
std::string ExtractFact(const std::string& text);

// What a continuation answers, in the form of Item::answers. Requires: the item is generated.
std::string ExtractAnswer(const Item& item, const std::string& text);
bool IsCorrect(const Item& item, const std::string& text);

// The index of the largest; the first of equals. With `is_per_byte` each is divided by the bytes of its target, less
// the leading space. Requires: one log-probability for each choice.
size_t BestChoice(const Item& item, std::span<const double> log_probabilities, bool is_per_byte);

// What is known of a distribution over the next token: the log-probability of the token that came, and of the
// likeliest.
struct KnownTokens {
  int32_t id;
  double log_probability;
  std::vector<std::pair<int32_t, double>> top;  // by falling probability; may hold `id`
};

// Σ p log(p / q) over the tokens known in both and one bucket for all others: at most KL(p ‖ q), and equal to it when
// both know the whole vocabulary. Requires: the same token came.
double KlLowerBound(const KnownTokens& p, const KnownTokens& q);

}  // namespace rankwise::eval
