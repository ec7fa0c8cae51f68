// Instructions that access memory: ld, st, atom, red, cp.async, prefetch.
#include <algorithm>
#include <cstring>

#include "execute.h"
#include "memory.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

uint64_t address_of(const Thread& thread, const Instruction& i) {
  return address_in(i.space, bits_of(thread, i.from[0]), i.offset);
}

Category category_of(Space space) {
  switch (space) {
    case Space::shared:
    case Space::shared_cluster: return Category::shared_memory;
    case Space::param:
    case Space::local:
    case Space::constant: return Category::parameters;
    default: return Category::global_memory;
  }
}

// How caches are to treat an access, which changes no value. An order that it promises
// (.acquire, .release, .relaxed) is not known here and stays, to be refused.
void take_cache_hints(Statement& s) {
  static constexpr const char* kHints[] = {
      "volatile",
      "weak",
      "ca",
      "cg",
      "cs",
      "cv",
      "lu",
      "wb",
      "wt",
      "nc",
      "L1::evict_normal",
      "L1::evict_unchanged",
      "L1::evict_first",
      "L1::evict_last",
      "L1::no_allocate",
      "L2::64B",
      "L2::128B",
      "L2::256B",
  };
  for (const char* hint : kHints) s.take(hint);
}

int vector_size(Statement& s) {
  static constexpr int kSizes[] = {2, 4, 8};
  const int index = s.take_one_of({"v2", "v4", "v8"});
  return index < 0 ? 1 : kSizes[index];
}

// --- ld and st ----------------------------------------------------------------------------------

template <class X>
struct Load {
  static Outcome run(Thread& thread, const Instruction& i) {
    const size_t count = i.to.size();
    const uint8_t* const from =
        access(thread, i.space, address_of(thread, i), count * sizeof(X), AccessKind::read);
    X values[8];
    std::memcpy(values, from, count * sizeof(X));
    for (size_t k = 0; k < count; ++k) write(thread, i.to[k], values[k]);
    return Outcome::next;
  }
};

template <class X>
struct Store {
  static Outcome run(Thread& thread, const Instruction& i) {
    const size_t count = i.from.size() - 1;
    X values[8];
    for (size_t k = 0; k < count; ++k) values[k] = read<X>(thread, i.from[k + 1]);
    uint8_t* const to = access(thread, i.space, address_of(thread, i), count * sizeof(X),
                               AccessKind::write, values);
    std::memcpy(to, values, count * sizeof(X));
    return Outcome::next;
  }
};

void build_load(Statement& s, Instruction& i) {
  i.space = s.take_space();
  i.category = category_of(i.space);
  const Type type = s.take_type();
  take_cache_hints(s);
  const int count = vector_size(s);
  i.to = s.values(0, type);
  i.from.push_back(s.address(1, &i.offset));
  if (i.to.size() != static_cast<size_t>(count)) s.refuse("has not as many registers as it says");
  // Signed ones fill wider registers with their sign, floats are bits.
  i.execute = is_signed(type) ? choose<Load, kIntegers>(type) : choose_by_size<Load>(type);
}

void build_store(Statement& s, Instruction& i) {
  i.space = s.take_space();
  i.category = category_of(i.space);
  const Type type = s.take_type();
  take_cache_hints(s);
  const int count = vector_size(s);
  i.from.push_back(s.address(0, &i.offset));
  for (const Operand& value : s.values(1, type)) i.from.push_back(value);
  if (i.from.size() - 1 != static_cast<size_t>(count))
    s.refuse("has not as many registers as it says");
  i.execute = choose_by_size<Store>(type);
}

// --- atom and red -------------------------------------------------------------------------------

enum class Atomic : int8_t { add, min, max, exchange, compare_and_swap, and_, or_, xor_ };

template <class X>
X apply_atomic(Atomic function, X old, X operand, X swap) {
  switch (function) {
    case Atomic::add: return old + operand;
    case Atomic::min: return std::min(old, operand);
    case Atomic::max: return std::max(old, operand);
    case Atomic::exchange: return operand;
    case Atomic::compare_and_swap: return old == operand ? swap : old;
    default: break;
  }
  if constexpr (std::is_integral_v<X>) {
    if (function == Atomic::and_) return old & operand;
    if (function == Atomic::or_) return old | operand;
    return old ^ operand;
  }
  return old;
}

