// Instructions on bits and on predicates: and, or, xor, not, shifts, bit fields, comparisons.
#include <algorithm>
#include <array>

#include "execute.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

// --- bits ---------------------------------------------------------------------------------------

enum class Bitwise : int8_t { and_, or_, xor_, not_ };

template <class X>
X apply_bitwise(Bitwise function, X a, X b) {
  switch (function) {
    case Bitwise::and_: return a & b;
    case Bitwise::or_: return a | b;
    case Bitwise::xor_: return a ^ b;
    default: return static_cast<X>(~a);
  }
}

template <class X>
struct Bits {
  static Outcome run(Thread& thread, const Instruction& i) {
    const X b = i.from.size() > 1 ? read<X>(thread, i.from[1]) : X(0);
    write(thread, i.to[0],
          apply_bitwise(static_cast<Bitwise>(i.variant), read<X>(thread, i.from[0]), b));
    return Outcome::next;
  }
};

Outcome of_predicates(Thread& thread, const Instruction& i) {
  const unsigned a = read_predicate(thread, i.from[0]);
  const unsigned b = i.from.size() > 1 ? read_predicate(thread, i.from[1]) : 0;
  const unsigned result = apply_bitwise(static_cast<Bitwise>(i.variant), a, b) & 1;
  write(thread, i.to[0], static_cast<uint8_t>(result));
  return Outcome::next;
}

Builder bitwise_builder(Bitwise function) {
  return [function](Statement& s, Instruction& i) {
    const Type type = s.take_type();
    s.usual_operands(i, type, function == Bitwise::not_ ? 1 : 2);
    i.variant = static_cast<int8_t>(function);
    i.execute = type == Type::pred ? of_predicates : choose_by_size<Bits>(type);
  };
}

// Shifts by the width and more leave nothing but the sign.
template <class X>
struct ShiftLeft {
  static Outcome run(Thread& thread, const Instruction& i) {
    const auto by = read<uint32_t>(thread, i.from[1]);
    const X a = read<X>(thread, i.from[0]);
    write(thread, i.to[0], by >= 8 * sizeof(X) ? X(0) : static_cast<X>(a << by));
    return Outcome::next;
  }
};
template <class X>
struct ShiftRight {
  static Outcome run(Thread& thread, const Instruction& i) {
    const auto by = std::min<uint32_t>(read<uint32_t>(thread, i.from[1]), 8 * sizeof(X));
    X a = read<X>(thread, i.from[0]);
    // In two steps, because a shift by the whole width is none in C++.
    a = static_cast<X>(a >> by / 2);
    write(thread, i.to[0], static_cast<X>(a >> (by - by / 2)));
    return Outcome::next;
  }
};

// shf: 32 bits out of two registers beside each other.
Outcome funnel_shift(Thread& thread, const Instruction& i) {
  const uint64_t both =
      uint64_t{read<uint32_t>(thread, i.from[1])} << 32 | read<uint32_t>(thread, i.from[0]);
  uint32_t by = read<uint32_t>(thread, i.from[2]);
  by = i.flag ? by & 31 : std::min<uint32_t>(by, 32);
  const bool right = i.variant == 0;
  const uint64_t moved = right ? both >> by : both << by >> 32;
  write(thread, i.to[0], static_cast<uint32_t>(right || by < 32 ? moved : both));
  return Outcome::next;
}

enum class Counting : int8_t { leading_zeros, ones, reversed };

template <class X>
struct CountBits {
  static Outcome run(Thread& thread, const Instruction& i) {
    const X a = read<X>(thread, i.from[0]);
    constexpr int kBits = 8 * sizeof(X);
    X reversed = 0;
    for (int bit = 0; bit < kBits; ++bit) reversed |= (a >> bit & 1) << (kBits - 1 - bit);
    switch (static_cast<Counting>(i.variant)) {
      case Counting::leading_zeros:
        write<uint32_t>(thread, i.to[0], a == 0 ? kBits : __builtin_ctzll(reversed));
        break;
      case Counting::ones: write<uint32_t>(thread, i.to[0], __builtin_popcountll(a)); break;
      case Counting::reversed: write(thread, i.to[0], reversed); break;
    }
    return Outcome::next;
  }
};

Builder counting_builder(Counting function) {
  return [function](Statement& s, Instruction& i) {
    const Type type = s.take_type();
    s.usual_operands(i, type, 1);
    i.variant = static_cast<int8_t>(function);
    i.execute = size_of(type) == 8 ? CountBits<uint64_t>::run : CountBits<uint32_t>::run;
  };
}

