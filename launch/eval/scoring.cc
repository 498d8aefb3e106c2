#include "launch/eval/scoring.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"

namespace rankwise::eval {
namespace {

constexpr absl::string_view kAnswerIs = "answer is ";

bool IsCapital(char c) { return c >= 'A' && c <= 'Z'; }

// Behind the first "answer is "; all of it when there is none.
absl::string_view BehindAnswerIs(absl::string_view text) {
  const size_t at = text.find(kAnswerIs);
  return absl::StripAsciiWhitespace(at == absl::string_view::npos ? text : text.substr(at + kAnswerIs.size()));
}

// Digits with thousands separators and a fraction, from `at`, with the sign before it.
std::string NumberAt(absl::string_view text, size_t at) {
  std::string number = at > 0 && text[at - 1] == '-' && (at < 2 || !absl::ascii_isalnum(text[at - 2])) ? "-" : "";
  bool has_point = false;
  for (size_t i = at; i < text.size(); ++i) {
    const bool digit_follows = i + 1 < text.size() && absl::ascii_isdigit(text[i + 1]);
    if (absl::ascii_isdigit(text[i])) {
      number += text[i];
    } else if (text[i] == '.' && digit_follows && !has_point) {
      has_point = true;
      number += '.';
    } else if (text[i] != ',' || !digit_follows || has_point) {
      break;
    }
  }
  if (has_point) {
    number.erase(number.find_last_not_of('0') + 1);
    if (number.back() == '.') number.pop_back();
  }
  return number;
}

bool IsPunctuation(unsigned char c) { return absl::ascii_ispunct(c) && c != '_'; }

}  // namespace

std::string ExtractNumber(const std::string& text) {
  absl::string_view rest = text;
  if (const size_t mark = rest.rfind("####"); mark != absl::string_view::npos) {
    const absl::string_view behind = rest.substr(mark + 4);
    if (behind.find_first_of("0123456789") != absl::string_view::npos) {
      rest = absl::StripAsciiWhitespace(behind);
      return NumberAt(rest, rest.find_first_of("0123456789"));
    }
  }
  const size_t last = rest.find_last_of("0123456789");
  if (last == absl::string_view::npos) return "";
  size_t begin = last;
  while (begin > 0 && (absl::ascii_isdigit(rest[begin - 1]) || ((rest[begin - 1] == ',' || rest[begin - 1] == '.') &&
                                                                begin > 1 && absl::ascii_isdigit(rest[begin - 2]))))
    --begin;
  return NumberAt(rest, begin);
}

std::string ExtractOption(const std::string& text) {
  const absl::string_view answer = BehindAnswerIs(text);
  for (size_t i = 0; i + 1 < answer.size(); ++i) {
    if (answer[i] == '(' && IsCapital(answer[i + 1])) return std::string(answer.substr(i + 1, 1));
  }
  return ExtractFirstCapital(std::string(answer));
}

std::string ExtractPhrase(const std::string& text) {
  const absl::string_view answer = BehindAnswerIs(text);
  absl::string_view line = absl::StripAsciiWhitespace(answer.substr(0, answer.find('\n')));
  if (absl::ConsumeSuffix(&line, ".")) line = absl::StripTrailingAsciiWhitespace(line);
  return std::string(line);
}

std::string ExtractLetter(const std::string& text, char last_letter) {
  const auto is_word = [&](size_t i) { return i < text.size() && (absl::ascii_isalnum(text[i]) || text[i] == '\''); };
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] >= 'A' && text[i] <= last_letter && !(i > 0 && is_word(i - 1)) && !is_word(i + 1))
      return text.substr(i, 1);
  }
  return "";
}

std::string ExtractFirstCapital(const std::string& text) {
  const auto it = std::ranges::find_if(text, IsCapital);
  return it == text.end() ? "" : std::string(1, *it);
}

std::string NormalizeFact(const std::string& text) {
  std::string kept;
  for (const char c : absl::string_view(text).substr(0, text.find_first_of("\n.,"))) {
    if (!IsPunctuation(static_cast<unsigned char>(c))) kept += absl::ascii_tolower(static_cast<unsigned char>(c));
  }
  std::string words;
  for (const absl::string_view word : absl::StrSplit(kept, absl::ByAnyChar(" \t\r\v\f"), absl::SkipEmpty())) {
    if (word != "a" && word != "an" && word != "the") absl::StrAppend(&words, words.empty() ? "" : " ", word);
  }
  return words;
}

std::string ExtractFact(const std::string& text) {
  absl::string_view answer = absl::StripAsciiWhitespace(text);
  answer = answer.substr(0, answer.find('\n'));
  std::string lower = absl::AsciiStrToLower(answer);
  const std::string mark = "answer is";
  if (const size_t at = lower.rfind(mark); at != std::string::npos) lower.erase(0, at + mark.size());
  return NormalizeFact(lower);
}

std::string ExtractAnswer(const Item& item, const std::string& text) {
  switch (item.extraction) {
    case Extraction::kNumber:
      return ExtractNumber(text);
    case Extraction::kOption:
      return ExtractOption(text);
    case Extraction::kPhrase:
      return ExtractPhrase(text);
    case Extraction::kFact:
      return ExtractFact(text);
    case Extraction::kLetter:
      return ExtractLetter(text, item.last_letter);
    case Extraction::kFirstCapital:
      return ExtractFirstCapital(text);
  }
  RW_CHECK(false, "an extraction that does not exist");
  return "";
}

bool IsCorrect(const Item& item, const std::string& text) {
  const std::string answer = ExtractAnswer(item, text);
  return !answer.empty() && std::ranges::find(item.answers, answer) != item.answers.end();
}

size_t BestChoice(const Item& item, std::span<const double> log_probabilities, bool is_per_byte) {
  RW_CHECK(log_probabilities.size() == item.choices.size(), "one log-probability for each choice");
  std::vector<double> scores(log_probabilities.begin(), log_probabilities.end());
  if (is_per_byte) {
    for (size_t i = 0; i < scores.size(); ++i) {
      const absl::string_view target = absl::StripLeadingAsciiWhitespace(item.choices[i].target);
      scores[i] /= static_cast<double>(std::max<size_t>(target.size(), 1));
    }
  }
  return static_cast<size_t>(std::ranges::max_element(scores) - scores.begin());
}

double KlLowerBound(const KnownTokens& p, const KnownTokens& q) {
  RW_CHECK(p.id == q.id, "two distributions of one position");
  constexpr double kLeastRest = 1e-9;  // the rest is a difference of rounded numbers
  std::map<int32_t, double> known(q.top.begin(), q.top.end());
  known.emplace(q.id, q.log_probability);
  std::map<int32_t, double> own(p.top.begin(), p.top.end());
  own.emplace(p.id, p.log_probability);
  double divergence = 0, p_rest = 1, q_rest = 1;
  for (const auto& [id, log_p] : own) {
    const auto it = known.find(id);
    if (it == known.end()) continue;
    divergence += std::exp(log_p) * (log_p - it->second);
    p_rest -= std::exp(log_p);
    q_rest -= std::exp(it->second);
  }
  p_rest = std::max(p_rest, kLeastRest);
  q_rest = std::max(q_rest, kLeastRest);
  return std::max(0.0, divergence + p_rest * std::log(p_rest / q_rest));
}

}  // namespace rankwise::eval
