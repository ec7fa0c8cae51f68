// Reading the text of a PTX module.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <sstream>

#include "memory.h"
#include "program.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

std::string without_comments(const std::string& text) {
  std::string kept;
  kept.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      const size_t end = text.find("*/", i);
      i = end == std::string::npos ? text.size() : end + 2;
    } else {
      kept += text[i++];
    }
  }
  return kept;
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

const Builders& builders() {
  static const Builders all = [] {
    Builders made;
    add_arithmetic(made);
    add_logic(made);
    add_conversions(made);
    add_memory(made);
    add_control(made);
    add_synchronization(made);
    add_collectives(made);
    return made;
  }();
  return all;
}

class Parser : public Names {
 public:
  explicit Parser(Module& module) : module_(module) {}
  void parse(const std::string& text);

  Operand operand(const std::string& text, Type type) override;
  void target(const std::string& label, size_t index) override {
    jumps_.push_back({kernel_->code.size(), index, label});
  }
  std::vector<std::string> targets_of(const std::string& table) override {
    const auto found = tables_.find(table);
    if (found == tables_.end()) throw Error("no .branchtargets " + table);
    return found->second;
  }

 private:
  struct Jump {
    size_t from, index;
    std::string label;
  };
  struct Variable {
    Space space;
    int64_t value;  // address, or offset
    bool dynamic = false;
  };

  // Whether a word stands here, and ends where it does.
  bool starts_with(const char* word) const {
    const size_t end = at_ + strlen(word);
    return text_.compare(at_, strlen(word), word) == 0 &&
           (end >= text_.size() || !is_name(text_[end]));
  }
  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  std::string rest_of_line();
  bool read_directive();
  bool read_label();
  bool read_entry();
  void read_parameters(const std::string& text);
  void read_statement();
  void declare_registers(const std::string& text);
  void declare_variable(const std::string& text);
  void define(const std::string& name, Space space, size_t bytes, size_t alignment, bool external,
              const std::vector<uint8_t>& content);
  void add_instruction(std::string text);
  void end_kernel();
  Operand preset(Preset::Kind kind, const std::string& name, int64_t offset);
  int new_register() { return static_cast<int>(kernel_->registers++); }

  Module& module_;
  std::string text_;
  size_t at_ = 0;
  Kernel* kernel_ = nullptr;
  int file_ = 0, line_ = 0;
  std::map<std::string, Variable> globals_;
  // Of the kernel:
  std::vector<std::map<std::string, int>> registers_;  // of every scope, by name
  std::map<std::string, Variable> variables_;
  std::map<std::string, int> presets_;
  std::map<std::string, int> labels_;
  std::map<std::string, std::vector<std::string>> tables_;
  std::vector<Jump> jumps_;
};

std::string Parser::rest_of_line() {
  const size_t end = std::min(text_.find('\n', at_), text_.size());
  const std::string line = text_.substr(at_, end - at_);
  at_ = end;
  return line;
}

// Directives that end with their line, and sections.
bool Parser::read_directive() {
  if (starts_with(".section")) {
    int depth = 0;
    for (at_ = text_.find('{', at_); at_ < text_.size(); ++at_) {
      depth += (text_[at_] == '{') - (text_[at_] == '}');
      if (depth == 0) break;
    }
    ++at_;
    return true;
  }
  static const char* const kLines[] = {".loc",     ".file",         ".version",
                                       ".target",  ".address_size", ".maxntid",
                                       ".reqntid", ".minnctapersm", ".maxnreg"};
  const auto found = std::find_if(std::begin(kLines), std::end(kLines),
                                  [&](const char* word) { return starts_with(word); });
  if (found == std::end(kLines)) return false;
  const std::string directive = *found;
  std::string line = rest_of_line().substr(directive.size());
  if (directive == ".loc") {
    std::istringstream(line) >> file_ >> line_;
  } else if (directive == ".file") {
    // .file 1 "folder" "name", or .file 1 "folder/name"
    const int number = std::stoi(line);
    const size_t end =
        line.rfind('"', line.find(',') == std::string::npos ? std::string::npos : line.find(','));
    const std::string path =
        line.substr(line.rfind('"', end - 1) + 1, end - line.rfind('"', end - 1) - 1);
    module_.files[number] = path.substr(path.rfind('/') + 1);
  } else if (directive == ".maxntid" || directive == ".reqntid") {
    std::replace(line.begin(), line.end(), ',', ' ');
    unsigned threads = 1;
    for (const std::string& word : words_of(line))
      threads *= static_cast<unsigned>(std::stoul(word));
    (directive == ".maxntid" ? kernel_->max_threads : kernel_->required_threads) = threads;
  }
  return true;
}

