// A PTX module once it has been read: its kernels, as lists of instructions that can be executed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptx_on_host {

// What the interpreter refuses: PTX that it cannot read, or a kernel that does what no kernel may.
class Error : public std::exception {
 public:
  explicit Error(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// --- types and state spaces ---------------------------------------------------------------------

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
};

// Type::none where the name is no type's.
Type type_named(std::string_view name);
size_t size_of(Type type);
bool is_float(Type type);
bool is_signed(Type type);

enum class Space : uint8_t { generic, global, shared, shared_cluster, local, param, constant };

// --- instructions -------------------------------------------------------------------------------

struct Thread;
struct Instruction;

// What became of a thread when it executed an instruction.
enum class Outcome : uint8_t {
  next,     // go on with the next instruction
  jumped,   // the program counter has been set
  waits,    // until others come, who let it go on behind this instruction
  yielded,  // go on with the next instruction, but let others run first
  ended,
};
using Execute = Outcome (*)(Thread&, const Instruction&);

// What the counts are of.
enum class Category : uint8_t {
  global_memory,
  shared_memory,
  parameters,  // local and constant memory too
  floating_point,
  integer,  // logic and comparisons too
  moves,    // selections, conversions, addresses
  branches,
  barriers,  // fences too
  shuffles,  // votes too
  count,
};
const char* name_of(Category category);

struct Operand {
  int reg = -1;        // of the thread's registers, or
  uint64_t value = 0;  // a constant
  bool negated = false;
  bool sink = false;  // "_": whatever is written there is dropped
};

struct Instruction {
  Execute execute = nullptr;
  Category category = Category::integer;
  Type type = Type::none;
  Space space = Space::generic;
  int8_t variant = 0;      // of the operation: a comparison, a rounding, an atomic function, ...
  int8_t combination = 0;  // of a comparison with a predicate
  bool flush = false;      // denormals are zero
  bool saturate = false;
  bool flag = false;  // what else an instruction has two kinds of
  int predicate = -1;
  bool predicate_negated = false;
  std::vector<Operand> to, from;
  int64_t offset = 0, other_offset = 0;  // of the addresses
  std::vector<int> targets;              // of branches
  std::string text;                      // as written, for reports
  int file = 0, line = 0;                // of the source, where the compiler says it
};

// --- kernels ------------------------------------------------------------------------------------

// A register whose value is known when a thread starts.
struct Preset {
  enum class Kind : uint8_t { special, parameter, local, dynamic_shared } kind;
  int reg;
  std::string name;    // of a special register
  int64_t offset = 0;  // of a parameter or a local variable
};

struct Parameter {
  size_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Preset> presets;
  std::vector<Parameter> parameters;
  size_t registers = 0, parameter_bytes = 0, local_bytes = 0, static_shared_bytes = 0;
  unsigned max_threads = 0;       // 0: as many as a block may have
  unsigned required_threads = 0;  // 0: no number is required
};

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<int, std::string> files;                 // names without folders
  std::vector<std::unique_ptr<uint64_t[]>> memory;  // of .global and .const variables
  std::map<uintptr_t, size_t> variables;            // where these are: address and bytes
};

// Reads the text of a module. Throws Error, which names what is not understood: an instruction, a
// modifier, a directive or a name that this interpreter does not know is never passed over.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx_on_host
