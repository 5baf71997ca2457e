"""The outlier statistics of a matrix of activations in one pass, and its int8 rows: `quantbench::outlier_stats`.

For x [M tokens, N features]: the largest magnitude, the norm and the number of outliers of every token; the largest
magnitude and the number of outliers of every feature; moments from which any kurtosis follows; and, on demand, the
rows as int8 with the outliers, or given columns, left out. Rows are quantized each by itself, so a token's integers
never depend on what else is in the batch, as they do in LLM.int8 (arXiv:2208.07339).

One schema, and behind it:
    CPU       C++ (outliers.cpp), compiled on first use; where that fails, `blocked`
    CUDA      Triton (outliers_triton.py)
    else      `blocked`, torch on a few rows at a time
    `oracle`  float64 torch, what the others are tested against
They agree bit for bit in absmax, counts, integers and scales. The norms are within two units in the last place of
float32 (four on CUDA). Moments of any data are within 1e-6 of the truth: M2 and M4 of themselves, the mean of a
standard deviation, M3 of n (M4/n)^(3/4). On CUDA, where sums are float32, within 1e-5.

Shapes: M tokens, N features. moments = [n, mean, M2, M3, M4], Mk the sum of (x - mean)^k: they merge
(`merge_moments`) over batches, layers and processes, and the kurtosis is n M4 / M2^2.
"""

import ctypes
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from quantbench.ops import native

