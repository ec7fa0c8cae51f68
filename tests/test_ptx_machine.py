"""The interpreter of PTX as a machine: memory, warps and barriers, and what it counts."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx_on_host as ptx
import pytest
import torch
from ptx_small_kernels import (
    BUFFER,
    CLUSTER,
    HEADER,
    MBARRIER,
    NEIGHBOUR,
    REGISTERS,
    REVERSED,
    STORE,
    module,
    run,
)

pytestmark = pytest.mark.skipif(
    ptx.why_not_here() is not None, reason=f"ptx on host: {ptx.why_not_here()}"
)

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


@pytest.mark.parametrize("order", ptx.ORDERS)
def test_mbarrier(order: str) -> None:
    made = module(MBARRIER.format(arrivals=1), kernel_variables=BUFFER)
    options = ptx.Options(order=order)
    out = run(made, np.zeros(1), np.zeros(64, np.uint32), 32, 2, cluster=2, options=options)
    assert out.tolist() == [6] * 32 + [5] * 32


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