bool Parser::read_label() {
  size_t end = at_;
  while (end < text_.size() && is_name(text_[end])) ++end;
  if (end == at_ || end >= text_.size() || text_[end] != ':' || kernel_ == nullptr) return false;
  const std::string label = text_.substr(at_, end - at_);
  at_ = end + 1;
  skip_space();
  if (starts_with(".branchtargets")) {
    const size_t begin = at_ + strlen(".branchtargets");
    const size_t semicolon = text_.find(';', begin);
    tables_[label] = split_operands(text_.substr(begin, semicolon - begin));
    at_ = semicolon + 1;
  } else {
    labels_[label] = static_cast<int>(kernel_->code.size());
  }
  return true;
}

bool Parser::read_entry() {
  size_t at = at_;
  for (const char* linkage : {".visible", ".weak"})
    if (text_.compare(at, strlen(linkage), linkage) == 0) {
      at += strlen(linkage);
      while (std::isspace(static_cast<unsigned char>(text_[at]))) ++at;
    }
  if (text_.compare(at, 5, ".func") == 0)
    throw Error("device functions (.func) are not known to this interpreter");
  if (text_.compare(at, 6, ".entry") != 0) return false;
  at_ = at + 6;
  skip_space();
  size_t end = at_;
  while (is_name(text_[end])) ++end;
  auto kernel = std::make_unique<Kernel>();
  kernel_ = kernel.get();
  kernel_->name = text_.substr(at_, end - at_);
  module_.kernels[kernel_->name] = std::move(kernel);
  registers_.clear();
  variables_.clear();
  presets_.clear();
  labels_.clear();
  tables_.clear();
  jumps_.clear();
  at_ = end;
  skip_space();
  if (text_[at_] == '(') {
    const size_t close = text_.find(')', at_);
    read_parameters(text_.substr(at_ + 1, close - at_ - 1));
    at_ = close + 1;
  }
  return true;
}

void Parser::read_parameters(const std::string& text) {
  size_t offset = 0;
  for (const std::string& parameter : split_operands(text)) {
    size_t alignment = 0, bytes = 1, count = 1;
    std::string name;
    bool of_pointee = false;  // ".ptr .global .align 16" says where the pointer points
    const std::vector<std::string> words = words_of(parameter);
    for (size_t i = 0; i < words.size(); ++i) {
      if (words[i] == ".ptr") {
        of_pointee = true;
      } else if (words[i] == ".align") {
        const size_t value = std::stoul(words.at(++i));
        if (!of_pointee) alignment = value;
      } else if (words[i][0] == '.') {
        const Type type = type_named(words[i].substr(1));
        if (type != Type::none) bytes = size_of(type);
      } else {
        name = words[i];
      }
    }
    if (const size_t bracket = name.find('['); bracket != std::string::npos) {
      count = std::stoul(name.substr(bracket + 1));
      name.resize(bracket);
    }
    if (alignment == 0) alignment = bytes;
    offset = (offset + alignment - 1) / alignment * alignment;
    variables_[name] = {Space::param, static_cast<int64_t>(offset)};
    kernel_->parameters.push_back({offset, bytes * count});
    offset += bytes * count;
  }
  kernel_->parameter_bytes = offset;
}

void Parser::declare_registers(const std::string& text) {
  const std::vector<std::string> words = words_of(text);
  const std::string names = text.substr(text.find(words.at(1)) + words[1].size());
  for (const std::string& name : split_operands(names)) {
    const size_t bracket = name.find('<');
    if (bracket == std::string::npos) {
      registers_.back()[name] = new_register();
      continue;
    }
    const size_t count = std::stoul(name.substr(bracket + 1));
    for (size_t i = 0; i < count; ++i)
      registers_.back()[name.substr(0, bracket) + std::to_string(i)] = new_register();
  }
}

