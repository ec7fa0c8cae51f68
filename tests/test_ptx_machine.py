"""The interpreter of PTX against small kernels: what it computes and counts, what it notices."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import ptx_on_host as ptx
import pytest
import torch

pytestmark = pytest.mark.skipif(
    ptx.why_not_here() is not None, reason=f"ptx on host: {ptx.why_not_here()}"
)

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<32>; "
    ".reg .f32 %f<16>; .reg .f64 %g<16>;"
)

BITS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def module(body: str, variables: str = "", kernel_variables: str = "") -> ptx.Module:
    """A kernel ``test(in, out)`` with %d1 = in, %d2 = out, %r1 = thread of the block."""
    text = f"""{HEADER}{variables}
.visible .entry test(.param .u64 in, .param .u64 out)
{{
{REGISTERS}
{kernel_variables}
ld.param.u64 %d1, [in];
ld.param.u64 %d2, [out];
mov.u32 %r1, %tid.x;
{body}
ret;
}}
"""
    return ptx.Module(text)


def run(
    made: ptx.Module,
    given: np.ndarray[Any, Any],
    out: np.ndarray[Any, Any],
    threads: int = 1,
    blocks: int = 1,
    **options: Any,
) -> np.ndarray[Any, Any]:
    source, target = (torch.from_numpy(a.view(np.uint8)) for a in (given, out))
    arguments = [ctypes.c_uint64(t.data_ptr()) for t in (source, target)]
    with ptx.memory(source, target):
        made.launch("test", (blocks,), (threads,), arguments, **options)
    return out


def evaluate(
    instructions: str, operands: Sequence[np.ndarray[Any, Any]], result: str
) -> np.ndarray[Any, Any]:
    """Runs instructions once for every element: operands in %a, %b, %c, result in %z.

    Registers have the width of their operand; ``result`` is the width of %z, such as "b32".
    """
    names = "abc"
    count = operands[0].size
    loads, declared = [], [f".reg .{result} %z;"]
    given = b""
    for name, values in zip(names, operands, strict=False):
        width = f"b{8 * values.dtype.itemsize}"
        declared.append(f".reg .{width} %{name};")
        offset = (len(given) + 15) // 16 * 16
        given = given.ljust(offset, b"\0") + values.tobytes()
        loads.append(
            f"mul.wide.u32 %d3, %r1, {values.dtype.itemsize}; add.s64 %d3, %d3, %d1; "
            f"ld.global.{width} %{name}, [%d3+{offset}];"
        )
    size = np.dtype(BITS[result]).itemsize
    body = "\n".join(
        (
            *loads,
            instructions,
            f"mul.wide.u32 %d4, %r1, {size}; add.s64 %d4, %d4, %d2; st.global.{result} [%d4], %z;",
        )
    )
    made = module(body, kernel_variables=" ".join(declared))
    out = np.zeros(count, BITS[result])
    return run(made, np.frombuffer(bytearray(given), np.uint8), out, threads=count)


# --- integers -------------------------------------------------------------------------------------

EDGES = [
    0,
    1,
    2,
    3,
    5,
    7,
    31,
    32,
    33,
    255,
    256,
    1000,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
]
A, B = (np.array(v, np.uint32) for v in zip(*((a, b) for a in EDGES for b in EDGES), strict=True))


def signed(value: int, bits: int = 32) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return int(Fraction(a, b)) if b else -1  # towards zero


def field(value: int, begin: int, length: int, is_signed: bool) -> int:
    begin, length = begin & 255, length & 255
    bits = [(value >> i & 1) if i < 32 else None for i in range(begin, begin + length)]
    known = [bit for bit in bits if bit is not None]
    sign = 0
    if is_signed and length:
        last = min(begin + length - 1, 31)
        sign = value >> last & 1
    padded = (known + [sign] * 32)[:32]
    return sum(bit << i for i, bit in enumerate(padded))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %z, %a, %b;", lambda a, b: a + b),
        ("sub.s32 %z, %a, %b;", lambda a, b: a - b),
        ("mul.lo.s32 %z, %a, %b;", lambda a, b: a * b),
        ("mul.hi.u32 %z, %a, %b;", lambda a, b: a * b >> 32),
        ("mul.hi.s32 %z, %a, %b;", lambda a, b: signed(a) * signed(b) >> 32),
        ("mad.lo.s32 %z, %a, %b, %a;", lambda a, b: a * b + a),
        ("div.u32 %z, %a, %b;", quotient),
        ("div.s32 %z, %a, %b;", lambda a, b: quotient(signed(a), signed(b))),
        ("rem.u32 %z, %a, %b;", lambda a, b: a % b if b else a),
        ("rem.s32 %z, %a, %b;", lambda a, b: int(math.fmod(signed(a), signed(b))) if b else a),
        ("min.s32 %z, %a, %b;", lambda a, b: min(signed(a), signed(b))),
        ("max.u32 %z, %a, %b;", max),
        ("abs.s32 %z, %a;", lambda a, b: abs(signed(a))),
        ("neg.s32 %z, %a;", lambda a, b: -a),
        ("and.b32 %z, %a, %b;", lambda a, b: a & b),
        ("or.b32 %z, %a, %b;", lambda a, b: a | b),
        ("xor.b32 %z, %a, %b;", lambda a, b: a ^ b),
        ("not.b32 %z, %a;", lambda a, b: ~a),
        ("shl.b32 %z, %a, %b;", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32 %z, %a, %b;", lambda a, b: a >> b if b < 32 else 0),
        ("shr.s32 %z, %a, %b;", lambda a, b: signed(a) >> min(b, 31)),
        ("shf.l.wrap.b32 %z, %a, %b, 9;", lambda a, b: (b << 32 | a) << 9 >> 32),
        ("shf.r.clamp.b32 %z, %a, %b, 40;", lambda a, b: b),
        ("clz.b32 %z, %a;", lambda a, b: 32 - a.bit_length()),
        ("popc.b32 %z, %a;", lambda a, b: a.bit_count()),
        ("brev.b32 %z, %a;", lambda a, b: int(f"{a:032b}"[::-1], 2)),
        ("bfe.u32 %z, %a, %b, 7;", lambda a, b: field(a, b, 7, False)),
        ("bfe.s32 %z, %a, 3, %b;", lambda a, b: field(a, 3, b, True)),
        ("bfi.b32 %z, %a, %b, 4, 8;", lambda a, b: b & ~0xFF0 | (a & 0xFF) << 4),
        ("prmt.b32 %z, %a, %b, 0x5410;", lambda a, b: a & 0xFFFF | b << 16),
        ("selp.b32 %z, %a, %b, %p1;", lambda a, b: b),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integers(instruction: str, expected: Callable[[int, int], int]) -> None:
    got = evaluate(f"setp.ne.s32 %p1, %r1, %r1; {instruction}", (A, B), "b32")
    wanted = [expected(int(a), int(b)) & 0xFFFFFFFF for a, b in zip(A, B, strict=True)]
    assert got.tolist() == wanted


def test_lookup_table_by_hand() -> None:
    # 0x1d = 0b00011101: of (a, b, c) true for 000, 010, 011, 100.
    a, b, c = (np.array([v], np.uint32) for v in (0b11110000, 0b11001100, 0b10101010))
    (got,) = evaluate("lop3.b32 %z, %a, %b, %c, 0x1d;", (a, b, c), "b32")
    assert int(got) & 0xFF == 0b00011101


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.wide.u32 %z, %a, %b;", lambda a, b: a * b),
        ("mul.wide.s32 %z, %a, %b;", lambda a, b: signed(a) * signed(b)),
        ("cvt.u64.u32 %z, %a;", lambda a, b: a),
        ("cvt.s64.s32 %z, %a;", lambda a, b: signed(a)),
        ("mov.b64 %z, {%a, %b};", lambda a, b: b << 32 | a),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_wide_integers(instruction: str, expected: Callable[[int, int], int]) -> None:
    got = evaluate(instruction, (A, B), "b64")
    assert got.tolist() == [expected(int(a), int(b)) % 2**64 for a, b in zip(A, B, strict=True)]


# --- floating point -------------------------------------------------------------------------------

FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3.4e38, np.inf, -np.inf, np.nan, 0.1, 1.5, -2.5, 1e-20],
    np.float32,
)
X, Y = (v.copy() for v in np.meshgrid(FLOATS, FLOATS))
X, Y = X.ravel(), Y.ravel()


def same(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Same numbers, zeros with their signs, NaN for NaN."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(got), nan)
    unsigned = np.uint32 if expected.dtype == np.float32 else np.uint64
    assert np.array_equal(got[~nan].view(unsigned), expected[~nan].view(unsigned))


def exact_fma(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total == 0:
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    # Round once: a double that is odd where it is not exact rounds on as the exact number.
    rounded = float(total)
    if Fraction(rounded) != total:
        towards = math.nextafter(rounded, math.inf if Fraction(rounded) < total else -math.inf)
        odd = struct.unpack("<q", struct.pack("<d", rounded))[0] & 1
        rounded = rounded if odd else towards
    return rounded


def sign_aware(largest: bool, keep_nan: bool) -> Callable[..., np.ndarray[Any, Any]]:
    def choose(a: np.float32, b: np.float32) -> np.float32:
        if np.isnan(a) or np.isnan(b):
            return (
                np.float32(np.nan)
                if keep_nan or (np.isnan(a) and np.isnan(b))
                else (b if np.isnan(a) else a)
            )
        if a == b == 0:
            negative = (
                np.signbit(a) and np.signbit(b) if largest else np.signbit(a) or np.signbit(b)
            )
            return np.float32(-0.0 if negative else 0.0)
        return max(a, b) if largest else min(a, b)

    return lambda a, b: np.array([choose(x, y) for x, y in zip(a, b, strict=True)], np.float32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.rn.f32 %z, %a, %b;", lambda a, b: a + b),
        ("sub.f32 %z, %a, %b;", lambda a, b: a - b),
        ("mul.f32 %z, %a, %b;", lambda a, b: a * b),
        ("div.rn.f32 %z, %a, %b;", lambda a, b: a / b),
        ("sqrt.rn.f32 %z, %a;", lambda a, b: np.sqrt(a)),
        ("rcp.rn.f32 %z, %a;", lambda a, b: np.float32(1) / a),
        ("abs.f32 %z, %a;", lambda a, b: np.abs(a)),
        ("neg.f32 %z, %a;", lambda a, b: -a),
        ("max.f32 %z, %a, %b;", sign_aware(True, False)),
        ("min.f32 %z, %a, %b;", sign_aware(False, False)),
        ("max.NaN.f32 %z, %a, %b;", sign_aware(True, True)),
        (
            "fma.rn.f32 %z, %a, %b, %a;",
            lambda a, b: np.array(
                [exact_fma(*map(float, v)) for v in zip(a, b, a, strict=True)]
            ).astype(np.float32),
        ),
        (
            "mul.ftz.f32 %z, %a, %b;",
            lambda a, b: flush(flush(a) * flush(b)),
        ),
        ("add.sat.f32 %z, %a, %b;", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_floats(instruction: str, expected: Callable[..., np.ndarray[Any, Any]]) -> None:
    with np.errstate(all="ignore"):
        wanted = expected(X, Y).astype(np.float32)
    same(evaluate(instruction, (X, Y), "b32").view(np.float32), wanted)


def flush(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


def test_one_nan_comes_out() -> None:
    nans = np.array([0x7FC00001, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    one = np.ones(3, np.float32)
    for instruction in ("add.f32 %z, %a, %b;", "max.NaN.f32 %z, %a, %b;", "sqrt.rn.f32 %z, %a;"):
        assert evaluate(instruction, (nans, one), "b32").tolist() == [0x7FFFFFFF] * 3


def test_doubles() -> None:
    a, b = X.astype(np.float64), Y.astype(np.float64) * 1.1
    with np.errstate(all="ignore"):
        for instruction, wanted in (
            ("add.rn.f64 %z, %a, %b;", a + b),
            ("mul.rn.f64 %z, %a, %b;", a * b),
            ("div.rn.f64 %z, %a, %b;", a / b),
        ):
            same(evaluate(instruction, (a, b), "b64").view(np.float64), wanted)


@pytest.mark.parametrize("operator", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("unordered", [False, True])
def test_comparisons(operator: str, unordered: bool) -> None:
    compare = {
        "eq": np.equal,
        "ne": lambda a, b: np.less(a, b) | np.greater(a, b),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }[operator]
    wanted = compare(X, Y) | (unordered & (np.isnan(X) | np.isnan(Y)))
    name = f"setp.{operator}{'u' if unordered else ''}.f32"
    for combined, function in (("", None), (".and", np.logical_and), (".xor", np.logical_xor)):
        other = ", !%p2" if combined else ""
        text = (
            f"setp.eq.u32 %p2, %r1, 0; {name.replace('.f32', combined + '.f32')} %p1|%p3, %a, %b"
            f"{other}; selp.b32 %z, 1, 0, %p1; @%p3 add.u32 %z, %z, 2;"
        )
        not_first = np.arange(X.size) != 0
        first = wanted if function is None else function(wanted, not_first)
        second = ~wanted if function is None else function(~wanted, not_first)
        assert evaluate(text, (X, Y), "b32").tolist() == (first + 2 * second).tolist()


# --- conversions ----------------------------------------------------------------------------------

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_rounded_to_the_nearest(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-45, 20, (900,), generator=generator)
    values = torch.ldexp(torch.randn(900, generator=generator), exponents)
    ties = torch.ldexp(1 + torch.arange(100) / 2.0**12, torch.arange(100) % 60 - 45)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65504, 65519, 65520, 3.4e38])
    x = torch.cat([values, ties, special]).float()[:1000]
    wanted = x.to(HALVES[name])
    got = evaluate(f"cvt.rn.{name}.f32 %z, %a;", (x.numpy(),), "b16")
    assert np.array_equal(got, wanted.view(torch.int16).numpy().view(np.uint16))
    back = evaluate(f"cvt.f32.{name} %z, %a;", (got,), "b32").view(np.float32)
    assert np.array_equal(back, wanted.float().numpy())


def test_two_halves_at_once() -> None:
    a, b = np.array([1.5, -3.0], np.float32), np.array([2.0**-24, 1e9], np.float32)
    got = evaluate("cvt.rn.bf16x2.f32 %z, %a, %b;", (a, b), "b32")
    bits = [torch.from_numpy(v).bfloat16().view(torch.int16).tolist() for v in (a, b)]
    wanted = [(high % 2**16) << 16 | low % 2**16 for high, low in zip(*bits, strict=True)]
    assert got.tolist() == wanted
    negated = evaluate("neg.bf16x2 %z, %a;", (got,), "b32")
    assert negated.tolist() == (got ^ 0x80008000).tolist()
    # Of each half its own predicate.
    text = "setp.lt.bf16x2 %p1|%p2, %a, %b; selp.b32 %z, 1, 0, %p1; @%p2 add.u32 %z, %z, 2;"
    # %p1 is of the low half: 2**-24 and 1e9 are not less than their negatives; 1.5 is not, -3 is.
    assert evaluate(text, (got, negated), "b32").tolist() == [0, 2]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("cvt.rni.s32.f32", np.round),
        ("cvt.rzi.s32.f32", np.trunc),
        ("cvt.rmi.s32.f32", np.floor),
        ("cvt.rpi.s32.f32", np.ceil),
    ],
)
def test_floats_to_integers(instruction: str, expected: Callable[..., Any]) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7.9, -7.9, 1e9, 3e9, -3e9, np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        wanted = np.clip(np.nan_to_num(expected(x.astype(np.float64)), nan=0), -(2**31), 2**31 - 1)
    got = evaluate(f"{instruction} %z, %a;", (x,), "b32").view(np.int32)
    assert got.tolist() == wanted.astype(np.int64).tolist()


def test_integers_to_floats() -> None:
    got = evaluate("cvt.rn.f32.s32 %z, %a;", (A,), "b32").view(np.float32)
    assert np.array_equal(got, A.view(np.int32).astype(np.float32))
    got = evaluate("cvt.rn.f32.u32 %z, %a;", (A,), "b32").view(np.float32)
    assert np.array_equal(got, A.astype(np.float32))
    got = evaluate("cvt.rn.f64.s32 %z, %a;", (A,), "b64").view(np.float64)
    assert np.array_equal(got, A.view(np.int32).astype(np.float64))
    x = np.array([1e-320, 1 + 2.0**-30, 1e300, -0.0])
    with np.errstate(over="ignore"):
        same(evaluate("cvt.rn.f32.f64 %z, %a;", (x,), "b32").view(np.float32), x.astype("f4"))


# --- memory ---------------------------------------------------------------------------------------


def test_vectors_and_signs() -> None:
    given = np.arange(16, dtype=np.float32)
    body = """
ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d1+16];
st.global.v2.f32 [%d2], {%f4, %f1};
ld.global.s8 %r2, [%d1+7];
st.global.b32 [%d2+8], %r2;
"""
    given.view(np.int8)[7] = -3
    out = run(module(body), given, np.zeros(3, np.float32))
    assert out[:2].tolist() == [7, 4]
    assert out.view(np.int32)[2] == -3


def test_generic_shared_local_and_constant_memory() -> None:
    body = """
