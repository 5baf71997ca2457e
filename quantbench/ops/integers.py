"""Integers of 2 to 8 bits: scales, zero points, rounding, packing, and an exact integer matrix product.

    symmetric     qmax = 2^(bits-1) - 1        scale = absmax / qmax        q = clamp(round(x / scale), -qmax, qmax)
    asymmetric    scale = (high - low) / (2^bits - 1)        zero = -2^(bits-1) - round(low / scale)
                  q = clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1)        x ~ (q - zero) scale

Rounding is half to even. -2^(bits-1) is never used by the symmetric code, so that q and -q mirror each other.
bitsandbytes computes round(x * (127 / absmax)) instead: the two differ only where x / scale lies within float32
rounding of a half. The asymmetric code is torchao's (`choose_qparams_affine`, ZeroPointDomain.INT).

Shapes: M rows, K input features, N output features; `...` any leading axes.
"""

from functools import cache

import torch
from torch import Tensor

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

    No |x| exceeds `x_most`, no |w| `w_most`; 128 stands for -128..127, which CPUs that multiply int8 exactly do.
    CPUs and GPUs alike multiply float32 matrices fast, and exactly as long as no sum exceeds 2^24: so K is cut into
    parts, and their sums are added as int32. TF32 and bf16 hold integers up to 2^8 exactly, and their products are
    summed as float32, so that the result is the same.
    """
    K, largest = x.shape[-1], x_most * w_most
    assert K * largest < 2**31, "an int32 could overflow"
    int8 = max(x_most, w_most) <= 128 and x.device.type == "cpu" and _multiplies_int8()
    if int8 and K > 1 and x.numel() > K:  # of a single row or column torch may take one for the other
        sums_MN = torch._int_mm(x.flatten(0, -2).to(torch.int8), w.to(torch.int8).T)
        return sums_MN.float().unflatten(0, x.shape[:-1])
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums to bf16
        if K * largest <= EXACT:
            return x @ w.T
        parts = zip(x.split(EXACT // largest, -1), w.split(EXACT // largest, -1), strict=True)
        first, *rest = ((a @ b.T).to(torch.int32) for a, b in parts)
        for part in rest:
            first += part
        return first.float()


@cache
def _multiplies_int8() -> bool:
    """Whether the int8 product of this CPU is exact: without VNNI, sums of two products saturate at 2^15."""
    ends = torch.tensor([[-128, 127], [127, -128], [-128, -128], [127, 127]], dtype=torch.int8).repeat(8, 64)
    return torch.equal(torch._int_mm(ends, ends.T), ends.int() @ ends.int().T)
