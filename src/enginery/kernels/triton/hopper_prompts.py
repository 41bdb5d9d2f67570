"""Attention of prompts on Hopper GPUs: asynchronous matrix products, keys by the tensor memory accelerator (TMA).

The algorithm is FlashAttention-3's (Shah et al., 2024), with a paged context and grouped heads. A program has a warp
that starts the copies (`hopper_ring.py`) and two warpgroups that compute, each 64 of a tile's 128 tokens, so that the
softmax of one runs under the products of the other. There is one program a multiprocessor; they take turns over the
tiles. With S_p = Q·K_pᵀ and P_p = 2^(S_p − maximum), step p of a warpgroup is

    start S_p;  start O += P_{p−1}·V_{p−1};  wait for S_p;  softmax of S_p;  wait for O

and its softmax hides under its own product with V, too. The order is a request that ptxas may decline, and in three
places the code is written as it is because otherwise it does (`attend_steps`, `pack_pairs`); a fourth is in
`count_tiles`. `cuobjdump -sass` shows whether it complied: HGMMA of V, the exponentials (MUFU.EX2), then the wait.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from enginery.kernels.triton.hopper_ring import (
    BLOCK_M,
    BLOCK_N,
    HALF,
    HEAD,
    PAGE,
    STAGES,
    SWIZZLED,
    Batch,
    Ring,
    count_tiles,
    find_tile,
    item_of,
    locate,
    pages_of,
    produce,
    valid_rows,
    wait_full,
)
from enginery.kernels.triton.online_softmax import EMPTY, LOG2_E

ROWS: gl.constexpr = gl.constexpr(64)
"""Of a tile for each of the two warpgroups: the height of their matrix products."""
REGISTERS: gl.constexpr = gl.constexpr(232)
"""Of a thread that computes; three warpgroups start with 168 each, and the one that copies gives most of its own."""
PRODUCT: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""How the four warps of a warpgroup hold scores `[ROWS, BLOCK_N]` and sums `[ROWS, HEAD]`: both are 128 wide."""
WEIGHTS: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
OF_ROWS: gl.constexpr = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))
BY_LINES: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""How they hold what goes to or comes from memory: 16 bytes a thread, a row of a head by 16 threads."""

LEAST_SEQUENCES = 32
"""For which the kernel is compiled: a warp looks through as many at once (`count_tiles`)."""


@gluon.jit
def load_queries(batch, tile, row, target):
    """Puts ROWS rows of a tile into shared memory."""
    local_token = tile.first + row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_LINES))
    owned = (local_token < tile.length)[:, None]
    token = (tile.begin + local_token).to(gl.int64)
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, BY_LINES))
    rows = batch.query + (token * batch.query_stride + tile.head * HEAD)[:, None]
    data = gl.load(rows + columns[None, :], owned, other=0.0)
    target.store(data)
    # The matrix units read what the threads have written.
    fence_async_shared()


@gluon.jit
def store_result(batch, tile, row, result, buffer):
    """Writes ROWS rows of the output; through shared memory, so that each thread writes 16 bytes at a time."""
    local_token = tile.first + row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_LINES))
    token = (tile.begin + local_token).to(gl.int64)
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, BY_LINES))
    buffer.store(result.to(gl.bfloat16))
    pointers = batch.output + ((token * batch.HEADS + tile.head) * HEAD)[:, None] + columns[None, :]
    gl.store(pointers, buffer.load(BY_LINES), (local_token < tile.length)[:, None])


@gluon.jit
def clear_rows(values, valid):
    """Zeroes the rows of a slot of values from `valid` on: what lies past the end may be NaN, which no weight mends.

    Both warpgroups do so, each before its own product; they write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, PAGE, gl.SliceLayout(1, layout))
    pieces = pages_of(values)
    for place in range(gl.maximum(valid, 0) // PAGE, BLOCK_N // PAGE):
        for half in gl.static_range(HEAD // HALF):
            piece = pieces.index(half * (BLOCK_N // PAGE) + place)
            kept = piece.load(layout)
            piece.store(gl.where((place * PAGE + rows < valid)[:, None], kept, gl.zeros_like(kept)))
    fence_async_shared()


@gluon.jit
def softmax(scores, maximum, total, factor):
    """(weights, decay of what was summed so far, new maximum, new total); maxima in units of log2."""
    peak = gl.maximum(maximum, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - peak[:, None])
    decay = gl.exp2(maximum - peak)
    return weights, decay, peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def pack_pairs(weights):
    """`[M, N]` in 32 bits to pairs of 16 bits `[M, N/2]` in one integer each: so the weights go from step to step.

    As single 16-bit values ptxas gives each a register of its own and puts them together in every step, by 64 PRMT.
    """
    even, odd = gl.split(weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [even, odd], gl.int32, False, 1)


@gluon.jit
def unpack_pairs(pairs):
    """The left operand of a product, from `pack_pairs`: the same registers."""
    even = (pairs & 0xFFFF).to(gl.int16).to(gl.bfloat16, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    weights = gl.join(even, odd).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(weights, WEIGHTS)


@gluon.jit
def mask_scores(scores, tile, step, position):
    """−inf for the keys of a step that a row does not see; `position`: of each row among the new tokens."""
    is_new, start = locate(tile, step)
    bound = gl.where(is_new, gl.minimum(position + 1, tile.length), tile.context) - start
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, PRODUCT))
    return gl.where(columns[None, :] < bound[:, None], scores, -float("inf"))


@gluon.jit
def start_scores(queries, keys):
    """Starts Q·Kᵀ of `[ROWS, HEAD]` and `[BLOCK_N, HEAD]` in shared memory."""
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
    return warpgroup_mma(queries, keys.permute((1, 0)), scores, use_acc=False, is_async=True)


@gluon.jit
def attend_steps(
    batch, tile, ring, queries, sums, pairs, maximum, total, position, done, start, stop, MASKED: gl.constexpr
):  # fmt: skip
    """The steps start..stop, each with the products S_p and O += P_{p−1}·V_{p−1}; `done`: steps of earlier tiles.

    What a step reads has arrived before it begins. That of the next one is waited for between the softmax and the end
    of the products: ptxas moves no arithmetic across a waiting loop; without it the softmax comes after the products.
    """
    for step in range(start, stop):
        slot = (done + step) % STAGES
        values = ring.value_slots.index(slot)
        if MASKED:
            valid = valid_rows(tile, step - 1)
            if valid < BLOCK_N:
                clear_rows(values, valid)
        # Before the products: ptxas runs them one by one if it finds that operands are prepared between them.
        weights = unpack_pairs(pairs)
        scores = start_scores(queries, ring.key_slots.index(slot))
        sums = warpgroup_mma(weights, values, sums, is_async=True)
        scores = warpgroup_mma_wait(1, (scores,))
        if MASKED:
            scores = mask_scores(scores, tile, step, position)
        next_weights, decay, maximum, total = softmax(scores, maximum, total, batch.factor)
        wait_full(ring, done + step + 1)
        # The products have read `pairs` until here: only now may its registers be written. Packed any earlier, ptxas
        # gives up on asynchronous products altogether (its warning C7513) and runs all of them one by one.
        sums, pairs = warpgroup_mma_wait(0, (sums, pairs))
        pairs = pack_pairs(next_weights)
        mbarrier.arrive(ring.empty.index(slot))
        sums = sums * decay[:, None]
    return sums, pairs, maximum, total


@gluon.jit
def attend_tile(batch, tile, ring, queries, row, done):
    """Rows `row ..` of a tile; their queries lie in shared memory, where the result passes through, too."""
    steps = tile.new_steps + tile.context_steps
    load_queries(batch, tile, row, queries)
    position = tile.first + row + gl.arange(0, ROWS, OF_ROWS)
    maximum = gl.full([ROWS], EMPTY, gl.float32, OF_ROWS)
    total = gl.zeros([ROWS], gl.float32, OF_ROWS)
    sums = gl.zeros([ROWS, HEAD], gl.float32, PRODUCT)

    slot = wait_full(ring, done)
    scores = start_scores(queries, ring.key_slots.index(slot))
    scores = warpgroup_mma_wait(0, (scores,))
    mbarrier.arrive(ring.empty.index(slot))
    scores = mask_scores(scores, tile, 0, position)
    weights, _, maximum, total = softmax(scores, maximum, total, batch.factor)
    pairs = pack_pairs(weights)
    wait_full(ring, done + 1)

    clear = gl.minimum(tile.masked_new + tile.masked_context + 1, steps)
    sums, pairs, maximum, total = attend_steps(
        batch, tile, ring, queries, sums, pairs, maximum, total, position, done, 1, clear, True
    )
    sums, pairs, maximum, total = attend_steps(
        batch, tile, ring, queries, sums, pairs, maximum, total, position, done, clear, steps, False
    )

    slot = (done + steps) % STAGES
    values = ring.value_slots.index(slot)
    valid = valid_rows(tile, steps - 1)
    if valid < BLOCK_N:
        clear_rows(values, valid)
    sums = warpgroup_mma(unpack_pairs(pairs), values, sums, is_async=True)
    sums, pairs = warpgroup_mma_wait(0, (sums, pairs))
    mbarrier.arrive(ring.empty.index(slot))
    store_result(batch, tile, row, sums / total[:, None], queries)


@gluon.jit
def consume(batch, ring, queries, GROUP: gl.constexpr):
    """A warpgroup that computes ROWS rows of all tiles of its program."""
    tiles, tiles_until, items = count_tiles(batch)
    done = 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = item_of(turn)
        if item < items:
            tile = find_tile(batch, tiles, tiles_until, items, item)
            attend_tile(batch, tile, ring, queries.index(GROUP), GROUP * ROWS, done)
            done += tile.new_steps + tile.context_steps + 1


@gluon.jit
def start_warps(batch, ring, queries):
    """Four warps, those of the launch, have the upper rows, four more the lower ones, and one fills the ring."""
    gl.warp_specialize(
        [(consume, (batch, ring, queries, 0)), (consume, (batch, ring, queries, 1)), (produce, (batch, ring))],
        worker_num_warps=[4, 1],
        worker_num_regs=[REGISTERS, 3 * 168 - 2 * REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_sequences", "table_stride"])
def attend_prompts(
    query, output, new_keys, new_values, key_pages, value_pages, block_tables, query_start, seq_lens,
    num_sequences, query_stride, table_stride, key_block_rows, value_block_rows, factor,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, PADDED_SEQUENCES: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    """The sequences of more than SHORT new tokens; programs take turns over tiles.

    `factor`: scale · log2(e). `new_keys` and `new_values` describe the projections `[T, Hkv·HEAD]`, `key_pages` and
    `value_pages` the rows of the caches; a page of a head lies PAGE rows after the one of the head before.
    """
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, HEAD], SWIZZLED)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, HEAD], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.thread_barrier()
    ring = Ring(keys, values, full, empty)
    queries = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M // ROWS, ROWS, HEAD], SWIZZLED)
    # Made where it is passed on: an assignment would turn its constants into tensors.
    start_warps(
        Batch(
            query, output, new_keys, new_values, key_pages, value_pages, block_tables, query_start, seq_lens,
            num_sequences, query_stride, table_stride, key_block_rows, value_block_rows, factor,
            GROUPS, HEADS, PADDED_SEQUENCES, SHORT,
        ),
        ring, queries,
    )  # fmt: skip


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *caches: torch.Tensor) -> bool:
    """Whether the kernel reads such tensors: bfloat16, heads of 128, pages of 16, rows as TMA can address them."""
    tensors = (query, key, value, *caches)
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.shape[-1] == HEAD.value for tensor in tensors)
        and all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0 for tensor in tensors)
        and all(tensor.stride(1) == HEAD.value and tensor.stride(2) == 1 for tensor in (query, key, value))
        and all(cache.shape[2] == PAGE.value and cache[0].is_contiguous() for cache in caches)
        and all(cache.stride(0) % HEAD.value == 0 for cache in caches)
    )


