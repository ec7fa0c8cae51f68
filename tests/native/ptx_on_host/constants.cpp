// Constants in the text of PTX: integers, decimal fractions, floats by their bits.
#include <cstring>

#include "statement.h"

namespace ptx_on_host {

uint64_t constant_bits(const std::string& text, Type type) {
  const auto bits_of_double = [&](double value) {
    uint64_t bits = 0;
    if (type == Type::f64) {
      std::memcpy(&bits, &value, sizeof value);
    } else {
      const auto single = static_cast<float>(value);
      std::memcpy(&bits, &single, sizeof single);
    }
    return bits;
  };
  const bool hexadecimal = text.size() > 2 && text[0] == '0';
  if (hexadecimal && (text[1] == 'f' || text[1] == 'F')) {
    const auto bits = static_cast<uint32_t>(std::stoul(text.substr(2), nullptr, 16));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return type == Type::f64 ? bits_of_double(value) : bits;
  }
  if (hexadecimal && (text[1] == 'd' || text[1] == 'D')) {
    const uint64_t bits = std::stoull(text.substr(2), nullptr, 16);
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return type == Type::f32 ? bits_of_double(value) : bits;
  }
  if (text.find('.') != std::string::npos) return bits_of_double(std::stod(text));
  // An integer may end in U.
  return text[0] == '-' ? static_cast<uint64_t>(std::stoll(text, nullptr, 0))
                        : std::stoull(text, nullptr, 0);
}

}  // namespace ptx_on_host