template <class X>
struct ExtractField {
  static Outcome run(Thread& thread, const Instruction& i) {
    using U = std::make_unsigned_t<X>;
    constexpr uint32_t kBits = 8 * sizeof(X);
    const U a = read<U>(thread, i.from[0]);
    const uint32_t begin = read<uint32_t>(thread, i.from[1]) & 255;
    const uint32_t length = read<uint32_t>(thread, i.from[2]) & 255;
    // Beyond the field, or the register, a signed one has its sign.
    bool sign = false;
    if (std::is_signed_v<X> && length != 0) sign = a >> std::min(begin + length - 1, kBits - 1) & 1;
    U result = 0;
    for (uint32_t bit = 0; bit < kBits; ++bit) {
      const bool inside = bit < length && begin + bit < kBits;
      if (inside ? (a >> (begin + bit) & 1) != 0 : sign) result |= U(1) << bit;
    }
    write(thread, i.to[0], static_cast<X>(result));
    return Outcome::next;
  }
};

template <class X>
struct InsertField {
  static Outcome run(Thread& thread, const Instruction& i) {
    const X field = read<X>(thread, i.from[0]);
    X result = read<X>(thread, i.from[1]);
    const uint32_t begin = read<uint32_t>(thread, i.from[2]) & 255;
    const uint32_t length = read<uint32_t>(thread, i.from[3]) & 255;
    for (uint32_t bit = 0; bit < length && begin + bit < 8 * sizeof(X); ++bit) {
      result &= ~(X(1) << (begin + bit));
      result |= (field >> bit & 1) << (begin + bit);
    }
    write(thread, i.to[0], result);
    return Outcome::next;
  }
};

// prmt: four bytes out of eight.
Outcome permute_bytes(Thread& thread, const Instruction& i) {
  const uint64_t bytes =
      uint64_t{read<uint32_t>(thread, i.from[1])} << 32 | read<uint32_t>(thread, i.from[0]);
  const auto selector = read<uint32_t>(thread, i.from[2]);
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t select = selector >> (4 * byte) & 15;
    uint32_t value = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) value = value & 128 ? 255 : 0;  // its sign, eight times
    result |= value << (8 * byte);
  }
  write(thread, i.to[0], result);
  return Outcome::next;
}

// lop3: any function of three bits, as a table of eight.
Outcome lookup_bits(Thread& thread, const Instruction& i) {
  const auto a = read<uint32_t>(thread, i.from[0]), b = read<uint32_t>(thread, i.from[1]);
  const auto c = read<uint32_t>(thread, i.from[2]), table = read<uint32_t>(thread, i.from[3]);
  uint32_t result = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  write(thread, i.to[0], result);
  return Outcome::next;
}

// --- comparisons --------------------------------------------------------------------------------

// What holds of two numbers, as bits: less, equal, greater, not comparable.
constexpr int kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8;

struct Comparison {
  std::string_view name;
  int holds_of;
};
constexpr Comparison kComparisons[] = {
    {"eq", kEqual},
    {"ne", kLess | kGreater},
    {"lt", kLess},
    {"le", kLess | kEqual},
    {"gt", kGreater},
    {"ge", kGreater | kEqual},
    {"lo", kLess},
    {"ls", kLess | kEqual},
    {"hi", kGreater},
    {"hs", kGreater | kEqual},
    {"equ", kEqual | kUnordered},
    {"neu", kLess | kGreater | kUnordered},
    {"ltu", kLess | kUnordered},
    {"leu", kLess | kEqual | kUnordered},
    {"gtu", kGreater | kUnordered},
    {"geu", kGreater | kEqual | kUnordered},
    {"num", kLess | kEqual | kGreater},
    {"nan", kUnordered},
};

template <class X>
int relation(X a, X b) {
  return a < b ? kLess : a > b ? kGreater : a == b ? kEqual : kUnordered;
}

enum class Combine : int8_t { alone, and_, or_, xor_ };

void write_comparison(Thread& thread, const Instruction& i, const Operand& to, bool holds) {
  if (i.combination != static_cast<int8_t>(Combine::alone)) {
    const bool other = read_predicate(thread, i.from[2]);
    switch (static_cast<Combine>(i.combination)) {
      case Combine::and_: holds = holds && other; break;
      case Combine::or_: holds = holds || other; break;
      default: holds = holds != other;
    }
  }
  write(thread, to, static_cast<uint8_t>(holds));
}

