"""Integers of 2 to 8 bits: scales, zero points, rounding, packing, and an exact integer matrix product.

    symmetric     qmax = 2^(bits-1) - 1        scale = absmax / qmax        q = clamp(round(x / scale), -qmax, qmax)
    asymmetric    scale = (high - low) / (2^bits - 1)        zero = -2^(bits-1) - round(low / scale)
                  q = clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1)        x ~ (q - zero) scale

Rounding is half to even. -2^(bits-1) is never used by the symmetric code, so that q and -q mirror each other.
bitsandbytes computes round(x * (127 / absmax)) instead: the two differ only where x / scale lies within float32
rounding of a half. The asymmetric code is torchao's (`choose_qparams_affine`, ZeroPointDomain.INT).

Shapes: M rows, K input features, N output features; `...` any leading axes.
"""

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from quantbench.ops.measured import Choice, Ways, fastest, times

EXACT = 2**24  # float32 holds every integer up to it


def qmax(bits: int) -> int:
    """The largest integer of a symmetric code."""
    assert 2 <= bits <= 8, bits
    return 2 ** (bits - 1) - 1


def scale_of(absmax: Tensor, bits: int) -> Tensor:
    """What one step of the integers stands for, float32. An all-zero range gets scale 1, hence zeros; NaN stays NaN."""
    scale = absmax.float() / qmax(bits)
    return scale.masked_fill(scale == 0, 1.0)  # after the division: a subnormal absmax underflows to 0, too


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest integer of a code."""
    top = qmax(bits)
    return (-top if symmetric else -top - 1), top


def steps(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of ranges low <= 0 <= high; a symmetric code has the zero point 0."""
    if symmetric:
        scale = scale_of(torch.maximum(-low, high), bits)
        return scale, torch.zeros_like(scale)
    lowest, top = limits(bits, symmetric)
    scale = (high.float() - low.float()) / (top - lowest)
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (lowest - (low.float() / scale).round()).clamp(lowest, top)
    return scale, zero.nan_to_num(0.0)  # int8 has no NaN: where the range does, the scale carries it