mov.u64 %d5, table;
ld.global.b32 %r2, [%d5+4];
mov.u32 %r3, buffer;
st.shared.b32 [%r3+8], %r2;
cvt.u64.u32 %d6, %r3;
cvta.shared.u64 %d6, %d6;
ld.b32 %r4, [%d6+8];
cvta.to.shared.u64 %d7, %d6;
cvt.u32.u64 %r5, %d7;
sub.s32 %r5, %r5, %r3;
mov.u64 %d8, stack;
st.local.b32 [%d8+4], %r4;
ld.local.b32 %r6, [%d8+4];
isspacep.shared %p1, %d6;
selp.b32 %r7, 1, 0, %p1;
st.global.v4.b32 [%d2], {%r4, %r5, %r6, %r7};
"""
    made = module(
        body,
        ".global .align 4 .b32 table[3] = {5, 77, 9};",
        ".shared .align 16 .b8 buffer[32]; .local .align 8 .b8 stack[16];",
    )
    assert run(made, np.zeros(1), np.zeros(4, np.uint32)).tolist() == [77, 0, 77, 1]


def test_structures_as_parameters() -> None:
    text = f"""{HEADER}
.visible .entry test(.param .align 8 .b8 all[24], .param .u64 out)
{{
{REGISTERS}
ld.param.v2.u32 {{%r1, %r2}}, [all];
ld.param.f64 %g1, [all+16];
ld.param.u64 %d2, [out];
cvt.rn.f32.f64 %f1, %g1;
st.global.v2.b32 [%d2], {{%r1, %r2}};
st.global.f32 [%d2+8], %f1;
}}
"""
    out = torch.zeros(3, dtype=torch.int32)
    packed = ctypes.create_string_buffer(struct.pack("<iiqd", 4, 5, 6, 2.5), 24)
    with ptx.memory(out):
        ptx.Module(text).launch("test", (1,), (1,), [packed, ctypes.c_uint64(out.data_ptr())])
    assert out[:2].tolist() == [4, 5]
    assert out[2:].view(torch.float32).item() == 2.5


def test_atomics_and_blocks() -> None:
    body = "mov.u32 %r2, %ctaid.x; add.u32 %r2, %r2, 1; red.global.add.u32 [%d2], %r2;"
    out = run(module(body), np.zeros(1), np.zeros(1, np.uint32), threads=40, blocks=3)
    assert out[0] == 40 * (1 + 2 + 3)


def test_asynchronous_copies() -> None:
    body = """
