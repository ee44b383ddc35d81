// JSON as the header of a packed file has it. A library would be larger than the rest of the runtime.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace engram::runtime {

class Json {
 public:
  // Raises: Error with the position, for text that is not one JSON value, is nested too deeply or names a key twice.
  static Json parse(std::string_view text);

  // These raise an Error that names `what` where the value is of another type.
  int64_t integer(const std::string& what) const;
  double number(const std::string& what) const;
  bool flag(const std::string& what) const;
  const std::string& string(const std::string& what) const;
  const std::vector<Json>& list(const std::string& what) const;
  const std::vector<std::pair<std::string, Json>>& object(const std::string& what) const;
  // The value of a key of an object; null if it has none.
  const Json* find(const std::string& key, const std::string& what) const;
  // The same, an Error if it has none.
  const Json& at(const std::string& key, const std::string& what) const;

  bool is_null() const { return type_ == Type::kNull; }
  bool is_integer() const { return type_ == Type::kInteger; }

 private:
  enum class Type { kNull, kFlag, kInteger, kReal, kString, kList, kObject };
  class Parser;

  Type type_ = Type::kNull;
  bool flag_ = false;
  int64_t integer_ = 0;
  double real_ = 0;
  std::string string_;
  std::vector<Json> list_;
  std::vector<std::pair<std::string, Json>> object_;
};

}  // namespace engram::runtime
