// How the runtime fails: an exception whose text names what was wrong, what was needed and what was there. It ends at
// the C interface.
#pragma once

#include <stdexcept>
#include <string>

namespace engram::runtime {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string text(const std::string& part) { return part; }
inline std::string text(const char* part) { return part; }
inline std::string text(long long part) { return std::to_string(part); }
inline std::string text(long part) { return std::to_string(part); }
inline std::string text(int part) { return std::to_string(part); }
inline std::string text(unsigned long part) { return std::to_string(part); }

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  ((message += text(parts)), ...);
  throw Error(message);
}

}  // namespace engram::runtime