def offsets(x: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """q - zero, what the scale is multiplied by, as float32; scale and zero broadcast against x. NaN becomes 0.

    Without `zero` the code is symmetric.
    """
    lowest, top = limits(bits, zero is None)
    q = x.float().div(scale).round_()
    if zero is None:
        q.clamp_(lowest, top)
    elif zero.numel() == 1 and zero.device.type == "cpu":
        q.clamp_(lowest - zero.item(), top - zero.item())
    else:
        q.add_(zero).clamp_(lowest, top).sub_(zero)  # torch clamps to tensors slowly
    return q.nan_to_num_(0.0)


def quantize(x: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """int8 integers of x, as `offsets`. NaN becomes what stands for 0 (int8 has none; the scale may carry it)."""
    q = offsets(x, scale, bits, zero)
    return (q if zero is None else q.add_(zero)).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """What the integers stand for, float32."""
    return (q.float() if zero is None else q.float() - zero) * scale


def pack_int4(q: Tensor) -> Tensor:
    """Two's-complement nibbles, two a byte: feature 2j in the low half, 2j+1 in the high. [..., K] -> [..., K/2]."""
    assert q.shape[-1] % 2 == 0, f"{q.shape[-1]} features do not fill whole bytes"
    nibbles = q.view(torch.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The int8 integers in -8..7 that `pack_int4` packed. [..., K/2] -> [..., K]."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (nibbles ^ 8).view(torch.int8) - 8  # sign extension


def product(x: Tensor, w: Tensor, x_most: int = 128, w_most: int = 128) -> Tensor:
    """x @ w.T of integers held as float32, rounded to float32 once: [..., K], [N, K] -> [..., N].

    No |x| exceeds `x_most`, no |w| `w_most`; 128 stands for -128..127, which some CPUs multiply as int8: where that is
    exact, and was measured to be faster, it is done. CPUs and GPUs alike multiply float32 matrices fast, and exactly as
    long as no sum exceeds 2^24: so K is cut into parts. TF32 and bf16 hold integers up to 2^8 exactly, and their
    products are summed as float32. The result is the same either way.
    """
    K, largest = x.shape[-1], x_most * w_most
    assert K * largest < 2**31, "an int32 could overflow"
    fits = max(x_most, w_most) <= 128 and x.device.type == "cpu"
    # Of a single row or column torch may take one for the other.
    if fits and K > 1 and x.numel() > K and int8_is_faster(x.numel() // K, w.numel()):
        return in_int8(x, w)
    return in_float32(x, w, largest)


def in_int8(x: Tensor, w: Tensor) -> Tensor:
    """`product` by torch's int8 product, which not every CPU has exactly; x of at least two rows and columns."""
    sums_MN = torch._int_mm(x.flatten(0, -2).to(torch.int8), w.to(torch.int8).T)
    return sums_MN.float().unflatten(0, x.shape[:-1])


def in_float32(x: Tensor, w: Tensor, largest: int) -> Tensor:
    """`product` by float32's, which is exact everywhere; no product of two integers exceeds `largest`."""
    if torch.is_autocast_enabled(x.device.type):  # it would round the sums to bf16
        with torch.autocast(x.device.type, enabled=False):
            return in_float32(x, w, largest)
    if x.shape[-1] * largest <= EXACT:
        return F.linear(x, w)
    parts = zip(x.split(EXACT // largest, -1), w.split(EXACT // largest, -1), strict=True)
    first, *rest = (F.linear(a, b) for a, b in parts)
    if len(rest) == 1:
        return first.add_(rest[0])  # both are exact, so that their sum is rounded once
    sums = first.to(torch.int32)
    for part in rest:
        sums += part.to(torch.int32)
    return sums.float()


FEW, MANY = (
    4,
    32,
)  # rows by which it is measured: where there are few, turning the weights into int8 is most of the work
SMALL, LARGE = (192, 64), (1536, 576)  # weights, N x K: of the track `text`, of SmolLM2
CASES = [(rows, weights) for weights in (SMALL, LARGE) for rows in (FEW, MANY)]


def int8_is_faster(rows: int, weights: int) -> bool:
    """Whether the int8 product of this CPU is exact, and faster than float32's, by the likest of the measured cases."""
    likest = SMALL if weights <= LARGE[0] * LARGE[1] // 8 else LARGE
    return fastest_product(FEW if rows < MANY // 4 else MANY, likest) == "int8"


def fastest_product(rows: int, weights: tuple[int, int]) -> str:
    """Which of the two wins one of CASES, `int8` or `float32`."""
    if not _multiplies_int8(torch._C._get_mkldnn_enabled()):
        return "float32"
    return fastest(question(rows, weights), partial(ways, rows, weights))


@cache
def question(rows: int, weights: tuple[int, int]) -> str:
    """The name of a case."""
    return f"exact integer product, {rows} x {weights[1]} x {weights[0]}"


def ways(rows: int, weights: tuple[int, int]) -> Ways:
    """The two ways to the same product."""
    generator = torch.Generator().manual_seed(0)
    x_MK, w_NK = (
        torch.randint(-127, 128, shape, generator=generator).float() for shape in ((rows, weights[1]), weights)
    )
    return {"float32": lambda: in_float32(x_MK, w_NK, 128 * 128), "int8": lambda: in_int8(x_MK, w_NK)}


def choices() -> list[Choice]:
    """What was chosen in each of CASES, measured where it was not before."""
    exact = _multiplies_int8(torch._C._get_mkldnn_enabled())
    return [
        Choice(
            question(*case) + ("" if exact else " (int8 is not exact here)"),
            fastest_product(*case),
            times(question(*case), partial(ways, *case)) if exact else {},
        )
        for case in CASES
    ]


@cache
def _multiplies_int8(onednn: bool) -> bool:
    """Whether the int8 product of this CPU is exact: without VNNI, sums of two products may saturate at 2^15."""
    for M, K, N in ((2, 64, 192), (32, 128, 32), (MANY, 577, 96)):
        ends = torch.tensor([-128, 127, 127, -128, -128, -128, 127, 127], dtype=torch.int8)
        x_MK, w_NK = (ends.repeat(rows * K // 8 + 1)[: rows * K].view(rows, K) for rows in (M, N))
        if not torch.equal(torch._int_mm(x_MK, w_NK.T), x_MK.int() @ w_NK.int().T):
            return False
    return True