template <class X>
struct AtomicOf {
  static Outcome run(Thread& thread, const Instruction& i) {
    uint8_t* const at =
        access(thread, i.space, address_of(thread, i), sizeof(X), AccessKind::atomic);
    const X swap = i.from.size() > 2 ? read<X>(thread, i.from[2]) : X(0);
    X old;
    std::memcpy(&old, at, sizeof(X));
    const X made =
        apply_atomic(static_cast<Atomic>(i.variant), old, read<X>(thread, i.from[1]), swap);
    std::memcpy(at, &made, sizeof(X));
    if (!i.to.empty()) write(thread, i.to[0], old);
    return Outcome::next;
  }
};

void build_atomic(Statement& s, Instruction& i) {
  i.space = s.take_space();
  i.category = category_of(i.space);
  const Type type = s.take_type();
  // They do not order other accesses, which is what .relaxed says.
  s.take("relaxed");
  s.take_one_of({"cta", "cluster", "gpu", "sys"});
  const int function = s.take_one_of({"add", "min", "max", "exch", "cas", "and", "or", "xor"});
  if (function < 0) s.refuse();
  i.variant = static_cast<int8_t>(function);
  if (is_float(type) && function > static_cast<int>(Atomic::add)) s.refuse();
  size_t operand = 0;
  if (s.opcode() == "atom") i.to.push_back(s.value(operand++, type));
  i.from.push_back(s.address(operand++, &i.offset));
  while (operand < s.operands()) i.from.push_back(s.value(operand++, type));
  if (size_of(type) >= 4) i.execute = choose<AtomicOf, kIntegers | kFloats>(type);
}

// --- cp.async -----------------------------------------------------------------------------------

Outcome begin_copy(Thread& thread, const Instruction& i) {
  const auto bytes = read<uint32_t>(thread, i.from[2]);
  // Fewer bytes than that are read where it says so; the rest is written as zeros.
  const uint32_t from_bytes =
      i.from.size() > 3 ? std::min(read<uint32_t>(thread, i.from[3]), bytes) : bytes;
  const uint64_t to = address_in(Space::shared, bits_of(thread, i.from[0]), i.offset);
  uint64_t from = 0;
  if (from_bytes != 0) {
    from = bits_of(thread, i.from[1]) + static_cast<uint64_t>(i.other_offset);
    access(thread, Space::global, from, from_bytes, AccessKind::read);
  }
  thread.copies.push_back({to, from, bytes, from_bytes, thread.copy_group});
  return Outcome::next;
}

Outcome commit_copies(Thread& thread, const Instruction&) {
  ++thread.copy_group;
  return Outcome::next;
}

// Makes the copies of all groups but the newest so many.
Outcome wait_for_copies(Thread& thread, const Instruction& i) {
  const int newest = i.flag ? 0 : static_cast<int>(i.from[0].value);
  const auto due = [&](const Copy& copy) {
    return i.flag || copy.group < thread.copy_group - newest;
  };
  for (const Copy& copy : thread.copies) {
    if (!due(copy)) continue;
    uint8_t* const to = access(thread, Space::shared, copy.to, copy.bytes, AccessKind::write);
    std::memset(to, 0, copy.bytes);
    if (copy.from_bytes != 0)
      std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.from_bytes);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), due),
                      thread.copies.end());
  return Outcome::next;
}

void build_copy(Statement& s, Instruction& i) {
  i.category = Category::shared_memory;
  if (!s.take("async")) s.refuse();
  if (s.take("commit_group")) {
    i.execute = commit_copies;
  } else if (s.take("wait_all")) {
    i.flag = true;
    i.execute = wait_for_copies;
  } else if (s.take("wait_group")) {
    i.from.push_back(s.value(0, Type::u32));
    i.execute = wait_for_copies;
  } else {
    if (s.take_one_of({"shared", "shared::cta"}) < 0 || !s.take("global")) s.refuse();
    take_cache_hints(s);
    i.from.push_back(s.address(0, &i.offset));
    i.from.push_back(s.address(1, &i.other_offset));
    for (size_t k = 2; k < s.operands(); ++k) i.from.push_back(s.value(k, Type::u32));
    i.execute = begin_copy;
  }
}

// --- hints --------------------------------------------------------------------------------------

// A prefetch may name any address: none is an error.
void build_prefetch(Statement& s, Instruction& i) {
  i.category = Category::global_memory;
  s.take_space();
  s.take_one_of({"L1", "L2"});
  i.from.push_back(s.address(0, &i.offset));
  i.execute = nothing;
}

}  // namespace

void add_memory(Builders& builders) {
  builders["ld"] = build_load;
  builders["st"] = build_store;
  builders["atom"] = build_atomic;
  builders["red"] = build_atomic;
  builders["cp"] = build_copy;
  builders["prefetch"] = build_prefetch;
}

}  // namespace ptx_on_host
