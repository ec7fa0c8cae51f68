// Instructions that move and convert: mov, selp, cvt, cvta, mapa, getctarank, isspacep.
#include <algorithm>
#include <limits>

#include "execute.h"
#include "memory.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

// --- mov and selp -------------------------------------------------------------------------------

template <class X>
struct Move {
  static Outcome run(Thread& thread, const Instruction& i) {
    write(thread, i.to[0], read<X>(thread, i.from[0]));
    return Outcome::next;
  }
};

Outcome move_predicate(Thread& thread, const Instruction& i) {
  write(thread, i.to[0], static_cast<uint8_t>(read_predicate(thread, i.from[0])));
  return Outcome::next;
}

uint64_t low_bits(uint64_t value, size_t bits) {
  return bits >= 64 ? value : value & ((uint64_t{1} << bits) - 1);
}

// mov.b32 %r, {%rs1, %rs2};
Outcome pack(Thread& thread, const Instruction& i) {
  const size_t bits = 8 * size_of(i.type) / i.from.size();
  uint64_t value = 0;
  for (size_t k = 0; k < i.from.size(); ++k)
    value |= low_bits(bits_of(thread, i.from[k]), bits) << (bits * k);
  write(thread, i.to[0], value);
  return Outcome::next;
}

// mov.b32 {%rs1, %rs2}, %r;
Outcome unpack(Thread& thread, const Instruction& i) {
  const size_t bits = 8 * size_of(i.type) / i.to.size();
  const uint64_t value = bits_of(thread, i.from[0]);
  for (size_t k = 0; k < i.to.size(); ++k)
    write(thread, i.to[k], low_bits(value >> (bits * k), bits));
  return Outcome::next;
}

void build_move(Statement& s, Instruction& i) {
  i.category = Category::moves;
  i.type = s.take_type();
  i.to = s.values(0, i.type);
  i.from = s.values(1, i.type);
  if (i.to.size() > 1)
    i.execute = unpack;
  else if (i.from.size() > 1)
    i.execute = pack;
  else
    i.execute = i.type == Type::pred ? move_predicate : choose_by_size<Move>(i.type);
}

template <class X>
struct Select {
  static Outcome run(Thread& thread, const Instruction& i) {
    const bool first = read_predicate(thread, i.from[2]);
    write(thread, i.to[0], read<X>(thread, i.from[first ? 0 : 1]));
    return Outcome::next;
  }
};

void build_select(Statement& s, Instruction& i) {
  i.category = Category::moves;
  const Type type = s.take_type();
  s.usual_operands(i, type, 3);
  i.execute = choose_by_size<Select>(type);
}

// --- cvt ----------------------------------------------------------------------------------------

enum class Rounding : int8_t {
  none,
  nearest,
  zero,
  whole_nearest,
  whole_zero,
  whole_down,
  whole_up
};

double whole(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::whole_nearest: return std::nearbyint(value);
    case Rounding::whole_zero: return std::trunc(value);
    case Rounding::whole_down: return std::floor(value);
    case Rounding::whole_up: return std::ceil(value);
    default: return value;
  }
}

// To an integer beyond whose range lies the nearest that there is. NaN becomes 0.
template <class To>
To clamped(double value) {
  if (std::isnan(value)) return 0;
  if (value < static_cast<double>(std::numeric_limits<To>::min()))
    return std::numeric_limits<To>::min();
  // The largest 64-bit integers are not doubles: their successor is.
  if (value >= std::ldexp(1.0, std::numeric_limits<To>::digits))
    return std::numeric_limits<To>::max();
  return static_cast<To>(value);
}

template <class To, class From>
To converted(From value, const Instruction& i) {
  const auto rounding = static_cast<Rounding>(i.variant);
  if constexpr (std::is_integral_v<From> && std::is_integral_v<To>) {
    if (!i.saturate) return static_cast<To>(value);
    const auto wide = static_cast<__int128>(value);
    return static_cast<To>(std::clamp(wide, static_cast<__int128>(std::numeric_limits<To>::min()),
                                      static_cast<__int128>(std::numeric_limits<To>::max())));
  } else if constexpr (std::is_integral_v<From>) {
    if constexpr (is_half<To>)
      return narrowed<To>(static_cast<double>(value));  // 32 bits are exact in double
    else
      return static_cast<To>(value);
  } else {
    double wide = widened(value);
    if constexpr (std::is_same_v<From, float>) wide = flushed(value, i.flush);
    wide = whole(wide, rounding);
    if constexpr (std::is_integral_v<To>) {
      return clamped<To>(wide);
    } else {
      if (i.saturate) wide = std::isnan(wide) ? 0 : std::clamp(wide, 0.0, 1.0);
      if constexpr (is_half<To>)
        return narrowed<To>(wide, rounding == Rounding::zero);
      else
        return canonical(flushed(static_cast<To>(wide), i.flush));
    }
  }
}

template <class From>
struct ConvertFrom {
  template <class To>
  struct Into {
    static Outcome run(Thread& thread, const Instruction& i) {
      write(thread, i.to[0], converted<To>(read<From>(thread, i.from[0]), i));
      return Outcome::next;
    }
  };
};

template <class From>
struct ChooseTarget {
  static Execute of(Type to) { return choose<ConvertFrom<From>::template Into, kNumbers>(to); }
};

