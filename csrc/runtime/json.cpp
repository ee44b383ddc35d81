#include "runtime/json.h"

#include <algorithm>
#include <charconv>

#include "runtime/error.h"

namespace engram::runtime {

class Json::Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = parse_value(0);
    skip_space();
    check(at_ == text_.size(), "the end");
    return value;
  }

 private:
  static constexpr int kMostDepth = 16;

  void check(bool condition, const char* wanted) const {
    require(condition, "JSON: expected ", wanted, " at byte ", at_);
  }
  bool ends() const { return at_ >= text_.size(); }
  char next() const { return ends() ? '\0' : text_[at_]; }
  void skip_space() {
    while (!ends() && (next() == ' ' || next() == '\t' || next() == '\n' || next() == '\r')) ++at_;
  }
  bool take(char c) {
    skip_space();
    if (ends() || next() != c) return false;
    ++at_;
    return true;
  }
  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse_value(int depth) {
    check(depth < kMostDepth, "less nesting");
    skip_space();
    Json value;
    if (take('{')) {
      value.type_ = Type::kObject;
      if (!take('}')) {
        do {
          skip_space();
          std::string key = parse_string();
          check(take(':'), "':'");
          Json member = parse_value(depth + 1);
          value.object_.emplace_back(std::move(key), std::move(member));
        } while (take(','));
        check(take('}'), "'}'");
        check_keys(value);
      }
    } else if (take('[')) {
      value.type_ = Type::kList;
      if (!take(']')) {
        do {
          value.list_.push_back(parse_value(depth + 1));
        } while (take(','));
        check(take(']'), "']'");
      }
    } else if (next() == '"') {
      value.type_ = Type::kString;
      value.string_ = parse_string();
    } else if (take_word("true") || take_word("false")) {
      value.type_ = Type::kFlag;
      value.flag_ = text_[at_ - 2] == 'u';
    } else if (!take_word("null")) {
      parse_number(value);
    }
    return value;
  }

  static void check_keys(const Json& value) {
    std::vector<std::string_view> keys;
    for (const auto& entry : value.object_) keys.push_back(entry.first);
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    require(twice == keys.end(), "JSON: expected each key once, got ", std::string(twice == keys.end() ? "" : *twice),
            " again");
  }

  void parse_number(Json& value) {
    const size_t first = at_;
    const auto digits = [&] {
      check(next() >= '0' && next() <= '9', "a value");
      while (next() >= '0' && next() <= '9') ++at_;
    };
    if (next() == '-') ++at_;
    digits();
    bool whole = true;
    if (next() == '.') whole = false, ++at_, digits();
    if (next() == 'e' || next() == 'E') {
      whole = false, ++at_;
      if (next() == '+' || next() == '-') ++at_;
      digits();
    }
    const char *begin = text_.data() + first, *end = text_.data() + at_;
    if (whole && std::from_chars(begin, end, value.integer_).ec == std::errc()) {
      value.type_ = Type::kInteger;
      return;
    }
    value.type_ = Type::kReal;
    check(std::from_chars(begin, end, value.real_).ec == std::errc(), "a number in the range of float64");
  }

  std::string parse_string() {
    check(!ends() && next() == '"', "a string");
    ++at_;
    std::string out;
    while (true) {
      check(!ends() && static_cast<unsigned char>(next()) >= 0x20, "the end of a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      check(!ends(), "an escape");
      switch (text_[at_++]) {
        case '"':
          out += '"';
          break;
        case '\\':
          out += '\\';
          break;
        case '/':
          out += '/';
          break;
        case 'b':
          out += '\b';
          break;
        case 'f':
          out += '\f';
          break;
        case 'n':
          out += '\n';
          break;
        case 'r':
          out += '\r';
          break;
        case 't':
          out += '\t';
          break;
        case 'u':
          append_utf8(out, parse_code_point());
          break;
        default:
          check(false, "an escape");
      }
    }
  }

  uint32_t parse_hex() {
    uint32_t value = 0;
    const char *begin = text_.data() + at_, *end = begin + 4;
    check(text_.size() - at_ >= 4 && std::from_chars(begin, end, value, 16).ptr == end && *begin != '-',
          "four hexadecimal digits");
    at_ += 4;
    return value;
  }

  uint32_t parse_code_point() {
    const uint32_t high = parse_hex();
    if (high < 0xD800 || high > 0xDFFF) return high;
    check(high < 0xDC00 && take_word("\\u"), "a pair of surrogates");
    const uint32_t low = parse_hex();
    check(low >= 0xDC00 && low <= 0xDFFF, "a pair of surrogates");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append_utf8(std::string& out, uint32_t code) {
    const auto byte = [&](uint32_t value) { out += static_cast<char>(value); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
    } else {
      byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)),
          byte(0x80 | (code & 0x3F));
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return Parser(text).whole(); }

int64_t Json::integer(const std::string& what) const {
  require(type_ == Type::kInteger, what, ": expected an integer");
  return integer_;
}

double Json::number(const std::string& what) const {
  require(type_ == Type::kInteger || type_ == Type::kReal, what, ": expected a number");
  return type_ == Type::kInteger ? static_cast<double>(integer_) : real_;
}

bool Json::flag(const std::string& what) const {
  require(type_ == Type::kFlag, what, ": expected true or false");
  return flag_;
}

const std::string& Json::string(const std::string& what) const {
  require(type_ == Type::kString, what, ": expected a string");
  return string_;
}

const std::vector<Json>& Json::list(const std::string& what) const {
  require(type_ == Type::kList, what, ": expected a list");
  return list_;
}

const std::vector<std::pair<std::string, Json>>& Json::object(const std::string& what) const {
  require(type_ == Type::kObject, what, ": expected an object");
  return object_;
}

const Json* Json::find(const std::string& key, const std::string& what) const {
  for (const auto& [name, value] : object(what))
    if (name == key) return &value;
  return nullptr;
}

const Json& Json::at(const std::string& key, const std::string& what) const {
  const Json* value = find(key, what);
  require(value != nullptr, what, ": expected the key ", key, ", got none");
  return *value;
}

}  // namespace engram::runtime