def rows_of_pages(cache: torch.Tensor) -> torch.Tensor:
    """The rows `[any, D]` of a cache `[blocks, Hkv, PAGE, D]`, whose blocks may lie apart by whole rows."""
    blocks, heads, page, size = cache.shape
    rows = (blocks - 1) * (cache.stride(0) // size) + heads * page
    return cache.as_strided((rows, size), (size, 1))


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    short: int,
    processors: int,
) -> None:
    """Writes the rows of `output` whose sequence has more than `short` new tokens."""
    tokens, heads, size = query.shape
    sequences = len(seq_lens)
    new_rows = [
        TensorDescriptor.from_tensor(rows.flatten(1), [BLOCK_N.value, size], SWIZZLED.value) for rows in (key, value)
    ]
    pages = [
        TensorDescriptor.from_tensor(rows_of_pages(cache), [PAGE.value, HALF.value], SWIZZLED.value)
        for cache in (key_cache, value_cache)
    ]
    most_tiles = (tokens // BLOCK_M.value + sequences) * heads
    attend_prompts[(min(most_tiles, processors),)](
        query, output, *new_rows, *pages, block_tables, query_start, seq_lens, sequences, query.stride(0),
        block_tables.stride(0), key_cache.stride(0) // size, value_cache.stride(0) // size,
        scale * LOG2_E.value, GROUPS=heads // key.shape[1], HEADS=heads,
        PADDED_SEQUENCES=max(LEAST_SEQUENCES, triton.next_power_of_2(sequences)), SHORT=short, num_warps=4,
    )  # fmt: skip