Execute choose_conversion(Type to, Type from) {
  switch (from) {
    case Type::u8:
    case Type::b8: return ChooseTarget<uint8_t>::of(to);
    case Type::s8: return ChooseTarget<int8_t>::of(to);
    case Type::u16:
    case Type::b16: return ChooseTarget<uint16_t>::of(to);
    case Type::s16: return ChooseTarget<int16_t>::of(to);
    case Type::u32:
    case Type::b32: return ChooseTarget<uint32_t>::of(to);
    case Type::s32: return ChooseTarget<int32_t>::of(to);
    case Type::u64:
    case Type::b64: return ChooseTarget<uint64_t>::of(to);
    case Type::s64: return ChooseTarget<int64_t>::of(to);
    case Type::f16: return ChooseTarget<Float16>::of(to);
    case Type::bf16: return ChooseTarget<BFloat16>::of(to);
    case Type::f32: return ChooseTarget<float>::of(to);
    case Type::f64: return ChooseTarget<double>::of(to);
    default: return nullptr;
  }
}

// cvt.rn.f16x2.f32 %r, %high, %low;
template <class H>
Outcome convert_two(Thread& thread, const Instruction& i) {
  const H high = narrowed<H>(read<float>(thread, i.from[0]));
  const H low = narrowed<H>(read<float>(thread, i.from[1]));
  write(thread, i.to[0], uint32_t{high.bits} << 16 | low.bits);
  return Outcome::next;
}

void build_conversion(Statement& s, Instruction& i) {
  i.category = Category::moves;
  const Type to = s.take_type(), from = s.take_type();
  i.variant = static_cast<int8_t>(s.take_one_of({"rn", "rz", "rni", "rzi", "rmi", "rpi"}) + 1);
  i.flush = s.take("ftz");
  i.saturate = s.take("sat");
  s.usual_operands(i, from, 1, 2);
  if (to == Type::f16x2 || to == Type::bf16x2) {
    if (from != Type::f32 || i.from.size() != 2 ||
        i.variant != static_cast<int8_t>(Rounding::nearest))
      s.refuse("packs in a way that this interpreter does not know");
    i.execute = to == Type::f16x2 ? convert_two<Float16> : convert_two<BFloat16>;
    return;
  }
  if (i.from.size() != 1) s.refuse("has two operands");
  const bool narrow = to == Type::f16 || to == Type::bf16;
  if (i.variant == static_cast<int8_t>(Rounding::zero) && !narrow)
    s.refuse("rounds in a way that this interpreter does not know");
  if (narrow && (from == Type::u64 || from == Type::s64))
    s.refuse("would be rounded twice by this interpreter");
  i.execute = choose_conversion(to, from);
}

// --- addresses ----------------------------------------------------------------------------------

// Generic addresses of global, local and parameter memory are their own.
Outcome convert_address(Thread& thread, const Instruction& i) {
  uint64_t address = bits_of(thread, i.from[0]);
  if (i.space == Space::shared || i.space == Space::shared_cluster)
    address = i.flag ? to_window(thread, address, i.space == Space::shared_cluster)
                     : to_generic(thread, static_cast<uint32_t>(address));
  write(thread, i.to[0], address);
  return Outcome::next;
}

void build_address_conversion(Statement& s, Instruction& i) {
  i.category = Category::moves;
  i.flag = s.take("to");
  i.space = s.take_space();
  s.usual_operands(i, s.take_type(), 1);
  i.execute = convert_address;
}

// The same place in the shared memory of another block of the cluster.
Outcome map_address(Thread& thread, const Instruction& i) {
  const uint64_t address = bits_of(thread, i.from[0]);
  const auto rank = read<uint32_t>(thread, i.from[1]);
  if (rank >= thread.block->cluster->blocks.size())
    fail(thread, "mapa to block " + std::to_string(rank) + " of a cluster of " +
                     std::to_string(thread.block->cluster->blocks.size()));
  const bool generic = i.space == Space::generic;
  const uint32_t own = generic ? to_window(thread, address, true) : static_cast<uint32_t>(address);
  const uint32_t theirs = (own & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
  write(thread, i.to[0], generic ? to_generic(thread, theirs) : uint64_t{theirs});
  return Outcome::next;
}

Outcome rank_of_address(Thread& thread, const Instruction& i) {
  const uint64_t address = bits_of(thread, i.from[0]);
  const uint32_t window =
      i.space == Space::generic ? to_window(thread, address, true) : static_cast<uint32_t>(address);
  const uint32_t rank = window >> kRankShift;
  write(thread, i.to[0], rank != 0 ? rank - 1 : thread.block->rank);
  return Outcome::next;
}

Outcome is_in_space(Thread& thread, const Instruction& i) {
  const uint64_t address = bits_of(thread, i.from[0]);
  const Block* const owner = owner_of(thread, address);
  const auto local = reinterpret_cast<uint64_t>(thread.local);
  const bool in_local =
      address >= local && address < local + thread.block->cluster->kernel->local_bytes;
  bool inside = false;
  switch (i.space) {
    case Space::shared: inside = owner == thread.block; break;
    case Space::shared_cluster: inside = owner != nullptr; break;
    case Space::local: inside = in_local; break;
    default: inside = owner == nullptr && !in_local;
  }
  write(thread, i.to[0], static_cast<uint8_t>(inside));
  return Outcome::next;
}

Builder address_builder(Execute execute, bool has_type, size_t operands) {
  return [execute, has_type, operands](Statement& s, Instruction& i) {
    i.category = Category::moves;
    i.space = s.take_space();
    s.usual_operands(i, has_type ? s.take_type() : Type::b64, operands);
    i.execute = execute;
  };
}

}  // namespace

void add_conversions(Builders& builders) {
  builders["mov"] = build_move;
  builders["selp"] = build_select;
  builders["cvt"] = build_conversion;
  builders["cvta"] = build_address_conversion;
  builders["mapa"] = address_builder(map_address, true, 2);
  builders["getctarank"] = address_builder(rank_of_address, true, 1);
  builders["isspacep"] = address_builder(is_in_space, false, 1);
}

}  // namespace ptx_on_host
