"""A ring of slots in shared memory on Hopper: who may fill a slot, who may read it, and which slot comes next."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def new_barriers(STAGES: gl.constexpr):
    """(full, empty), `[STAGES, 1]` each: a slot is full when its copies have arrived, and empty when the warps that
    multiply have given it back."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    gl.thread_barrier()
    return full, empty


@gluon.jit
def locate(ring, step):
    """(slot of a step, parity of the turn in which the step has it)"""
    STAGES: gl.constexpr = ring.full.shape[0]
    return step % STAGES, step // STAGES & 1
