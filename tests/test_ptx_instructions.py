"""The interpreter of PTX, instruction by instruction: integers, floating point, conversions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import ptx_on_host as ptx
import pytest
import torch
from ptx_small_kernels import evaluate

pytestmark = pytest.mark.skipif(
    ptx.why_not_here() is not None, reason=f"ptx on host: {ptx.why_not_here()}"
)

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
