"""The interpreter of PTX notices what a kernel does wrong, and names what it does not know."""

from __future__ import annotations

import numpy as np
import ptx_on_host as ptx
import pytest
from ptx_small_kernels import BUFFER, CLUSTER, MBARRIER, NEIGHBOUR, REVERSED, STORE, module, run

pytestmark = pytest.mark.skipif(
    ptx.why_not_here() is not None, reason=f"ptx on host: {ptx.why_not_here()}"
)


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
