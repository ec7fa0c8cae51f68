// One instruction as it is written, and the builders that make something executable of it.
//
// A builder takes the modifiers that it knows. One that nobody has taken is an error: an unknown
// variant of a known instruction is never executed as if it were the plain one.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace ptx_on_host {

// What names mean where an instruction stands: registers, parameters, variables, labels.
class Names {
 public:
  virtual ~Names() = default;
  // A register, a constant (of this type) or the address of a variable.
  virtual Operand operand(const std::string& text, Type type) = 0;
  // To be made the target number `index` of a branch, once all labels are known.
  virtual void target(const std::string& label, size_t index) = 0;
  // The labels of a .branchtargets directive.
  virtual std::vector<std::string> targets_of(const std::string& table) = 0;
};

class Statement {
 public:
  // "opcode.modifier.modifier operand, operand", without a predicate.
  Statement(const std::string& text, Names& names);

  const std::string& opcode() const { return opcode_; }
  // Takes a modifier; false where it is not there.
  bool take(std::string_view modifier);
  // Takes the first of some modifiers that is there: its index, or -1.
  int take_one_of(std::initializer_list<std::string_view> modifiers);
  // Takes the next type. Throws where there is none.
  Type take_type();
  Space take_space();

  size_t operands() const { return operands_.size(); }
  const std::string& operand(size_t i) const;
  // What operand number i is; an address loses its brackets, and its offset is stored.
  Operand value(size_t i, Type type) const;
  Operand address(size_t i, int64_t* offset) const;
  // Operands in braces, or one.
  std::vector<Operand> values(size_t i, Type type) const;
  // Result into `to` ("%r1|%p1" is two), what is behind it into `from`: at least and at most so
  // many operands.
  void usual_operands(Instruction& instruction, Type type, size_t least, size_t most) const;
  void usual_operands(Instruction& instruction, Type type, size_t count) const {
    usual_operands(instruction, type, count, count);
  }

  Names& names() const { return names_; }
  // Throws Error, which names the instruction.
  [[noreturn]] void refuse(const std::string& why = "is not known to this interpreter") const;
  // Refuses unless every modifier has been taken.
  void finish() const;

 private:
  std::string text_, opcode_;
  std::vector<std::string> modifiers_, operands_;
  Names& names_;
};

using Builder = std::function<void(Statement&, Instruction&)>;
using Builders = std::map<std::string, Builder>;

// Each file of instructions adds its own.
void add_arithmetic(Builders& builders);
void add_logic(Builders& builders);
void add_conversions(Builders& builders);
void add_memory(Builders& builders);
void add_control(Builders& builders);
void add_synchronization(Builders& builders);
void add_collectives(Builders& builders);
// bar.warp.sync, once "bar.warp" has been read.
void build_warp_barrier(Statement& statement, Instruction& instruction);

// The bits of a constant, as a value of a type.
uint64_t constant_bits(const std::string& text, Type type);

std::string trimmed(const std::string& text);
// Splits at commas outside of brackets and braces.
std::vector<std::string> split_operands(const std::string& text);

}  // namespace ptx_on_host
