// Names and sizes of types, and names of the categories of instructions.
#include "program.h"

#include <array>

namespace ptx_on_host {
namespace {

struct Named {
  std::string_view name;
  Type type;
  uint8_t bytes;
};

constexpr Named kTypes[] = {
    {"pred", Type::pred, 1},   {"b8", Type::b8, 1},         {"b16", Type::b16, 2},
    {"b32", Type::b32, 4},     {"b64", Type::b64, 8},       {"b128", Type::b128, 16},
    {"u8", Type::u8, 1},       {"u16", Type::u16, 2},       {"u32", Type::u32, 4},
    {"u64", Type::u64, 8},     {"s8", Type::s8, 1},         {"s16", Type::s16, 2},
    {"s32", Type::s32, 4},     {"s64", Type::s64, 8},       {"f16", Type::f16, 2},
    {"bf16", Type::bf16, 2},   {"f32", Type::f32, 4},       {"f64", Type::f64, 8},
    {"f16x2", Type::f16x2, 4}, {"bf16x2", Type::bf16x2, 4},
};

}  // namespace

Type type_named(std::string_view name) {
  for (const Named& entry : kTypes)
    if (entry.name == name) return entry.type;
  return Type::none;
}

size_t size_of(Type type) {
  for (const Named& entry : kTypes)
    if (entry.type == type) return entry.bytes;
  throw Error("an instruction without a type");
}

bool is_float(Type type) { return type >= Type::f16; }

bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }

const char* name_of(Category category) {
  static constexpr std::array<const char*, static_cast<size_t>(Category::count)> names = {
      "global memory",  "shared memory",       "parameters and local memory",
      "floating point", "integer and logic",   "moves and conversions",
      "branches",       "barriers and fences", "shuffles and votes"};
  return names[static_cast<size_t>(category)];
}

}  // namespace ptx_on_host
