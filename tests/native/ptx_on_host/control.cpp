// Instructions that say where a thread goes on: bra, brx, ret, exit, trap.
#include "execute.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

Outcome jump(Thread& thread, const Instruction& i) {
  thread.pc = i.targets[0];
  return Outcome::jumped;
}

Outcome jump_by_index(Thread& thread, const Instruction& i) {
  const auto index = read<uint32_t>(thread, i.from[0]);
  if (index >= i.targets.size()) fail(thread, "a jump behind the end of its table");
  thread.pc = i.targets[index];
  return Outcome::jumped;
}

Outcome end(Thread&, const Instruction&) { return Outcome::ended; }

Outcome trap(Thread& thread, const Instruction&) { fail(thread, "the kernel gave up (trap)"); }

void build_jump(Statement& s, Instruction& i) {
  i.category = Category::branches;
  s.take("uni");
  s.names().target(s.operand(0), 0);
  i.execute = jump;
}

void build_indexed_jump(Statement& s, Instruction& i) {
  i.category = Category::branches;
  if (!s.take("idx")) s.refuse();
  s.take("uni");
  i.from.push_back(s.value(0, Type::u32));
  size_t index = 0;
  for (const std::string& label : s.names().targets_of(s.operand(1)))
    s.names().target(label, index++);
  i.execute = jump_by_index;
}

Builder builder_of(Execute execute) {
  return [execute](Statement& s, Instruction& i) {
    i.category = Category::branches;
    s.take("uni");
    i.execute = execute;
  };
}

}  // namespace

void add_control(Builders& builders) {
  builders["bra"] = build_jump;
  builders["brx"] = build_indexed_jump;
  builders["ret"] = builder_of(end);
  builders["exit"] = builder_of(end);
  builders["trap"] = builder_of(trap);
}

}  // namespace ptx_on_host