SOURCE = Path(__file__).with_name("outliers.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 8  # in which builds of the C++ kernel are measured, some 20 ms in all
BLOCK, HIGHEST = 1 << 17, 1 << 14  # elements, about, and rows at most that `blocked` holds at once, in the cache


class OutlierStats(NamedTuple):
    """What the op returns. An outlier is a value with |x| >= threshold."""

    row_absmax: Tensor  # [M] float32, NaN where the row holds one
    row_l2: Tensor  # [M] float32
    row_count: Tensor  # [M] int32, outliers of the token
    col_absmax: Tensor  # [N] float32
    col_count: Tensor  # [N] int32, outliers of the feature
    moments: Tensor  # [5] float64; n, NaN, NaN, NaN, NaN where x is not finite throughout
    q: Tensor  # [M, N] int8, or [0]
    row_scale: Tensor  # [M] float32, the absmax of what was quantized, or [0]


def outlier_stats(
    x_MN: Tensor, threshold: float = 6.0, *, skip_columns: Tensor | None = None, quantize: bool = False
) -> OutlierStats:
    """The statistics of float32, bfloat16 or float16 x; with `quantize` its rows as int8, q * row_scale / 127.

    A threshold of 0 or below means no outliers. q leaves out (as 0, and from the scale) the features marked in the
    bool mask skip_columns [N] or, without a mask, the outliers. x of any strides; no gradient flows. ValueError or
    TypeError where an argument does not fit.
    """
    return OutlierStats(
        *torch.ops.quantbench.outlier_stats(x_MN, threshold, skip_columns=skip_columns, quantize=quantize)
    )


def implementation(device: torch.device | str) -> str:
    """Which code computes the op on a device: "c++", "torch" or "triton"."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "triton"
    return "c++" if kind == "cpu" and _kernels() is not None else "torch"


def choice() -> dict[str, Any]:
    """What computes the op on a CPU: {"path": the build of the C++ kernel, or "torch", "ms": {build: as measured}}.

    Builds differ in the width of their vectors and never in a result; ms is empty where there was nothing to choose.
    """
    chosen = native.choice(SOURCE, _milliseconds)
    return {"path": "torch", "ms": {}} if chosen is None else chosen._asdict()


# --- the op -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "quantbench::outlier_stats",
    mutates_args=(),
    schema="(Tensor x, float threshold=6.0, Tensor? skip_columns=None, bool quantize=False) -> "
    "(Tensor row_absmax, Tensor row_l2, Tensor row_count, Tensor col_absmax, Tensor col_count, Tensor moments, "
    "Tensor q, Tensor row_scale)",
)
def _op(x: Tensor, threshold: float = 6.0, skip_columns: Tensor | None = None, quantize: bool = False) -> Any:
    _check(x, threshold, skip_columns)
    return tuple(blocked(x, threshold, skip_columns, quantize))


@_op.register_kernel("cpu")
def _cpu(x: Tensor, threshold: float = 6.0, skip_columns: Tensor | None = None, quantize: bool = False) -> Any:
    _check(x, threshold, skip_columns)
    kernels = _kernels()
    if kernels is None:
        return tuple(blocked(x, threshold, skip_columns, quantize))
    if x.stride(1) != 1:
        x = x.contiguous()
    if skip_columns is not None:
        skip_columns = skip_columns.contiguous()
    found = _empty(x, quantize)
    _run(kernels[x.dtype], x, threshold, skip_columns, found, torch.get_num_threads())
    return tuple(found)


def _run(
    kernel: Any, x: Tensor, threshold: float, skip_columns: Tensor | None, found: OutlierStats, threads: int
) -> None:
    q, scale = (found.q, found.row_scale) if len(found.row_scale) else (None, None)
    short = kernel(
        x.data_ptr(), *x.shape, x.stride(0), threshold, _address(skip_columns), threads,
        *(tensor.data_ptr() for tensor in found[:6]), _address(q), _address(scale),
    )  # fmt: skip
    if short:
        raise MemoryError("outlier_stats: no memory for its work")


@_op.register_kernel("cuda")
def _cuda(x: Tensor, threshold: float = 6.0, skip_columns: Tensor | None = None, quantize: bool = False) -> Any:
    from quantbench.ops.outliers_triton import outlier_stats as launch

    _check(x, threshold, skip_columns)
    return tuple(launch(x, threshold, skip_columns=skip_columns, quantize=quantize))


@_op.register_fake
def _fake(x: Tensor, threshold: float = 6.0, skip_columns: Tensor | None = None, quantize: bool = False) -> Any:
    _check(x, threshold, skip_columns)
    return tuple(_empty(x, quantize))


def _no_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output)


_op.register_autograd(lambda ctx, *gradients: (None, None, None, None), setup_context=_no_gradient)


def _check(x: Tensor, threshold: float, skip_columns: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"outlier_stats: x is [tokens, features], this has {x.dim()} axes: flatten or unsqueeze it")
    if x.dtype not in DTYPES:
        raise TypeError(f"outlier_stats: x is {x.dtype}: convert it to float32, bfloat16 or float16")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"outlier_stats: x is empty, {list(x.shape)}: leave such batches out")
    if threshold != threshold:
        raise ValueError("outlier_stats: the threshold is NaN: give a number, 0 for no outliers")
    if skip_columns is None:
        return
    if skip_columns.dtype != torch.bool:
        raise TypeError(f"outlier_stats: skip_columns is {skip_columns.dtype}: give a bool mask of the features")
    if skip_columns.dim() != 1 or skip_columns.shape[0] != x.shape[1]:
        raise ValueError(
            f"outlier_stats: skip_columns is {list(skip_columns.shape)}: one bool for each of {x.shape[1]} features"
        )
    if skip_columns.device != x.device:
        raise ValueError(f"outlier_stats: skip_columns is on {skip_columns.device}: move it to {x.device}")


def _empty(x: Tensor, quantize: bool) -> OutlierStats:
    """Room for the results."""
    M, N = x.shape
    return OutlierStats(
        row_absmax=x.new_empty(M, dtype=torch.float32),
        row_l2=x.new_empty(M, dtype=torch.float32),
        row_count=x.new_empty(M, dtype=torch.int32),
        col_absmax=x.new_empty(N, dtype=torch.float32),
        col_count=x.new_empty(N, dtype=torch.int32),
        moments=x.new_empty(5, dtype=torch.float64),
        q=x.new_empty((M, N) if quantize else 0, dtype=torch.int8),
        row_scale=x.new_empty(M if quantize else 0, dtype=torch.float32),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernels() -> dict[torch.dtype, Any] | None:
    """The C++ function of each dtype, or None where there is none."""
    library = native.library(SOURCE, _milliseconds)
    return None if library is None else _functions(library)


def _milliseconds(libraries: dict[str, ctypes.CDLL]) -> dict[str, float]:
    """What statistics and int8 rows take in each build, on one thread: the best of rounds in which all take turns."""
    x_MN = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    samples = [x_MN, x_MN.bfloat16()]
    times: dict[str, list[float]] = {name: [] for name in libraries}
    found = _empty(x_MN, True)
    for _ in range(ROUNDS):
        for name, library in libraries.items():
            start = time.perf_counter()
            for x in samples:
                _run(_functions(library)[x.dtype], x, 6.0, None, found, threads=1)
            times[name].append(time.perf_counter() - start)
    return {name: round(min(taken[1:]) * 1e3, 3) for name, taken in times.items()}


@functools.cache
def _functions(library: ctypes.CDLL) -> dict[torch.dtype, Any]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    functions = {dtype: library[f"outlier_stats_{str(dtype).removeprefix('torch.')}"] for dtype in DTYPES}
    for function in functions.values():
        function.argtypes = [pointer, integer, integer, integer, ctypes.c_float, pointer, integer, *[pointer] * 8]
    return functions


# --- in torch ---------------------------------------------------------------------------------------------------------


def oracle(x_MN: Tensor, threshold: float, skip_columns: Tensor | None, quantize: bool) -> OutlierStats:
    """The definition, in float64: every float32 operation of the integers is one of float64, rounded."""
    exact_MN, size_MN = x_MN.double(), x_MN.double().abs()
    outlier_MN = _outliers(size_MN, threshold)
    q_MN, scale_M = x_MN.new_empty(0, dtype=torch.int8), x_MN.new_empty(0, dtype=torch.float32)
    if quantize:
        kept_MN = ~outlier_MN if skip_columns is None else ~skip_columns.expand_as(outlier_MN)
        scale_M = size_MN.where(kept_MN, 0).amax(1).float()
        factor_M1 = (127 / scale_M.double()).float().unsqueeze(1)
        product_MN = (exact_MN.where(kept_MN, 0) * factor_M1.double()).float()
        q_MN = product_MN.round().clamp(-127, 127).nan_to_num(0).to(torch.int8)
    return OutlierStats(
        row_absmax=size_MN.amax(1).float(),
        row_l2=exact_MN.square().sum(1).sqrt().float(),
        row_count=outlier_MN.sum(1, dtype=torch.int32),
        col_absmax=size_MN.amax(0).float(),
        col_count=outlier_MN.sum(0, dtype=torch.int32),
        moments=_moments(exact_MN),
        q=q_MN,
        row_scale=scale_M,
    )


def blocked(x_MN: Tensor, threshold: float, skip_columns: Tensor | None, quantize: bool) -> OutlierStats:
    """The same in blocks of rows that stay in the cache, on any device."""
    found = _empty(x_MN, quantize)
    found.col_absmax.zero_()
    found.col_count.zero_()
    moments_B5, height = [], max(1, min(HIGHEST, BLOCK // x_MN.shape[1]))
    for start in range(0, len(x_MN), height):
        rows = slice(start, start + height)
        x = x_MN[rows].float()
        size, exact = x.abs(), x.double()
        outlier = _outliers(size, threshold)
        found.row_absmax[rows] = size.amax(1)
        found.row_l2[rows] = exact.square().sum(1).sqrt()
        found.row_count[rows] = outlier.sum(1)
        torch.maximum(found.col_absmax, size.amax(0), out=found.col_absmax)
        found.col_count.add_(outlier.sum(0))
        moments_B5.append(_moments(exact))
        if quantize:
            left_out = outlier if skip_columns is None else skip_columns.expand_as(outlier)
            scale = size.masked_fill_(left_out, 0).amax(1)
            factor = torch.full_like(scale, 127).div_(scale)  # `127 / scale` would be its reciprocal, times 127
            product = x.masked_fill(left_out, 0).mul_(factor.unsqueeze(1))
            found.q[rows] = product.round_().clamp_(-127, 127).nan_to_num_(0).to(torch.int8)
            found.row_scale[rows] = scale
    found.moments.copy_(_merged(torch.stack(moments_B5)))
    return found


def _outliers(size_MN: Tensor, threshold: float) -> Tensor:
    limit = ctypes.c_float(threshold).value  # as float32, in every implementation
    return size_MN >= limit if limit > 0 else torch.zeros_like(size_MN, dtype=torch.bool)


def _moments(exact_MN: Tensor) -> Tensor:
    n = exact_MN.new_tensor([exact_MN.numel()])

    def total(powers_MN: Tensor) -> Tensor:
        return powers_MN.sum(1).sum().unsqueeze(0)  # by row, as torch splits one long sum among threads

    mean = total(exact_MN) / n
    distance_MN = exact_MN - mean
    square_MN = distance_MN * distance_MN
    about = [total(square_MN), total(square_MN * distance_MN), total(square_MN * square_MN)]
    rest = torch.cat([mean, *about])
    return torch.cat([n, torch.where(rest.isfinite().all(), rest, torch.nan)])


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_moments(a_5: Tensor, b_5: Tensor) -> Tensor:
    """The moments of two samples together; leading axes broadcast (Chan et al. 1979; Pebay, SAND2008-6212)."""
    (na, mean_a, a2, a3, a4), (nb, mean_b, b2, b3, b4) = a_5.unbind(-1), b_5.unbind(-1)
    n, delta = na + nb, mean_b - mean_a
    ratio, product = delta / n.clamp(min=1), na * nb
    return torch.stack(
        torch.broadcast_tensors(
            n,
            mean_a + nb * ratio,
            a2 + b2 + product * delta * ratio,
            a3 + b3 + product * (na - nb) * delta * ratio**2 + 3 * ratio * (na * b2 - nb * a2),
            a4
            + b4
            + product * (na**2 - product + nb**2) * delta * ratio**3
            + 6 * ratio**2 * (na**2 * b2 + nb**2 * a2)
            + 4 * ratio * (na * b3 - nb * a3),
        ),
        dim=-1,
    )


def _merged(parts_B5: Tensor) -> Tensor:
    """All of them together, neighbours first."""
    while len(parts_B5) > 1:
        pairs = len(parts_B5) // 2 * 2
        both = merge_moments(parts_B5[0:pairs:2], parts_B5[1:pairs:2])
        parts_B5 = torch.cat([both, parts_B5[pairs:]])
    return parts_B5[0]


@dataclass(frozen=True)
class Totals:
    """What is kept of the statistics of any number of batches with the same features: mergeable, and small."""

    tokens: int
    row_absmax: Tensor  # [] float32, of all tokens
    outlier_tokens: Tensor  # [] int64, tokens with an outlier
    col_absmax: Tensor  # [N] float32
    col_count: Tensor  # [N] int64, tokens that are outliers in this feature
    moments: Tensor  # [5] float64

    @classmethod
    def of(cls, stats: OutlierStats) -> "Totals":
        """Of one batch."""
        outlier_tokens = (stats.row_count > 0).sum()
        largest = stats.row_absmax.amax()
        return cls(
            len(stats.row_absmax), largest, outlier_tokens, stats.col_absmax, stats.col_count.long(), stats.moments
        )

    def merge(self, other: "Totals") -> "Totals":
        """Of both; ValueError where their features are not the same in number."""
        if len(self.col_absmax) != len(other.col_absmax):
            raise ValueError(f"totals of {len(self.col_absmax)} and of {len(other.col_absmax)} features do not merge")
        return Totals(
            tokens=self.tokens + other.tokens,
            row_absmax=torch.maximum(self.row_absmax, other.row_absmax),
            outlier_tokens=self.outlier_tokens + other.outlier_tokens,
            col_absmax=torch.maximum(self.col_absmax, other.col_absmax),
            col_count=self.col_count + other.col_count,
            moments=merge_moments(self.moments, other.moments),
        )

    def over_processes(self) -> "Totals":
        """Of all ranks of torch.distributed, merged in their order and the same on each; itself where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        N = torch.tensor([len(self.col_absmax)], device=self.col_absmax.device)
        widths = [torch.empty_like(N) for _ in range(dist.get_world_size())]
        dist.all_gather(widths, N)  # first: ranks that gathered different lengths would hang or mix them up
        if any(width != N for width in widths):
            raise ValueError(f"the ranks hold totals of {[int(width) for width in widths]} features: they do not merge")
        mine = self._packed()
        packed = [torch.empty_like(mine) for _ in widths]
        dist.all_gather(packed, mine)
        return functools.reduce(Totals.merge, map(Totals._unpacked, packed))

    def _packed(self) -> Tensor:
        """As one vector: float64 holds float32 and any count to 2^53."""
        heads = torch.stack(
            [
                self.row_absmax.new_tensor(self.tokens, dtype=torch.float64),
                self.row_absmax.double(),
                self.outlier_tokens.double(),
            ]
        )
        return torch.cat([heads, self.moments, self.col_absmax.double(), self.col_count.double()])

    @classmethod
    def _unpacked(cls, packed: Tensor) -> "Totals":
        heads, moments, columns = packed[:3], packed[3:8], packed[8:].view(2, -1)
        return cls(int(heads[0]), heads[1].float(), heads[2].long(), columns[0].float(), columns[1].long(), moments)
