// Instructions that compute: add, sub, mul, mad, fma, div, rem, min, max, abs, neg, rcp, sqrt, ...
//
// Approximations (.approx, .full) are computed exactly. ptxas may turn a mul and an add that do not
// say .rn into one fma, which this interpreter does not.
#include <algorithm>
#include <limits>

#include "execute.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

// --- two operands -------------------------------------------------------------------------------

template <class X>
X saturated(X value, bool saturate) {
  if constexpr (std::is_floating_point_v<X>)
    if (saturate) return std::isnan(value) ? X(0) : std::clamp(value, X(0), X(1));
  return value;
}

// Function::apply(a, b) of operands of one type, halves in double and rounded once.
template <class Function, class X>
Outcome binary(Thread& thread, const Instruction& i) {
  X a = read<X>(thread, i.from[0]), b = read<X>(thread, i.from[1]);
  if constexpr (is_half<X>) {
    write(thread, i.to[0], narrowed<X>(Function::apply(widened(a), widened(b), i.flag)));
  } else {
    a = flushed(a, i.flush);
    b = flushed(b, i.flush);
    const X result = saturated<X>(static_cast<X>(Function::apply(a, b, i.flag)), i.saturate);
    write(thread, i.to[0], canonical(flushed(result, i.flush)));
  }
  return Outcome::next;
}

// The same of both halves of a register.
template <class Function, class H>
Outcome packed_binary(Thread& thread, const Instruction& i) {
  const auto a = read<uint32_t>(thread, i.from[0]), b = read<uint32_t>(thread, i.from[1]);
  uint32_t result = 0;
  for (const int shift : {0, 16}) {
    const H x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    const H z = narrowed<H>(Function::apply(widened(x), widened(y), i.flag));
    result |= uint32_t{z.bits} << shift;
  }
  write(thread, i.to[0], result);
  return Outcome::next;
}

template <class Function>
struct Binary {
  template <class X>
  struct Of {
    static constexpr Execute run = binary<Function, X>;
  };
};

template <class Function>
Execute choose_binary(Type type) {
  if (type == Type::f16x2) return packed_binary<Function, Float16>;
  if (type == Type::bf16x2) return packed_binary<Function, BFloat16>;
  return choose<Binary<Function>::template Of, kNumbers>(type);
}

struct Add {
  template <class X>
  static X apply(X a, X b, bool) {
    return static_cast<X>(a + b);
  }
};
struct Subtract {
  template <class X>
  static X apply(X a, X b, bool) {
    return static_cast<X>(a - b);
  }
};
// The low half of a product.
struct Multiply {
  template <class X>
  static X apply(X a, X b, bool) {
    if constexpr (std::is_integral_v<X>)  // narrow types would be promoted to a signed one
      return static_cast<X>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    else
      return a * b;
  }
};
struct Divide {
  template <class X>
  static X apply(X a, X b, bool) {
    if constexpr (std::is_integral_v<X>) {
      if (b == 0) return static_cast<X>(-1);
      if constexpr (std::is_signed_v<X>)
        if (b == -1) return static_cast<X>(0 - static_cast<std::make_unsigned_t<X>>(a));
    }
    return static_cast<X>(a / b);
  }
};
struct Remainder {
  template <class X>
  static X apply(X a, X b, bool) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<X>)
      if (b == -1) return 0;
    return static_cast<X>(a % b);
  }
};
// Of a NaN and a number the number, with .NaN the NaN; -0 is less than +0.
template <bool kLargest>
struct Extreme {
  template <class X>
  static X apply(X a, X b, bool keep_nan) {
    if constexpr (std::is_floating_point_v<X>) {
      if (std::isnan(a) || std::isnan(b)) {
        if (keep_nan) return std::numeric_limits<X>::quiet_NaN();
        return std::isnan(a) ? b : a;
      }
      if (a == 0 && b == 0) return std::signbit(a) == kLargest ? b : a;
    }
    return (a > b) == kLargest ? a : b;
  }
};

// --- products of twice the width ----------------------------------------------------------------

