// The arguments of the metaplastic updates, stated once: the schemas, the unpacking of a call and the struct follow.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/checks.h"

namespace engram::bindings {

// Whether the update writes it, type, name, default. 1e39 is infinity in float32: a schema cannot say inf.
#define ENGRAM_UPDATE_STATE(ARGUMENT)    \
  ARGUMENT(true, Tensor, exp_avg, "")    \
  ARGUMENT(true, Tensor, exp_avg_sq, "") \
  ARGUMENT(true, std::optional<Tensor>, sign_bits, "")
#define ENGRAM_UPDATE_SETTINGS(ARGUMENT)                           \
  ARGUMENT(false, double, lr, "")                                  \
  ARGUMENT(false, double, beta1, "")                               \
  ARGUMENT(false, double, beta2, "")                               \
  ARGUMENT(false, double, eps, "")                                 \
  ARGUMENT(false, double, weight_decay, "")                        \
  ARGUMENT(false, double, metaplasticity, "")                      \
  ARGUMENT(false, int64_t, step, "")                               \
  ARGUMENT(false, double, weight_bound, "=1e39")                   \
  ARGUMENT(true, std::optional<Tensor>, exp_avg_scale, "=None")    \
  ARGUMENT(true, std::optional<Tensor>, exp_avg_sq_scale, "=None") \
  ARGUMENT(false, std::optional<Tensor>, seed, "=None")            \
  ARGUMENT(false, int64_t, first_row, "=0")

#define ENGRAM_MEMBER(written, Type, name, standard) Type name;
struct UpdateArguments {
  Tensor weight;
  ENGRAM_UPDATE_STATE(ENGRAM_MEMBER)
  ENGRAM_UPDATE_SETTINGS(ENGRAM_MEMBER)
};
#undef ENGRAM_MEMBER

// A schema: `first` opens it and ends with the weight's or the gradient's argument, the rest follows.
std::string update_schema(const char* first, bool in_place, const char* result);

}  // namespace engram::bindings