// .extern .shared .align 16 .b8 name[]; .global .align 4 .b8 name[8] = {1, 2};
void Parser::declare_variable(const std::string& text) {
  const size_t equals = text.find('=');
  Space space = Space::generic;
  bool external = false;
  size_t alignment = 4, element = 1, count = 1;
  std::string name;
  const std::vector<std::string> words = words_of(text.substr(0, equals));
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == ".extern")
      external = true;
    else if (word == ".shared")
      space = Space::shared;
    else if (word == ".global")
      space = Space::global;
    else if (word == ".const")
      space = Space::constant;
    else if (word == ".local")
      space = Space::local;
    else if (word == ".align")
      alignment = std::stoul(words.at(++i));
    else if (word == ".visible" || word == ".weak" || word == ".common")
      continue;
    else if (word[0] == '.' && type_named(word.substr(1)) != Type::none)
      element = size_of(type_named(word.substr(1)));
    else if (word[0] == '.')
      throw Error("the directive `" + text + "` is not known");
    else
      name = word;
  }
  if (space == Space::generic) throw Error("the directive `" + text + "` is not known");
  if (const size_t bracket = name.find('['); bracket != std::string::npos) {
    const std::string size = name.substr(bracket + 1);
    if (size.find('[') != std::string::npos) throw Error("`" + text + "` has two dimensions");
    count = size[0] == ']' ? 0 : std::stoul(size);
    name.resize(bracket);
  }
  std::vector<uint8_t> content;
  if (equals != std::string::npos) {
    std::string values = trimmed(text.substr(equals + 1));
    if (values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
    for (const std::string& value : split_operands(values)) {
      const uint64_t bits = constant_bits(value, element == 8 ? Type::b64 : Type::b32);
      for (size_t byte = 0; byte < element; ++byte)
        content.push_back(static_cast<uint8_t>(bits >> (8 * byte)));
    }
  }
  define(name, space, std::max(count * element, content.size()), alignment, external, content);
}

void Parser::define(const std::string& name, Space space, size_t bytes, size_t alignment,
                    bool external, const std::vector<uint8_t>& content) {
  const auto place = [alignment, bytes](size_t& end) {
    const size_t begin = (end + alignment - 1) / alignment * alignment;
    end = begin + bytes;
    return static_cast<int64_t>(begin);
  };
  if (space == Space::shared && external) {
    globals_[name] = {Space::shared, 0, true};
  } else if (space == Space::shared) {
    if (kernel_ == nullptr) throw Error("shared variable " + name + " outside of a kernel");
    variables_[name] = {Space::shared, kSharedBase + place(kernel_->static_shared_bytes)};
  } else if (space == Space::local) {
    variables_[name] = {Space::local, place(kernel_->local_bytes)};
  } else {
    auto memory = std::make_unique<uint64_t[]>(bytes / 8 + 1);
    std::memcpy(memory.get(), content.data(), content.size());
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    globals_[name] = {space, static_cast<int64_t>(address)};
    module_.variables[address] = bytes;
    module_.memory.push_back(std::move(memory));
  }
}

Operand Parser::preset(Preset::Kind kind, const std::string& name, int64_t offset) {
  const std::string key =
      std::to_string(static_cast<int>(kind)) + name + "+" + std::to_string(offset);
  const auto [found, made] = presets_.emplace(key, -1);
  if (made) {
    found->second = new_register();
    kernel_->presets.push_back({kind, found->second, name, offset});
  }
  Operand operand;
  operand.reg = found->second;
  return operand;
}