mov.u32 %r2, buffer;
cp.async.ca.shared.global [%r2], [%d1+8], 8;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.v2.f32 {%f1, %f2}, [%r2];
st.global.v2.f32 [%d2], {%f2, %f1};
"""
    made = module(body, kernel_variables=".shared .align 16 .b8 buffer[16];")
    out = run(made, np.arange(4, dtype=np.float32), np.zeros(2, np.float32))
    assert out.tolist() == [3, 2]


def test_loops_and_jump_tables() -> None:
    body = """
mov.u32 %r2, 0;
mov.u32 %r3, 0;
$loop:
setp.ge.u32 %p1, %r3, %r1;
@%p1 bra $done;
add.u32 %r3, %r3, 1;
add.u32 %r2, %r2, %r3;
bra.uni $loop;
$done:
and.b32 %r4, %r1, 1;
$table: .branchtargets $even, $odd;
brx.idx %r4, $table;
$odd:
neg.s32 %r2, %r2;
$even:
mul.wide.u32 %d3, %r1, 4;
add.s64 %d3, %d3, %d2;
st.global.b32 [%d3], %r2;
"""
    out = run(module(body), np.zeros(1), np.zeros(6, np.int32), threads=6)
    assert out.tolist() == [0, -1, 3, -6, 10, -15]


# --- warps ----------------------------------------------------------------------------------------

STORE = "mul.wide.u32 %d3, %r1, 4; add.s64 %d3, %d3, %d2; st.global.b32 [%d3], %r9;"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.bfly.b32 %r9, %r2, 5, 31, -1;", lambda i: 10 * (i ^ 5)),
        ("shfl.sync.up.b32 %r9, %r2, 3, 0, -1;", lambda i: 10 * (i - 3 if i >= 3 else i)),
        ("shfl.sync.down.b32 %r9, %r2, 3, 31, -1;", lambda i: 10 * (i + 3 if i < 29 else i)),
        ("shfl.sync.idx.b32 %r9, %r2, 7, 31, -1;", lambda i: 70),
        # Segments of eight lanes: 0x1807.
        ("shfl.sync.idx.b32 %r9, %r2, 2, 0x181f, -1;", lambda i: 10 * (i // 8 * 8 + 2)),
        ("vote.sync.ballot.b32 %r9, %p1, -1;", lambda i: sum(1 << k for k in range(0, 32, 3))),
        ("redux.sync.add.s32 %r9, %r2, -1;", lambda i: 10 * 31 * 16),
        ("redux.sync.max.u32 %r9, %r2, -1;", lambda i: 310),
        ("match.any.sync.b32 %r9, %r3, -1;", lambda i: 0x11111111 << (i % 4)),
        ("elect.sync %r9|%p2, -1;", lambda i: 0),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_warps(instruction: str, expected: Callable[[int], int]) -> None:
    body = f"""
