"""`outlier_stats` on CUDA, in Triton: one read of x, one write of q, two launches.

    sweep   programs stride over groups of tiles of R rows x W columns. What concerns a row is stored at once, what
            concerns a group at its end; what concerns a column stays in registers, and is stored once a program.
    finish  maxima and counts over the programs; moments of the groups, pooled in float64.

A row wider than a tile is cut into strips: `merge_strips` then joins what they say of the row, and the integers, whose
scale is not known before, take a second sweep. More than `POOLED` groups are pooled in two steps.

Neither timing nor the grid, hence the number of multiprocessors, changes a bit of the result. Maxima and counts are of
integers (the bits of |x| order like |x|, with NaN above inf), where order does not matter. Moments begin as float32
sums of y, y^2, y^3, y^4 over a group, y = x / 2^e - c; groups are cut by the shape and by whether x is quantized, and
pooled in index order about the mean of all (Chan et al. 1983; Pebay, SAND2008-6212). c is the mean of the group's first
tile, 2^e its absmax rounded down to a power of two, so nothing overflows; where a later tile is far larger the sums are
scaled down, exactly. Since c is a mean of the group's own data, cancellation costs at most a factor of the tiles in a
group: relative errors are about 1e-6, whatever the offset.

Shapes: M rows, N columns; S strips of a row, P programs of a strip, G groups.
"""

from contextlib import nullcontext
from ctypes import c_float
from functools import lru_cache
from math import nan
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROWEST = 128  # columns of a tile
WIDE = 8192  # the widest row that is one tile
WIDEST = 16384  # the same where it is quantized: cut into strips it would be read twice, which costs more than to spill
STRIP = 4096
PER_WARP = 1024  # elements of a tile
STAGED = 65536  # bytes of tiles on their way to a program; every device has so much shared memory
MOST_TILES = 8  # of a group
GROUPS = 2048  # aimed at: fewer tiles a group balance the programs, more save their sums
POOLED = 2048  # groups that one program pools
INTERPRETED = 4  # programs at work, or so, where there is no device

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
INF = tl.constexpr(0x7F800000)  # bits of float32 inf; those of a NaN without its sign are above
SMALL = tl.constexpr((127 - 40) << 23)  # bits of 2^-40 and 2^40: between them squares can be summed as they are
LARGE = tl.constexpr((127 + 40) << 23)
TINY = tl.constexpr(0x02FE0001)  # bits of the least float32 that divides 127 without overflow
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded, half to even, into its low bits


@triton.jit
def bits_of_abs(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def pinned(x):
    """x, computed here and now: else the compiler defers it past the branches, and what it is made of stays alive."""
    if COMPILED:
        return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def exponent_of(bits):
    """e + 127 of 2^e <= |value| < 2^(e+1), kept where both 2^e and 2^-e are normal numbers."""
    return tl.minimum(tl.maximum(bits >> 23, 1), 253)


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(x_ptr, stride, rows, cols, inside, EVEN: tl.constexpr):
    if EVEN:
        x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :])
    else:
        x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0)
    return x.to(tl.float32)