template <class X>
struct Wider;
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};

template <class X>
typename Wider<X>::type product(Thread& thread, const Instruction& i) {
  using W = typename Wider<X>::type;
  return static_cast<W>(read<X>(thread, i.from[0])) * static_cast<W>(read<X>(thread, i.from[1]));
}
template <class X>
struct Wide {
  static Outcome run(Thread& thread, const Instruction& i) {
    using W = typename Wider<X>::type;
    W result = product<X>(thread, i);
    if (i.from.size() > 2) result += read<W>(thread, i.from[2]);
    write(thread, i.to[0], result);
    return Outcome::next;
  }
};
template <class X>
struct High {
  static Outcome run(Thread& thread, const Instruction& i) {
    auto result = static_cast<X>(product<X>(thread, i) >> (8 * sizeof(X)));
    if (i.from.size() > 2) result = static_cast<X>(result + read<X>(thread, i.from[2]));
    write(thread, i.to[0], result);
    return Outcome::next;
  }
};
Execute choose_wide(Type type) {
  switch (type) {
    case Type::u16: return Wide<uint16_t>::run;
    case Type::s16: return Wide<int16_t>::run;
    case Type::u32: return Wide<uint32_t>::run;
    case Type::s32: return Wide<int32_t>::run;
    default: return nullptr;
  }
}
Execute choose_high(Type type) {
  switch (type) {
    case Type::u16: return High<uint16_t>::run;
    case Type::s16: return High<int16_t>::run;
    case Type::u32: return High<uint32_t>::run;
    case Type::s32: return High<int32_t>::run;
    case Type::u64: return High<uint64_t>::run;
    case Type::s64: return High<int64_t>::run;
    default: return nullptr;
  }
}

template <class X>
struct MultiplyAdd {
  static Outcome run(Thread& thread, const Instruction& i) {
    X a = read<X>(thread, i.from[0]), b = read<X>(thread, i.from[1]);
    X c = read<X>(thread, i.from[2]);
    if constexpr (std::is_integral_v<X>) {
      write(thread, i.to[0], static_cast<X>(Multiply::apply(a, b, false) + c));
    } else {
      const X result = std::fma(flushed(a, i.flush), flushed(b, i.flush), flushed(c, i.flush));
      write(thread, i.to[0], canonical(flushed(saturated(result, i.saturate), i.flush)));
    }
    return Outcome::next;
  }
};

// --- one operand --------------------------------------------------------------------------------

enum class Unary : int8_t { absolute, negative, reciprocal, root, inverse_root, exp2, log2 };

double apply_unary(Unary function, double value) {
  switch (function) {
    case Unary::absolute: return std::fabs(value);
    case Unary::negative: return -value;
    case Unary::reciprocal: return 1 / value;
    case Unary::root: return std::sqrt(value);
    case Unary::inverse_root: return 1 / std::sqrt(value);
    case Unary::exp2: return std::exp2(value);
    default: return std::log2(value);
  }
}

template <class X>
struct UnaryOf {
  static Outcome run(Thread& thread, const Instruction& i) {
    const auto function = static_cast<Unary>(i.variant);
    X a = read<X>(thread, i.from[0]);
    if constexpr (std::is_integral_v<X>) {
      const bool negate = function == Unary::negative || (std::is_signed_v<X> && a < X(0));
      write(thread, i.to[0], negate ? static_cast<X>(0 - static_cast<uint64_t>(a)) : a);
    } else if constexpr (is_half<X>) {
      write(thread, i.to[0], narrowed<X>(apply_unary(function, widened(a))));
    } else {
      // Double is wide enough to round sqrt and 1/x of a float right when rounded once more.
      const auto result = static_cast<X>(apply_unary(function, flushed(a, i.flush)));
      write(thread, i.to[0], canonical(flushed(result, i.flush)));
    }
    return Outcome::next;
  }
};