mul.lo.u32 %r2, %r1, 10;
and.b32 %r3, %r1, 3;
rem.u32 %r4, %r1, 3;
setp.eq.u32 %p1, %r4, 0;
{instruction}
{STORE}
"""
    out = run(module(body), np.zeros(1), np.zeros(32, np.uint32), threads=32)
    assert out.tolist() == [expected(i) & 0xFFFFFFFF for i in range(32)]


def test_matrices() -> None:
    # Lane l stores rows of 16 bytes: afterwards row r of matrix m is 32 m + 4 r .. + 3.
    body = (
        """
mov.u32 %r2, buffer;
shl.b32 %r3, %r1, 4;
add.u32 %r2, %r2, %r3;
add.u32 %r4, %r1, 32;
add.u32 %r5, %r1, 64;
add.u32 %r6, %r1, 96;
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r1, %r4, %r5, %r6};
bar.sync 0;
mov.u32 %r7, buffer;
shl.b32 %r8, %r1, 2;
add.u32 %r7, %r7, %r8;
ld.shared.b32 %r9, [%r7+128];
"""
        + STORE
    )
    made = module(body, kernel_variables=".shared .align 16 .b8 buffer[512];")
    out = run(made, np.zeros(1), np.zeros(32, np.uint32), threads=32)
    assert out.tolist() == [32 + i for i in range(32)]


def test_transposed_matrices() -> None:
    # Stored as it is and loaded transposed: element (r, c) is where (c, r) was.
    body = (
        """