@triton.jit
def store_integers(q_ptr, N, rows, cols, inside, x, absmax_bits, EVEN: tl.constexpr):
    """rint(x * (127 / absmax)) as int8; x is 0 where it shall not be quantized."""
    least = tl.min(tl.where(absmax_bits > 0, absmax_bits, INF), axis=0)
    if (least < TINY) | (tl.max(absmax_bits, axis=0) >= INF):
        x = tl.where((absmax_bits < TINY)[:, None], x * 1e38 * 1e38, x)  # 127 / absmax is inf
        x = tl.where((absmax_bits < INF)[:, None], x, 0.0)
    usual = (absmax_bits >= TINY) & (absmax_bits < INF)
    scale = tl.div_rn(127.0, tl.where(usual, absmax_bits.to(tl.float32, bitcast=True), 127.0))
    # The clamp also keeps product and sum apart: contracted to one operation they would round only once.
    clamped = tl.minimum(tl.maximum(x * scale[:, None], -127.0), 127.0)
    q = (clamped + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    if EVEN:
        tl.store(q_ptr + rows[:, None] * N + cols[None, :], q)
    else:
        tl.store(q_ptr + rows[:, None] * N + cols[None, :], q, mask=inside)


@triton.jit
def sweep(
    x_ptr,  # [M, N], rows `stride` apart
    stride,
    M,
    N,
    strips,
    threshold,  # NaN: nothing is an outlier
    skip_ptr,  # [N]
    row_absmax_ptr,  # [S, M], as the three below
    row_l2_ptr,
    row_count_ptr,
    row_scale_ptr,
    q_ptr,  # [M, N]
    col_absmax_ptr,  # [P, N]
    col_count_ptr,  # [P, N], written only where col_seen
    col_seen_ptr,  # [P, S]
    sums_ptr,  # [6, G]: 2^e, c and the sums of the four powers of y
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,  # of a group
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,  # M and N are multiples of R * TILES and W
    SKIP: tl.constexpr,
    SCALE: tl.constexpr,  # write row_scale
    QUANTIZE: tl.constexpr,  # write q: only where a row is one tile wide
    STAGES: tl.constexpr,
):
    strip = tl.program_id(0) % strips
    program = tl.program_id(0) // strips
    step = tl.num_programs(0) // strips
    groups = tl.cdiv(M, R * TILES)
    cols = strip * W + tl.arange(0, W)
    in_row = cols < N
    width = tl.minimum(W, N - strip * W).to(tl.float32)
    if SKIP:
        skipped = tl.load(skip_ptr + cols, mask=in_row, other=0) != 0
    col_bits = tl.zeros([W], tl.int32)
    col_count = tl.zeros([W], tl.int32)
    exponent = 0
    centre = 0.0
    sum1 = tl.zeros([THREADS], tl.float32)
    sum2 = tl.zeros([THREADS], tl.float32)
    sum3 = tl.zeros([THREADS], tl.float32)
    sum4 = tl.zeros([THREADS], tl.float32)

    for i in tl.range(0, tl.cdiv(groups - program, step) * TILES, num_stages=STAGES):
        group = program + i // TILES * step
        tile = group * TILES + i % TILES
        rows = tile.to(tl.int64) * R + tl.arange(0, R)
        in_column = rows < M
        inside = in_column[:, None] & in_row[None, :]
        x = load_tile(x_ptr, stride, rows, cols, inside, EVEN)

        bits = bits_of_abs(x)
        col_bits = pinned(tl.maximum(col_bits, tl.max(bits, axis=0)))
        row_bits = tl.max(bits, axis=1)
        tile_bits = tl.max(row_bits, axis=0)
        row_absmax = row_bits.to(tl.float32, bitcast=True)
        row_l2 = tl.sqrt(tl.sum(x * x, axis=1))
        if (tl.min(tl.where(row_bits > 0, row_bits, INF), axis=0) < SMALL) | (tile_bits > LARGE):
            row_exponent = exponent_of(row_bits)
            y = x * power_of_two(254 - row_exponent)[:, None]
            row_l2 = tl.sqrt(tl.sum(y * y, axis=1)) * power_of_two(row_exponent)
            row_l2 = tl.where(row_bits < INF, row_l2, row_absmax)

        tile_exponent = exponent_of(tile_bits)
        if i % TILES == 0:
            exponent = tile_exponent
            centre = tl.sum(x) * power_of_two(254 - exponent) / (tl.minimum(R, M - tile * R) * width)
            centre = tl.where(tl.abs(centre) < 4.0, centre, 0.0)  # the sum may overflow where |x| > 1e30
        elif tile_exponent > exponent + 20:
            ratio = power_of_two(tl.maximum(127 + exponent - tile_exponent, 0))
            sum1 *= ratio
            sum2 *= ratio * ratio
            sum3 *= ratio * ratio * ratio
            sum4 *= ratio * ratio * ratio * ratio
            centre *= ratio
            exponent = tile_exponent
        y = x * power_of_two(254 - exponent) - centre
        if not EVEN:
            y = tl.where(inside, y, 0.0)
        y2 = y * y
        OWN: tl.constexpr = R * W // THREADS  # elements of a thread: their sums need no exchange
        sum1 += tl.sum(tl.reshape(y, [OWN, THREADS], can_reorder=True), axis=0)
        sum2 += tl.sum(tl.reshape(y2, [OWN, THREADS], can_reorder=True), axis=0)
        sum3 += tl.sum(tl.reshape(y2 * y, [OWN, THREADS], can_reorder=True), axis=0)
        sum4 += tl.sum(tl.reshape(y2 * y2, [OWN, THREADS], can_reorder=True), axis=0)
        if i % TILES == TILES - 1:
            sums = tl.reshape(tl.sum(tl.join(tl.join(sum1, sum3), tl.join(sum2, sum4)), axis=0), [4])
            group_ptr = sums_ptr + group * strips + strip
            tl.store(group_ptr, power_of_two(exponent))
            tl.store(group_ptr + groups * strips, centre)
            tl.store(group_ptr + (tl.arange(0, 4) + 2) * (groups * strips), sums)
            sum1 = tl.zeros([THREADS], tl.float32)
            sum2 = tl.zeros([THREADS], tl.float32)
            sum3 = tl.zeros([THREADS], tl.float32)
            sum4 = tl.zeros([THREADS], tl.float32)

        row_count = tl.zeros([R], tl.int32)
        scale_bits = row_bits
        if (tile_bits.to(tl.float32, bitcast=True) >= threshold) | (tile_bits > INF):
            outlier = tl.abs(x) >= threshold
            row_count = tl.sum(outlier.to(tl.int32), axis=1)
            col_count += tl.sum(outlier.to(tl.int32), axis=0)
            if SCALE and not SKIP:
                x = tl.where(outlier, 0.0, x)
                scale_bits = tl.max(bits_of_abs(x), axis=1)
        if SCALE and SKIP:
            x = tl.where(skipped[None, :], 0.0, x)
            scale_bits = tl.max(bits_of_abs(x), axis=1)

        row_ptr = strip.to(tl.int64) * M + rows
        tl.store(row_absmax_ptr + row_ptr, row_absmax, mask=in_column)
        tl.store(row_l2_ptr + row_ptr, row_l2, mask=in_column)
        tl.store(row_count_ptr + row_ptr, row_count, mask=in_column)
        if SCALE:
            tl.store(row_scale_ptr + row_ptr, scale_bits.to(tl.float32, bitcast=True), mask=in_column)
        if QUANTIZE:
            store_integers(q_ptr, N, rows, cols, inside, x, scale_bits, EVEN)

    col_ptr = program * N + cols
    col_absmax = col_bits.to(tl.float32, bitcast=True).to(col_absmax_ptr.dtype.element_ty)
    tl.store(col_absmax_ptr + col_ptr, col_absmax, mask=in_row)
    col_seen = tl.max(col_count, axis=0)
    if col_seen > 0:
        tl.store(col_count_ptr + col_ptr, col_count, mask=in_row)
    tl.store(col_seen_ptr + tl.program_id(0), col_seen)


@triton.jit
def pooled(n, mean, m2, m3, m4):
    """[n, mean, M2, M3, M4] of samples together; float64, [samples] each."""
    total = tl.sum(n)
    centre = tl.sum(n * mean) / total
    d = mean - centre
    return (
        total,
        centre,
        tl.sum(m2 + n * d * d),
        tl.sum(m3 + 3 * d * m2 + n * d * d * d),
        tl.sum(m4 + 4 * d * m3 + 6 * d * d * m2 + n * d * d * d * d),
    )


@triton.jit
def store_moments(moments_ptr, n, mean, m2, m3, m4):
    n, mean, m2, m3, m4 = pooled(n, mean, m2, m3, m4)
    tl.store(moments_ptr, n)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, m2)
    tl.store(moments_ptr + 3, m3)
    tl.store(moments_ptr + 4, m4)


