// Taking an instruction's text apart; statement.h has the idea.
#include "statement.h"

#include <algorithm>
#include <sstream>

namespace ptx_on_host {

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  part = trimmed(part);
  if (!part.empty()) parts.push_back(part);
  return parts;
}

Statement::Statement(const std::string& text, Names& names) : text_(text), names_(names) {
  const size_t end = text.find_first_of(" \t\n[{");
  std::istringstream words(text.substr(0, end));
  std::getline(words, opcode_, '.');
  for (std::string modifier; std::getline(words, modifier, '.');) modifiers_.push_back(modifier);
  if (end != std::string::npos) operands_ = split_operands(trimmed(text.substr(end)));
}

bool Statement::take(std::string_view modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

int Statement::take_one_of(std::initializer_list<std::string_view> modifiers) {
  int index = 0;
  for (const std::string_view modifier : modifiers) {
    if (take(modifier)) return index;
    ++index;
  }
  return -1;
}

Type Statement::take_type() {
  for (auto modifier = modifiers_.begin(); modifier != modifiers_.end(); ++modifier)
    if (const Type type = type_named(*modifier); type != Type::none) {
      modifiers_.erase(modifier);
      return type;
    }
  refuse("has no type");
}

Space Statement::take_space() {
  static constexpr std::pair<std::string_view, Space> names[] = {
      {"global", Space::global},      {"shared", Space::shared},
      {"shared::cta", Space::shared}, {"shared::cluster", Space::shared_cluster},
      {"local", Space::local},        {"param", Space::param},
      {"param::entry", Space::param}, {"const", Space::constant},
  };
  for (const auto& [name, space] : names)
    if (take(name)) return space;
  return Space::generic;
}

const std::string& Statement::operand(size_t i) const {
  if (i >= operands_.size()) refuse("has too few operands");
  return operands_[i];
}

Operand Statement::value(size_t i, Type type) const { return names_.operand(operand(i), type); }

Operand Statement::address(size_t i, int64_t* offset) const {
  const std::string& text = operand(i);
  if (text.size() < 3 || text.front() != '[' || text.back() != ']') refuse("has no address");
  std::string base = trimmed(text.substr(1, text.size() - 2));
  *offset = 0;
  // "[name]", "[name+16]", "[name+-16]", "[name-16]".
  const size_t sign = base.find_first_of("+-", 1);
  if (sign != std::string::npos) {
    const bool plus = base[sign] == '+';
    *offset = std::stoll(trimmed(base.substr(sign + (plus ? 1 : 0))), nullptr, 0);
    base = trimmed(base.substr(0, sign));
  }
  return names_.operand(base, Type::b64);
}

std::vector<Operand> Statement::values(size_t i, Type type) const {
  const std::string& text = operand(i);
  if (text.front() != '{') return {value(i, type)};
  std::vector<Operand> found;
  for (const std::string& part : split_operands(text.substr(1, text.rfind('}') - 1)))
    found.push_back(names_.operand(part, type));
  return found;
}

void Statement::usual_operands(Instruction& instruction, Type type, size_t least,
                               size_t most) const {
  if (operands_.size() < least + 1 || operands_.size() > most + 1)
    refuse("has another number of operands than this interpreter knows");
  const std::string& result = operand(0);
  if (const size_t bar = result.find('|'); bar != std::string::npos) {
    instruction.to.push_back(names_.operand(trimmed(result.substr(0, bar)), type));
    instruction.to.push_back(names_.operand(trimmed(result.substr(bar + 1)), Type::pred));
  } else {
    instruction.to = values(0, type);
  }
  for (size_t i = 1; i < operands_.size(); ++i) instruction.from.push_back(value(i, type));
}

void Statement::refuse(const std::string& why) const {
  throw Error("the instruction `" + text_ + "` " + why);
}

void Statement::finish() const {
  if (!modifiers_.empty())
    refuse("has the modifier ." + modifiers_[0] + ", which this interpreter does not know");
}

}  // namespace ptx_on_host