Operand Parser::operand(const std::string& text, Type type) {
  Operand operand;
  if (text == "_") {
    operand.sink = true;
    return operand;
  }
  if (text[0] == '!') {
    operand = this->operand(trimmed(text.substr(1)), type);
    operand.negated = true;
    return operand;
  }
  for (auto scope = registers_.rbegin(); scope != registers_.rend(); ++scope)
    if (const auto found = scope->find(text); found != scope->end()) {
      operand.reg = found->second;
      return operand;
    }
  if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
    operand.value = constant_bits(text, type);
    return operand;
  }
  if (text[0] == '%') return preset(Preset::Kind::special, text, 0);
  if (text == "WARP_SZ") {
    operand.value = 32;
    return operand;
  }
  // A variable's address, maybe with an offset.
  const size_t plus = text.find('+');
  const std::string name = trimmed(text.substr(0, plus));
  const int64_t offset = plus == std::string::npos ? 0 : std::stoll(text.substr(plus + 1));
  auto found = variables_.find(name);
  if (found == variables_.end()) {
    found = globals_.find(name);
    if (found == globals_.end()) throw Error("the name " + text + " is not declared");
  }
  const Variable& variable = found->second;
  if (variable.dynamic) return preset(Preset::Kind::dynamic_shared, "", offset);
  if (variable.space == Space::param)
    return preset(Preset::Kind::parameter, "", variable.value + offset);
  if (variable.space == Space::local)
    return preset(Preset::Kind::local, "", variable.value + offset);
  operand.value = static_cast<uint64_t>(variable.value + offset);
  return operand;
}

void Parser::add_instruction(std::string text) {
  Instruction instruction;
  instruction.text = text;
  instruction.file = file_;
  instruction.line = line_;
  if (text[0] == '@') {
    const size_t space = text.find_first_of(" \t");
    const Operand guard = operand(text.substr(1, space - 1), Type::pred);
    instruction.predicate = guard.reg;
    instruction.predicate_negated = guard.negated;
    text = trimmed(text.substr(space));
  }
  Statement statement(text, *this);
  const auto builder = builders().find(statement.opcode());
  if (builder == builders().end()) statement.refuse();
  builder->second(statement, instruction);
  statement.finish();
  if (instruction.execute == nullptr) statement.refuse("is not known with this type");
  kernel_->code.push_back(std::move(instruction));
}

void Parser::read_statement() {
  const size_t end = text_.find(';', at_);
  if (end == std::string::npos) throw Error("the text ends within a statement");
  std::string statement = trimmed(text_.substr(at_, end - at_));
  at_ = end + 1;
  std::replace_if(
      statement.begin(), statement.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
  if (statement.empty() || statement.compare(0, 7, ".pragma") == 0) return;
  if (statement.compare(0, 4, ".reg") == 0) return declare_registers(statement);
  if (statement[0] == '.') return declare_variable(statement);
  if (kernel_ == nullptr) throw Error("an instruction outside of a kernel: " + statement);
  add_instruction(statement);
}

void Parser::end_kernel() {
  // Where control runs off the end, the thread ends.
  add_instruction("ret");
  for (const Jump& jump : jumps_) {
    const auto label = labels_.find(jump.label);
    if (label == labels_.end()) throw Error(kernel_->name + ": no label " + jump.label);
    auto& targets = kernel_->code[jump.from].targets;
    targets.resize(std::max(targets.size(), jump.index + 1));
    targets[jump.index] = label->second;
  }
  kernel_ = nullptr;
}

void Parser::parse(const std::string& text) {
  text_ = without_comments(text);
  for (skip_space(); at_ < text_.size(); skip_space()) {
    if (text_[at_] == '{' && kernel_ != nullptr) {
      ++at_;
      registers_.emplace_back();
    } else if (text_[at_] == '}' && kernel_ != nullptr) {
      ++at_;
      registers_.pop_back();
      if (registers_.empty()) end_kernel();
    } else if (!read_directive() && !read_label() && !read_entry()) {
      read_statement();
    }
  }
  if (kernel_ != nullptr) throw Error(kernel_->name + ": the text ends within the kernel");
}

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
  auto module = std::make_unique<Module>();
  try {
    Parser(*module).parse(text);
  } catch (const std::logic_error& error) {  // of std::stoul and its like
    throw Error(std::string("a number that cannot be read: ") + error.what());
  }
  return module;
}

}  // namespace ptx_on_host