@triton.jit
def finish(
    col_absmax_part_ptr,  # [P, N]
    col_count_part_ptr,  # [P, N]
    col_seen_ptr,  # [P, S]
    sums_ptr,  # [6, G]
    M,
    N,
    strips,
    programs,  # P
    col_absmax_ptr,  # [N]
    col_count_ptr,  # [N]
    moments_ptr,  # [cdiv(G, POOL), 5]
    W: tl.constexpr,
    SPAN: tl.constexpr,  # rows of a group
    POOL: tl.constexpr,
    COLS: tl.constexpr,  # of a program
    PARTS: tl.constexpr,  # that it reads at a time
):
    """The first programs own columns, the others groups."""
    column_programs = tl.cdiv(N, COLS)
    pid = tl.program_id(0)
    if pid < column_programs:
        cols = pid * COLS + tl.arange(0, COLS)
        in_row = (cols < N)[None, :]
        bits = tl.zeros([COLS], tl.int32)
        count = tl.zeros([COLS], tl.int32)
        for start in range(0, programs, PARTS):
            part = start + tl.arange(0, PARTS).to(tl.int64)[:, None]
            there = (part < programs) & in_row
            absmax = tl.load(col_absmax_part_ptr + part * N + cols[None, :], mask=there, other=0)
            bits = tl.maximum(bits, tl.max(bits_of_abs(absmax.to(tl.float32)), axis=0))
            seen = tl.load(col_seen_ptr + part * strips + cols[None, :] // W, mask=there, other=0) > 0
            count += tl.sum(tl.load(col_count_part_ptr + part * N + cols[None, :], mask=there & seen, other=0), axis=0)
        tl.store(col_absmax_ptr + cols, bits.to(tl.float32, bitcast=True), mask=cols < N)
        tl.store(col_count_ptr + cols, count, mask=cols < N)
    else:
        groups = tl.cdiv(M, SPAN) * strips
        pool = pid - column_programs
        group = pool * POOL + tl.arange(0, POOL)
        there = group < groups
        rows = tl.minimum(SPAN, M - group // strips * SPAN)
        n = tl.where(there, rows.to(tl.float64) * tl.minimum(W, N - group % strips * W).to(tl.float64), 0.0)
        power = tl.load(sums_ptr + group, mask=there, other=1).to(tl.float64)
        centre = tl.load(sums_ptr + groups + group, mask=there, other=0).to(tl.float64)
        sum1 = tl.load(sums_ptr + groups * 2 + group, mask=there, other=0).to(tl.float64)
        sum2 = tl.load(sums_ptr + groups * 3 + group, mask=there, other=0).to(tl.float64)
        sum3 = tl.load(sums_ptr + groups * 4 + group, mask=there, other=0).to(tl.float64)
        sum4 = tl.load(sums_ptr + groups * 5 + group, mask=there, other=0).to(tl.float64)
        d = sum1 / tl.maximum(n, 1.0)
        power = tl.where(sum2 < float("inf"), power, float("nan"))  # finite wherever x is
        square = power * power
        store_moments(
            moments_ptr + pool * 5,
            n,
            power * (centre + d),
            square * (sum2 - n * d * d),
            square * power * (sum3 - 3 * d * sum2 + 2 * n * d * d * d),
            square * square * (sum4 - 4 * d * sum3 + 6 * d * d * sum2 - 3 * n * d * d * d * d),
        )


@triton.jit
def pool_moments(part_ptr, parts, moments_ptr, POOL: tl.constexpr):
    part = tl.arange(0, POOL)
    there = part < parts
    n = tl.load(part_ptr + part * 5, mask=there, other=0)
    mean = tl.load(part_ptr + part * 5 + 1, mask=there, other=0)
    m2 = tl.load(part_ptr + part * 5 + 2, mask=there, other=0)
    m3 = tl.load(part_ptr + part * 5 + 3, mask=there, other=0)
    m4 = tl.load(part_ptr + part * 5 + 4, mask=there, other=0)
    store_moments(moments_ptr, n, mean, m2, m3, m4)


@triton.jit
def merge_strips(
    absmax_part_ptr,  # [S, M], as the three below
    l2_part_ptr,
    count_part_ptr,
    scale_part_ptr,
    M,
    strips,
    row_absmax_ptr,  # [M], as the three below
    row_l2_ptr,
    row_count_ptr,
    row_scale_ptr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < M
    bits = tl.zeros([ROWS], tl.int32)
    scale_bits = tl.zeros([ROWS], tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    squares = tl.zeros([ROWS], tl.float64)
    row = rows
    for _ in range(0, strips):
        bits = tl.maximum(bits, bits_of_abs(tl.load(absmax_part_ptr + row, mask=there, other=0)))
        l2 = tl.load(l2_part_ptr + row, mask=there, other=0).to(tl.float64)
        squares += l2 * l2
        count += tl.load(count_part_ptr + row, mask=there, other=0)
        if SCALE:
            scale_bits = tl.maximum(scale_bits, bits_of_abs(tl.load(scale_part_ptr + row, mask=there, other=0)))
        row += M
    tl.store(row_absmax_ptr + rows, bits.to(tl.float32, bitcast=True), mask=there)
    tl.store(row_l2_ptr + rows, tl.sqrt(squares).to(tl.float32), mask=there)
    tl.store(row_count_ptr + rows, count, mask=there)
    if SCALE:
        tl.store(row_scale_ptr + rows, scale_bits.to(tl.float32, bitcast=True), mask=there)


@triton.jit
def quantize_strips(
    x_ptr,  # [M, N], rows `stride` apart
    stride,
    M,
    N,
    threshold,
    skip_ptr,  # [N]
    row_scale_ptr,  # [M]
    q_ptr,  # [M, N]
    R: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    cols = tl.program_id(1) * W + tl.arange(0, W)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    x = load_tile(x_ptr, stride, rows, cols, inside, EVEN)
    if SKIP:
        left_out = (tl.load(skip_ptr + cols, mask=cols < N, other=0) != 0)[None, :]
    else:
        left_out = tl.abs(x) >= threshold
    scale_bits = bits_of_abs(tl.load(row_scale_ptr + rows, mask=rows < M, other=0))
    store_integers(q_ptr, N, rows, cols, inside, tl.where(left_out, 0.0, x), scale_bits, EVEN)


class Plan(NamedTuple):
    """How x is cut, by its shape and whether it is quantized, and what the kernel needs of a multiprocessor."""

    rows: int  # of a tile
    width: int  # of a tile
    tiles: int  # of a group
    strips: int
    warps: int
    registers: int  # of a thread at most: with more, fewer programs would be at work to hide each other's waiting
    stages: int  # tiles on their way to a program, and the one it is at

    @classmethod
    def of(cls, M: int, N: int, itemsize: int, quantize: bool) -> "Plan":
        widest = WIDEST if quantize else WIDE
        width = max(triton.next_power_of_2(N), NARROWEST) if widest >= N else STRIP
        # Two registers of a thread for each of its columns last for the whole sweep: 16 columns leave room, 32 spill.
        warps = min(max(4, 2 * width // PER_WARP), 16)
        rows = max(1, warps * PER_WARP // width)
        strips = triton.cdiv(N, width)
        wanted = triton.cdiv(M, rows) * strips // GROUPS
        tiles = min(max(1 << wanted.bit_length() >> 1, 1), MOST_TILES)
        registers = 168 if quantize and strips == 1 and warps == 4 else 128
        return cls(rows, width, tiles, strips, warps, registers, min(1 + STAGED // (rows * width * itemsize), 3))


@lru_cache
def programs_at_once(device: torch.device, warps: int, registers: int) -> int:
    """Programs of the kernel that the device holds."""
    if device.type != "cuda":
        return INTERPRETED
    unit = torch.cuda.get_device_properties(device)
    return unit.multi_processor_count * max(1, 65536 // (32 * warps * registers))


def outlier_stats(
    x_MN: Tensor, threshold: float, skip_columns: Tensor | None, quantize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's eight results, of arguments that have been checked."""
    if x_MN.stride(1) != 1:
        x_MN = x_MN.contiguous()
    if skip_columns is not None:
        skip_columns = skip_columns.contiguous()
    limit = c_float(threshold).value
    limit = limit if limit > 0 else nan

    M, N = x_MN.shape
    plan = Plan.of(M, N, x_MN.element_size(), quantize)
    blocks = triton.cdiv(M, plan.rows * plan.tiles)  # groups of a strip
    pools = triton.cdiv(blocks * plan.strips, POOLED)
    programs = min(blocks, max(1, programs_at_once(x_MN.device, plan.warps, plan.registers) // plan.strips))
    whole = plan.strips == 1
    new = x_MN.new_empty

    row_absmax, row_l2 = new(M, dtype=torch.float32), new(M, dtype=torch.float32)
    row_count, row_scale = new(M, dtype=torch.int32), new(M if quantize else 0, dtype=torch.float32)
    col_absmax, col_count = new(N, dtype=torch.float32), new(N, dtype=torch.int32)
    moments = new(5, dtype=torch.float64)
    q_MN = new((M, N) if quantize else 0, dtype=torch.int8)
    by_row = (row_absmax, row_l2, row_count, row_scale)
    by_strip = by_row if whole else tuple(new(plan.strips, *r.shape, dtype=r.dtype) for r in by_row)
    by_program = (new(programs, N), new(programs, N, dtype=torch.int32), new(programs, plan.strips, dtype=torch.int32))
    sums = new(6, blocks * plan.strips, dtype=torch.float32)
    pool = moments if pools == 1 else new(pools, 5, dtype=torch.float64)
    even = M % (plan.rows * plan.tiles) == 0 and N % plan.width == 0
    skip = skip_columns is not None

    with torch.cuda.device(x_MN.device) if x_MN.is_cuda else nullcontext():
        sweep[(programs * plan.strips,)](
            x_MN, x_MN.stride(0), M, N, plan.strips, limit, skip_columns, *by_strip, q_MN, *by_program, sums,
            R=plan.rows, W=plan.width, TILES=plan.tiles, THREADS=32 * plan.warps, EVEN=even, SKIP=skip,
            SCALE=quantize, QUANTIZE=quantize and whole, STAGES=plan.stages,
            num_warps=plan.warps, maxnreg=plan.registers,
        )  # fmt: skip
        finish[(triton.cdiv(N, 32) + pools,)](
            *by_program, sums, M, N, plan.strips, programs, col_absmax, col_count, pool,
            W=plan.width, SPAN=plan.rows * plan.tiles, POOL=POOLED, COLS=32, PARTS=128, num_warps=8,
        )  # fmt: skip
        if pools > 1:
            pool_moments[(1,)](pool, pools, moments, POOL=triton.next_power_of_2(pools))
        if not whole:
            merge_strips[(triton.cdiv(M, 256),)](*by_strip, M, plan.strips, *by_row, SCALE=quantize, ROWS=256)
            if quantize:
                quantize_strips[(triton.cdiv(M, plan.rows), plan.strips)](
                    x_MN, x_MN.stride(0), M, N, limit, skip_columns, row_scale, q_MN,
                    R=plan.rows, W=plan.width, EVEN=even, SKIP=skip, num_warps=plan.warps,
                )  # fmt: skip
    return row_absmax, row_l2, row_count, col_absmax, col_count, moments, q_MN, row_scale
