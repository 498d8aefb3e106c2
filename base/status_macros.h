#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RW_CONCAT_INNER(a, b) a##b
#define RW_CONCAT(a, b) RW_CONCAT_INNER(a, b)

// Returns from the enclosing function when `expr`, an absl::Status, is not OK.
#define RW_RETURN_IF_ERROR(expr)                                         \
  do {                                                                   \
    if (::absl::Status rw_status = (expr); !rw_status.ok()) [[unlikely]] \
      return rw_status;                                                  \
  } while (false)

// RW_ASSIGN_OR_RETURN(auto x, MakeX()): declares x, or returns the error of the StatusOr.
#define RW_ASSIGN_OR_RETURN(lhs, expr) RW_ASSIGN_OR_RETURN_INNER(RW_CONCAT(rw_statusor_, __LINE__), lhs, expr)
#define RW_ASSIGN_OR_RETURN_INNER(statusor, lhs, expr) \
  auto statusor = (expr);                              \
  if (!statusor.ok()) [[unlikely]]                     \
    return statusor.status();                          \
  lhs = std::move(statusor).value()