template <class X>
struct Compare {
  static Outcome run(Thread& thread, const Instruction& i) {
    const X a = read<X>(thread, i.from[0]), b = read<X>(thread, i.from[1]);
    bool holds;
    if constexpr (is_half<X>)
      holds = relation(widened(a), widened(b)) & i.variant;
    else
      holds = relation(flushed(a, i.flush), flushed(b, i.flush)) & i.variant;
    write_comparison(thread, i, i.to[0], holds);
    // A second predicate is the contrary, combined likewise.
    if (i.to.size() > 1) write_comparison(thread, i, i.to[1], !holds);
    return Outcome::next;
  }
};

template <class H>
Outcome compare_packed(Thread& thread, const Instruction& i) {
  const auto a = read<uint32_t>(thread, i.from[0]), b = read<uint32_t>(thread, i.from[1]);
  for (int half = 0; half < 2; ++half) {
    const H x{static_cast<uint16_t>(a >> (16 * half))}, y{static_cast<uint16_t>(b >> (16 * half))};
    write_comparison(thread, i, i.to[half], relation(widened(x), widened(y)) & i.variant);
  }
  return Outcome::next;
}

void build_comparison(Statement& s, Instruction& i) {
  const Type type = s.take_type();
  i.flush = s.take("ftz");
  for (const Comparison& comparison : kComparisons)
    if (s.take(comparison.name)) i.variant = static_cast<int8_t>(comparison.holds_of);
  if (i.variant == 0) s.refuse("compares in a way that this interpreter does not know");
  i.combination = static_cast<int8_t>(s.take_one_of({"and", "or", "xor"}) + 1);
  s.usual_operands(i, type, i.combination == 0 ? 2 : 3);
  if (type == Type::f16x2 || type == Type::bf16x2) {
    if (i.to.size() != 2) s.refuse("wants two predicates");
    i.execute = type == Type::f16x2 ? compare_packed<Float16> : compare_packed<BFloat16>;
  } else {
    i.execute = choose<Compare, kNumbers>(type);
  }
  if (is_float(type)) i.category = Category::floating_point;
}

// --- the rest -----------------------------------------------------------------------------------

Builder integer_builder(Execute (*choose_code)(Type), size_t operands) {
  return [choose_code, operands](Statement& s, Instruction& i) {
    const Type type = s.take_type();
    s.usual_operands(i, type, operands);
    i.execute = choose_code(type);
  };
}

Execute choose_insert(Type type) {
  return size_of(type) == 8 ? InsertField<uint64_t>::run : InsertField<uint32_t>::run;
}

Execute choose_extract(Type type) {
  switch (type) {
    case Type::u32: return ExtractField<uint32_t>::run;
    case Type::s32: return ExtractField<int32_t>::run;
    case Type::u64: return ExtractField<uint64_t>::run;
    case Type::s64: return ExtractField<int64_t>::run;
    default: return nullptr;
  }
}

void build_funnel(Statement& s, Instruction& i) {
  const Type type = s.take_type();
  i.variant = static_cast<int8_t>(s.take_one_of({"r", "l"}));
  i.flag = s.take_one_of({"wrap", "clamp"}) == 0;
  s.usual_operands(i, type, 3);
  i.execute = funnel_shift;
}

}  // namespace

void add_logic(Builders& builders) {
  builders["and"] = bitwise_builder(Bitwise::and_);
  builders["or"] = bitwise_builder(Bitwise::or_);
  builders["xor"] = bitwise_builder(Bitwise::xor_);
  builders["not"] = bitwise_builder(Bitwise::not_);
  builders["shl"] = integer_builder(choose_by_size<ShiftLeft>, 2);
  builders["shr"] = integer_builder(choose<ShiftRight, kIntegers>, 2);
  builders["shf"] = build_funnel;
  builders["clz"] = counting_builder(Counting::leading_zeros);
  builders["popc"] = counting_builder(Counting::ones);
  builders["brev"] = counting_builder(Counting::reversed);
  builders["bfe"] = integer_builder(choose_extract, 3);
  builders["bfi"] = integer_builder(choose_insert, 4);
  builders["prmt"] = integer_builder([](Type) -> Execute { return permute_bytes; }, 3);
  builders["lop3"] = integer_builder([](Type) -> Execute { return lookup_bits; }, 4);
  builders["setp"] = build_comparison;
}

}  // namespace ptx_on_host
