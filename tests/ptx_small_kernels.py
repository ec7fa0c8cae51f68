"""Small kernels of PTX and how they are run, for the tests of the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import ptx_on_host as ptx
import torch

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


# --- kernels for warps and blocks -----------------------------------------------------------------

#: Stores %r9 of every thread of a block.
STORE = "mul.wide.u32 %d3, %r1, 4; add.s64 %d3, %d3, %d2; st.global.b32 [%d3], %r9;"
#: Thread i of 64 reads in shared memory what thread 63 - i has written there.
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
#: A whole barrier of the cluster.
CLUSTER = "barrier.cluster.arrive; barrier.cluster.wait;"
#: Every block waits at its mbarrier for the neighbour in the cluster, and for what it sends.
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