mov.u32 %r2, buffer;
and.b32 %r3, %r1, 7;
shl.b32 %r3, %r3, 4;
add.u32 %r2, %r2, %r3;
shl.b32 %r4, %r1, 1;
add.u32 %r5, %r4, 1;
shl.b32 %r5, %r5, 16;
or.b32 %r4, %r4, %r5;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r4};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r9}, [%r2];
"""
        + STORE
    )
    made = module(body, kernel_variables=".shared .align 16 .b8 buffer[512];")
    out = run(made, np.zeros(1), np.zeros(32, np.uint32), threads=32)
    elements = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert np.array_equal(out.view(np.uint16).reshape(8, 8), elements.T)


# --- barriers -------------------------------------------------------------------------------------

REVERSED = """
mov.u32 %r2, buffer;
shl.b32 %r3, %r1, 2;
add.u32 %r4, %r2, %r3;
st.shared.b32 [%r4], %r1;
{barrier}
sub.u32 %r5, 63, %r1;
shl.b32 %r5, %r5, 2;
add.u32 %r5, %r5, %r2;
ld.shared.b32 %r9, [%r5];
"""
BUFFER = ".shared .align 16 .b8 buffer[256];"
#: Every thread reads its own place of the next block's shared memory.
NEIGHBOUR = """
mov.u32 %r2, buffer;
shl.b32 %r3, %r1, 2;
add.u32 %r4, %r2, %r3;
mov.u32 %r5, %cluster_ctarank;
mul.lo.u32 %r6, %r5, 100;
add.u32 %r6, %r6, %r1;
st.shared.b32 [%r4], %r6;
{before}
xor.b32 %r7, %r5, 1;
mapa.shared::cluster.u32 %r8, %r4, %r7;
ld.shared::cluster.b32 %r9, [%r8];
mov.u32 %r10, %ctaid.x;
mad.lo.u32 %r11, %r10, 64, %r1;
mul.wide.u32 %d3, %r11, 4;
add.s64 %d3, %d3, %d2;
st.global.b32 [%d3], %r9;
{after}
"""
CLUSTER = "barrier.cluster.arrive; barrier.cluster.wait;"


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_barrier_of_a_block(order: str) -> None:
    made = module(REVERSED.format(barrier="bar.sync 0;") + STORE, kernel_variables=BUFFER)
    options = ptx.Options(order=order)
    out = run(made, np.zeros(1), np.zeros(64, np.uint32), threads=64, options=options)
    assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_cluster(order: str) -> None:
    made = module(NEIGHBOUR.format(before=CLUSTER, after=CLUSTER), kernel_variables=BUFFER)
    options = ptx.Options(order=order)
    out = run(made, np.zeros(1), np.zeros(128, np.uint32), 64, 2, cluster=2, options=options)
    assert out.tolist() == [*range(100, 164), *range(64)]


MBARRIER = """
mov.u32 %r2, buffer;
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], {arrivals};
barrier.cluster.arrive;
barrier.cluster.wait;
add.u32 %r4, %r2, 8;
mov.u32 %r5, %cluster_ctarank;
add.u32 %r6, %r5, 5;
xor.b32 %r7, %r5, 1;
mapa.shared::cluster.u32 %r8, %r2, %r7;
mapa.shared::cluster.u32 %r10, %r4, %r7;
@%p1 st.shared::cluster.b32 [%r10], %r6;
@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];
$wait:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra $wait;
ld.shared.b32 %r9, [%r4];
mov.u32 %r12, %ctaid.x;
mad.lo.u32 %r11, %r12, 32, %r1;
mul.wide.u32 %d3, %r11, 4;
add.s64 %d3, %d3, %d2;
st.global.b32 [%d3], %r9;
barrier.cluster.arrive;
barrier.cluster.wait;
"""


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_mbarrier(order: str) -> None:
    made = module(MBARRIER.format(arrivals=1), kernel_variables=BUFFER)
    options = ptx.Options(order=order)
    out = run(made, np.zeros(1), np.zeros(64, np.uint32), 32, 2, cluster=2, options=options)
    assert out.tolist() == [6] * 32 + [5] * 32


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("ld.global.b32 %r2, [%d1+16];", "4 bytes to global memory that is not there"),
        ("ld.global.b32 %r2, [%d1+-4];", "global memory that is not there"),
        ("st.global.b32 [%d2+13], %r1;", "not aligned"),
        ("mov.u32 %r2, buffer; st.shared.b32 [%r2+256], %r1;", "offset 256 of 256 bytes of shared"),
        ("mov.u32 %r2, buffer; ld.shared.b32 %r3, [%r2+-4];", "below the beginning of shared"),
        ("setp.eq.u32 %p1, %r1, 0; @%p1 bar.sync 0;", "of which some threads have ended"),
        (
            "setp.lt.u32 %p1, %r1, 3; @%p1 bra $a; bar.sync 0; bra $b;\n$a:\nbar.sync 0;\n$b:",
            "threads of one warp wait at different barriers",
        ),
        ("shfl.sync.idx.b32 %r2, %r1, 0, 31, 2;", "its own member mask leaves out"),
        (
            "setp.eq.u32 %p1, %r1, 5; @%p1 exit; vote.sync.any.pred %p2, %p1, -1;",
            "member mask with a lane that has ended",
        ),
        (
            "setp.eq.u32 %p1, %r1, 5; @%p1 bar.sync 1, 64; bar.sync 0;",
            "deadlock:\n  1 threads wait at `@%p1 bar.sync 1, 64`",
        ),
        ("trap;", "the kernel gave up"),
        ("barrier.cluster.wait;", "no arrival before it"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "a second arrival"),
        ("st.global.b32 [%d2], %r1;", "a race: writes what was written by thread"),
        (
            "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%d2], 7; ld.global.b32 %r3, [%d2];",
            "a race: reads what was written by thread",
        ),
        (
            "mov.u32 %r2, buffer; mbarrier.arrive.shared::cta.b64 %d5, [%r2];",
            "an mbarrier that was not initialized",
        ),
        (
            "mov.u32 %r2, buffer; cp.async.ca.shared.global [%r2], [%d1], 8;",
            "before the asynchronous copies that it began were waited for",
        ),
    ],
)
def test_mistakes_are_noticed(body: str, report: str) -> None:
    made = module(body, kernel_variables=BUFFER)
    with pytest.raises(ptx.KernelError) as error:
        run(made, np.zeros(2), np.zeros(4), threads=32)
    assert report in str(error.value)


@pytest.mark.parametrize("order", ptx.ORDERS)
@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;", "bar.sync 0, 32;"])
def test_a_missing_barrier_is_noticed_in_every_order(order: str, barrier: str) -> None:
    made = module(REVERSED.format(barrier=barrier) + STORE, kernel_variables=BUFFER)
    with pytest.raises(ptx.KernelError, match="a race: "):
        run(made, np.zeros(1), np.zeros(64), 64, options=ptx.Options(order=order))


def test_a_barrier_of_the_warp_is_enough_within_it() -> None:
    text = (REVERSED.format(barrier="bar.warp.sync -1;") + STORE).replace("63", "31")
    out = run(module(text, kernel_variables=BUFFER), np.zeros(1), np.zeros(32, np.uint32), 32)
    assert out.tolist() == list(range(31, -1, -1))
    shuffled = text.replace("bar.warp.sync -1;", "shfl.sync.idx.b32 %r12, %r1, 0, 31, -1;")
    with pytest.raises(ptx.KernelError, match="a race: "):
        run(module(shuffled, kernel_variables=BUFFER), np.zeros(1), np.zeros(32), 32)


@pytest.mark.parametrize(
    ("before", "after", "report"),
    [
        ("", CLUSTER, "another block before any barrier of the cluster|a race: "),
        (CLUSTER, "", "the shared memory of a block that has ended"),
        ("bar.sync 0;", CLUSTER, "another block before any barrier of the cluster|a race: "),
    ],
)
def test_mistakes_in_clusters(before: str, after: str, report: str) -> None:
    made = module(NEIGHBOUR.format(before=before, after=after), kernel_variables=BUFFER)
    with pytest.raises(ptx.KernelError, match=report):
        run(made, np.zeros(1), np.zeros(64), 64, 2, cluster=2)


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_mistakes_at_mbarriers(order: str) -> None:
    options = ptx.Options(order=order)

    def attempt(text: str) -> None:
        made = module(text, kernel_variables=BUFFER)
        run(made, np.zeros(1), np.zeros(32), 32, 2, cluster=2, options=options)

    right = MBARRIER.format(arrivals=1)
    with pytest.raises(ptx.KernelError, match="a race: "):
        attempt(right.replace("@!%p2 bra $wait;", ""))
    with pytest.raises(ptx.KernelError, match="deadlock"):
        attempt(MBARRIER.format(arrivals=2))
    with pytest.raises(ptx.KernelError, match="for 0 arrivals"):
        attempt(MBARRIER.format(arrivals=0))


def test_junk_is_not_zero() -> None:
    made = module(
        "mov.u32 %r2, buffer; ld.shared.f32 %f1, [%r2]; st.global.f32 [%d2], %f1;",
        kernel_variables=BUFFER,
    )
    assert np.isnan(run(made, np.zeros(1), np.zeros(1, np.float32))[0])
    made = module("st.global.b32 [%d2], %r20;")
    assert run(made, np.zeros(1), np.zeros(1, np.uint32))[0] == 0xDEADBEEF


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("tanh.approx.f32 %f1, %f2;", "`tanh.approx.f32 %f1, %f2` is not known"),
        ("add.rz.f32 %f1, %f1, %f1;", "has the modifier .rz"),
        ("ld.acquire.gpu.global.b32 %r2, [%d1];", "has the modifier .acquire"),
        ("barrier.cluster.arrive.relaxed;", "has the modifier .relaxed"),
        ("mad.lo.cc.u32 %r1, %r1, %r1, %r1;", "has the modifier .cc"),
        ("add.s32 %r1, %r1, %r99;", "%r99"),
        ("bra $nowhere;", "no label $nowhere"),
        ("add.f16x2 %r1, %r1;", "another number of operands"),
        (".weird .b8 x[2];", "is not known"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(body: str, report: str) -> None:
    with pytest.raises(ptx.KernelError) as error:
        run(module(body), np.zeros(1), np.zeros(1))
    assert report in str(error.value)


# --- counts ---------------------------------------------------------------------------------------


def counted(body: str, threads: int = 32) -> dict[str, Any]:
    made = module(body, kernel_variables=".shared .align 16 .b8 buffer[16384];")
    options = ptx.Options(count=True, races=False)
    run(made, np.zeros(2048), np.zeros(2048), threads=threads, options=options)
    found: dict[str, Any] = ptx.counts()["test"]
    return found


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors(stride: int, sectors: int) -> None:
    body = f"mul.wide.u32 %d3, %r1, {stride}; add.s64 %d3, %d3, %d1; ld.global.b32 %r2, [%d3];"
    # np.zeros is aligned to 16 bytes only: begin at a whole sector.
    body = "add.s64 %d1, %d1, 31; and.b64 %d1, %d1, -32; " + body
    traffic = counted(body)["traffic"]["global loads"]
    assert traffic["requests"] == 1
    assert traffic["bytes"] == 128
    assert traffic["pieces"] == sectors
    assert traffic["ideal"] == (4 if stride else 1)


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(4, 1), (8, 2), (64, 16), (128, 32), (132, 1), (0, 1)]
)
def test_bank_conflicts(stride: int, wavefronts: int) -> None:
    body = f"mov.u32 %r3, buffer; mad.lo.u32 %r2, %r1, {stride}, %r3; ld.shared.b32 %r4, [%r2];"
    traffic = counted(body)["traffic"]["shared loads"]
    assert (traffic["requests"], traffic["pieces"], traffic["ideal"]) == (1, wavefronts, 1)


def test_issued_instructions() -> None:
    # Lanes that go another way cost the warp its time: 16 of 32 execute one more.
    body = (
        "and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra $end; add.u32 %r3, %r1, 1;\n$end:"
    )
    instructions = counted(body)["instructions"]
    assert instructions["integer and logic"] == [32 + 32 + 16, 3]
    assert instructions["branches"] == [32 + 32, 2]
    assert instructions["parameters and local memory"] == [64, 2]