template <class H>
Outcome packed_unary(Thread& thread, const Instruction& i) {
  const auto a = read<uint32_t>(thread, i.from[0]);
  uint32_t result = 0;
  for (const int shift : {0, 16}) {
    const H x{static_cast<uint16_t>(a >> shift)};
    const H y = narrowed<H>(apply_unary(static_cast<Unary>(i.variant), widened(x)));
    result |= uint32_t{y.bits} << shift;
  }
  write(thread, i.to[0], result);
  return Outcome::next;
}

// --- builders -----------------------------------------------------------------------------------

// What floating-point instructions may say; rounding is to the nearest.
void take_float_modifiers(Statement& s, Instruction& i, Type type) {
  if (!is_float(type)) return;
  i.category = Category::floating_point;
  s.take("rn");
  i.flush = s.take("ftz");
  i.saturate = s.take("sat");
}

Builder binary_builder(Execute (*choose_code)(Type)) {
  return [choose_code](Statement& s, Instruction& i) {
    const Type type = s.take_type();
    take_float_modifiers(s, i, type);
    s.take_one_of({"approx", "full"});
    s.usual_operands(i, type, 2);
    i.execute = choose_code(type);
  };
}

Builder extreme_builder(Execute (*choose_code)(Type)) {
  return [choose_code](Statement& s, Instruction& i) {
    i.flag = s.take("NaN");
    binary_builder(choose_code)(s, i);
  };
}

void build_multiply(Statement& s, Instruction& i) {
  const Type type = s.take_type();
  take_float_modifiers(s, i, type);
  s.usual_operands(i, type, 2);
  switch (s.take_one_of({"wide", "hi", "lo"})) {
    case 0: i.execute = choose_wide(type); break;
    case 1: i.execute = choose_high(type); break;
    default: i.execute = choose_binary<Multiply>(type);
  }
}

void build_multiply_add(Statement& s, Instruction& i) {
  const Type type = s.take_type();
  take_float_modifiers(s, i, type);
  s.usual_operands(i, type, 3);
  switch (s.take_one_of({"wide", "hi", "lo"})) {
    case 0: i.execute = choose_wide(type); break;
    case 1: i.execute = choose_high(type); break;
    default: i.execute = choose<MultiplyAdd, kIntegers | kFloats>(type);
  }
}

Builder unary_builder(Unary function) {
  return [function](Statement& s, Instruction& i) {
    const Type type = s.take_type();
    take_float_modifiers(s, i, type);
    s.take("approx");
    s.usual_operands(i, type, 1);
    i.variant = static_cast<int8_t>(function);
    if (type == Type::f16x2)
      i.execute = packed_unary<Float16>;
    else if (type == Type::bf16x2)
      i.execute = packed_unary<BFloat16>;
    else if (function == Unary::absolute || function == Unary::negative)
      i.execute = choose<UnaryOf, kNumbers>(type);
    else
      i.execute = choose<UnaryOf, kFloats>(type);
  };
}

}  // namespace

void add_arithmetic(Builders& builders) {
  builders["add"] = binary_builder(choose_binary<Add>);
  builders["sub"] = binary_builder(choose_binary<Subtract>);
  builders["div"] = binary_builder(choose<Binary<Divide>::Of, kIntegers | kFloats>);
  builders["rem"] = binary_builder(choose<Binary<Remainder>::Of, kIntegers>);
  builders["min"] = extreme_builder(choose_binary<Extreme<false>>);
  builders["max"] = extreme_builder(choose_binary<Extreme<true>>);
  builders["mul"] = build_multiply;
  builders["mad"] = build_multiply_add;
  builders["fma"] = build_multiply_add;
  builders["abs"] = unary_builder(Unary::absolute);
  builders["neg"] = unary_builder(Unary::negative);
  builders["rcp"] = unary_builder(Unary::reciprocal);
  builders["sqrt"] = unary_builder(Unary::root);
  builders["rsqrt"] = unary_builder(Unary::inverse_root);
  builders["ex2"] = unary_builder(Unary::exp2);
  builders["lg2"] = unary_builder(Unary::log2);
}

}  // namespace ptx_on_host
