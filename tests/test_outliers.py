"""The outlier statistics against hand-computed cases and float64; bitsandbytes' faults; the build of the C++ kernel."""

import ctypes
import functools
import hashlib
import math
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantbench.ops import native, outliers
from quantbench.ops.outliers import OutlierStats, Totals, blocked, merge_moments, oracle, outlier_stats

EXACT = ("row_absmax", "row_count", "col_absmax", "col_count", "q", "row_scale")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def the_op(x: Tensor, threshold: float, skip_columns: Tensor | None, quantize: bool) -> OutlierStats:
    return outlier_stats(x, threshold, skip_columns=skip_columns, quantize=quantize)


IMPLEMENTATIONS = [the_op, blocked]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def check_moments(got: Tensor, expected: Tensor, rel: float) -> None:
    """M2 and M4 within `rel`; mean and M3, which may cancel, as far as that moves the mean or the skewness."""
    assert got.dtype == expected.dtype == torch.float64
    n, mean, m2, m3, m4 = expected.tolist()
    assert got[0] == n
    if math.isnan(mean):
        assert got[1:].isnan().all()
        return
    spread = math.sqrt(m2 / n)
    floor = 1e-14 * abs(mean)  # float64's own rounding of the distance from the mean
    assert abs(got[1] - mean) <= rel * spread + floor
    assert abs(got[2] - m2) <= rel * m2 + n * floor**2
    assert abs(got[3] - m3) <= rel * (m4 / n) ** 0.75 * n + n * floor**3
    assert abs(got[4] - m4) <= rel * m4 + n * floor**4


def check(got: OutlierStats, expected: OutlierStats, rel: float = 1e-6) -> None:
    for name in EXACT:
        assert same(getattr(got, name), getattr(expected, name)), name
    norms, exact = got.row_l2, expected.row_l2
    near = (norms == exact) | (norms == exact.nextafter(torch.tensor(0.0))) | (norms == exact.nextafter(exact * 2 + 1))
    assert (near | (norms.isnan() & exact.isnan())).all()
    check_moments(got.moments, expected.moments, rel)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [*IMPLEMENTATIONS, oracle])
def test_a_matrix_by_hand(compute: Callable[..., OutlierStats]) -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 8.0, -6.0, 1.0]])
    found = compute(x, 6.0, None, True)
    assert found.row_absmax.tolist() == [4, 8]
    assert found.row_l2.tolist() == [5, pytest.approx(math.sqrt(101), rel=1e-7)]
    assert found.row_count.tolist() == [0, 2]
    assert found.col_absmax.tolist() == [3, 8, 6, 1]
    assert found.col_count.tolist() == [0, 1, 1, 0]
    # The mean is 2/8; sums of powers are 2, 126, 3*27 - 37 + ... taken about 1/4 by hand:
    distances = [2.75, -4.25, -0.25, -0.25, -0.25, 7.75, -6.25, 0.75]
    assert found.moments.tolist() == pytest.approx([8, 0.25, *(sum(d**k for d in distances) for k in (2, 3, 4))])
    assert found.row_scale.tolist() == [4, 1]
    assert found.q.tolist() == [[95, -127, 0, 0], [0, 0, 0, 127]]  # 3 * 127/4 = 95.25

    skip = torch.tensor([False, True, False, False])
    found = compute(x, 6.0, skip, True)
    assert found.row_scale.tolist() == [3, 6]
    assert found.q.tolist() == [[127, 0, 0, 0], [0, 0, -127, 21]]  # the outlier -6 is kept: its column is not skipped


@pytest.mark.parametrize("compute", [*IMPLEMENTATIONS, oracle])
def test_the_order_of_operations_is_that_of_the_specification(compute: Callable[..., OutlierStats]) -> None:
    """x * (127 / s), each step rounded to float32, half to even; x * 127 / s and x * (1 / s * 127) differ from it."""
    scale = 2.0**23
    x = torch.tensor([[scale, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]) * torch.tensor([1.0] + [scale / 127] * 6)
    factor = torch.tensor(127.0).div(torch.tensor(scale))
    assert compute(x, 0.0, None, True).q.tolist() == (x * factor).round().to(torch.int8).tolist()
    many = gaussian(1, 40_000)
    q = compute(many, 0.0, None, True).q
    s = many.abs().max()
    assert torch.equal(q, (many * torch.div(torch.tensor(127.0), s)).round().to(torch.int8))


@pytest.mark.parametrize("compute", [*IMPLEMENTATIONS, oracle])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_never_silent(compute: Callable[..., OutlierStats], dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0], [math.nan, 7.0], [-math.inf, 1.0], [math.nan, math.inf], [0.0, -0.0]], dtype=dtype)
    found = compute(x, 6.0, None, True)
    assert str(found.row_absmax.tolist()) == "[2.0, nan, inf, nan, 0.0]"
    assert str(found.col_absmax.tolist()) == "[nan, inf]"
    assert found.row_l2[[1, 3]].isnan().all()
    assert found.row_l2[2] == math.inf
    assert found.row_count.tolist() == [0, 1, 1, 1, 0]  # NaN is never counted, inf is
    assert found.moments[0] == 10
    assert found.moments[1:].isnan().all()
    assert str(found.row_scale.tolist()) == "[2.0, nan, 1.0, nan, 0.0]"
    assert found.q.tolist() == [[64, 127], [0, 0], [0, 127], [0, 0], [0, 0]]

    all_kept = compute(x, 0.0, None, True)
    assert str(all_kept.row_scale.tolist()) == "[2.0, nan, inf, nan, 0.0]"
    assert not all_kept.q[2].any()  # and 0 * inf is NaN: whoever dequantizes sees it
    assert all_kept.row_count.sum() == 0


@pytest.mark.parametrize("compute", IMPLEMENTATIONS)
def test_the_threshold_is_one_number_for_all_dtypes(compute: Callable[..., OutlierStats]) -> None:
    """It is rounded to float32, and neither to x's dtype nor in some of the places only."""
    below, above = torch.tensor(6.2).half(), torch.tensor(6.2039)
    assert float(below) < 6.2
    x = torch.stack([below, above]).half().unsqueeze(0)
    assert compute(x, 6.2, None, False).row_count.tolist() == [1]
    nearest = torch.tensor([[6.2]])  # its float32 is below 6.2, and the threshold's is the same
    assert float(nearest) < 6.2
    assert compute(nearest, 6.2, None, False).row_count.tolist() == [1]
    for threshold in (0.0, -1.0, -math.inf):
        assert compute(nearest, threshold, None, False).row_count.tolist() == [0]
    assert compute(torch.tensor([[math.inf, 1e38]]), math.inf, None, False).row_count.tolist() == [1]


@pytest.mark.parametrize("compute", IMPLEMENTATIONS)
def test_scales_at_the_edge_of_float32(compute: Callable[..., OutlierStats]) -> None:
    x = torch.tensor([[1e-45, -1e-45, 0.0], [1e-38, 5e-39, 0.0], [3e38, -1e38, 1e30], [1e30, 1e30, 1e30]])
    found = compute(x, 0.0, None, True)
    assert found.q.tolist()[0] == [127, -127, 0]  # 127 / s is infinite: clamped, and 0 * inf is 0
    check(found, oracle(x, 0.0, None, True))
    assert found.row_l2[3] == torch.tensor(math.sqrt(3) * 1e30)  # its squares exceed float32


def test_kurtosis_at_an_offset_of_a_hundred_deviations() -> None:
    """Raw float32 sums lose it altogether."""
    for dtype, seed in [(torch.float32, 0), (torch.float16, 1)]:
        x = (gaussian(512, 300, seed=seed) + 100).to(dtype)
        exact = x.double() - x.double().mean()
        truth = exact.numel() * exact.pow(4).sum() / exact.pow(2).sum() ** 2
        for compute in IMPLEMENTATIONS:
            n, _, m2, _, m4 = compute(x, 6.0, None, False).moments
            assert n * m4 / m2**2 == pytest.approx(float(truth), rel=1e-6)


def test_one_planted_token_and_one_planted_column_are_told_apart() -> None:
    for compute in IMPLEMENTATIONS:
        token, column = gaussian(500, 64).clamp(-5, 5), gaussian(500, 64).clamp(-5, 5)
        token[123], column[:, 45] = 50.0, -50.0
        found = compute(token, 6.0, None, False)
        assert found.row_count.nonzero().tolist() == [[123]]
        assert found.row_count[123] == 64
        assert (found.col_count == 1).all()
        found = compute(column, 6.0, None, False)
        assert (found.row_count == 1).all()
        assert found.col_count.nonzero().tolist() == [[45]]
        assert found.col_count[45] == 500


# --- against the oracle -----------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, float, Tensor | None, bool]:
    """Matrices of every dtype, length of tail, memory layout and kind of trouble."""
    M, N = draw(st.sampled_from([(5, 140), (300, 140), (5, 4200), (2, 9000)]))  # pieces of rows, or rows to a piece
    M, N = draw(st.integers(1, M)), draw(st.integers(max(1, N - 200), N))
    x = gaussian(M, N, seed=draw(st.integers(0, 1 << 30)))
    x *= draw(st.sampled_from([1.0, 1.0, 30.0, 1e-3]))
    trouble = draw(st.sampled_from(["", "", "offset", "nan", "inf", "zeros", "token", "column", "constant", "rows"]))
    i, j = draw(st.integers(0, M - 1)), draw(st.integers(0, N - 1))
    if trouble == "offset":
        x += 100 * x.abs().max()
    elif trouble == "nan":
        x[i, j] = math.nan
    elif trouble == "inf":
        x[i, j] = -math.inf
    elif trouble == "zeros":
        x[i:] = 0
    elif trouble == "token":
        x[i] *= 1000
    elif trouble == "column":
        x[:, j] += 300
    elif trouble == "constant":
        x[:] = x[i, j].clone()
    elif trouble == "rows":
        x += 1000 * gaussian(M, 1)
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "contiguous", "part of rows", "transposed", "every other", "offset"]))
    if layout == "part of rows":
        x = torch.cat([x, x[:, :3]], 1)[:, :N]
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "every other":
        x = x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    elif layout == "offset":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(M, N)
    threshold = draw(st.sampled_from([6.0, 6.0, 0.0, -1.0, 0.5, 2.7, 1e9]))
    skip = None
    if draw(st.booleans()):
        skip = torch.rand(N, generator=torch.Generator().manual_seed(i)) < draw(st.sampled_from([0.05, 0.9, 1.1]))
    return x, threshold, skip, draw(st.booleans())


@settings(deadline=None, max_examples=150)
@given(cases())
def test_it_is_the_oracle(case: tuple[Tensor, float, Tensor | None, bool]) -> None:
    x, version, bits = case[0], case[0]._version, case[0].clone()
    expected = oracle(*case)
    for compute in IMPLEMENTATIONS:
        check(compute(*case), expected)
    assert x._version == version
    assert same(x, bits)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(-37, 9),
    st.integers(1, 200),
    st.integers(0, 1 << 30),
)
@example(torch.float32, 9.0, 64, 0)
def test_magnitudes_from_the_least_to_a_thousand_million(dtype: torch.dtype, power: float, N: int, seed: int) -> None:
    x = (gaussian(7, N, seed=seed) * 10**power).clamp(-1e9, 1e9).to(dtype)
    expected = oracle(x, 10**power, None, True)
    for compute in IMPLEMENTATIONS:
        check(compute(x, 10**power, None, True), expected)


@st.composite
def lopsided(draw: st.DrawFn) -> Tensor:
    """Data whose roundings all go one way, with a mean far from 0, or with fourth powers beyond float32."""
    M, N = draw(st.sampled_from([(1, 1), (1, 9), (9, 1), (129, 2), (7, 577), (3, 8200), (70, 130)]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    a, b = rng.standard_normal(2) * 10.0 ** rng.uniform(-3, 3, 2)
    kind = draw(st.sampled_from(["two", "signs", "columns", "rows", "constant", "one", "offset", "skewed", "range"]))
    if kind == "two":
        x = np.where(rng.random((M, N)) < draw(st.sampled_from([0.5, 0.1, 0.01])), a, b)
    elif kind == "signs":
        x = np.where(rng.random((M, N)) < 0.5, a, -a)
    elif kind == "columns":
        x = np.where(np.arange(N) // draw(st.sampled_from([1, 8, 16, 64])) % 2, a, b) * np.ones((M, 1))
    elif kind == "rows":
        x = np.where(np.arange(M) % 2, a, -a)[:, None] + rng.standard_normal((M, N)) * draw(
            st.sampled_from([0, 1e-3, 1])
        )
    elif kind in ("constant", "one"):
        x = np.full((M, N), a)
        x[-1, -1] *= 1 if kind == "constant" else 1.01
    elif kind == "offset":
        x = rng.standard_normal((M, N)) + 10.0 ** rng.uniform(-2, 5)
    elif kind == "skewed":
        x = np.maximum(rng.standard_normal((M, N)), draw(st.sampled_from([0, -0.2, -1])))
    else:
        x = rng.standard_normal((M, N)) * 10.0 ** draw(st.sampled_from([-42, -36, -9, 9, 37]))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.from_numpy(x.clip(-6e4, 6e4) if dtype == torch.float16 else x).to(dtype)


@settings(deadline=None, max_examples=150)
@given(lopsided())
@example(torch.tensor([[-0.0003, -0.1621]]).expand(129, 2).contiguous())
@example(torch.tensor([[-0.0003, -0.1621]], dtype=torch.bfloat16).expand(129, 2).contiguous())
def test_moments_are_within_a_millionth_of_the_truth(x: Tensor) -> None:
    exact = x.double().numpy().astype(np.longdouble)
    distance = exact - exact.mean()
    truth = torch.tensor([exact.size, exact.mean(), *((distance**k).sum() for k in (2, 3, 4))], dtype=torch.float64)
    for compute in (the_op, blocked, oracle):
        check_moments(compute(x, 6.0, None, False).moments, truth, 1e-6)


def test_every_float16_and_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).unsqueeze(1)  # a row each
        found = outlier_stats(x, 0.0, quantize=True)
        assert same(found.row_absmax, x.squeeze(1).float().abs())
        finite = x[x.isfinite().all(1)].view(-1, 8)
        expected = oracle(finite, 6.2, None, True)
        found = outlier_stats(finite, 6.2, quantize=True)
        for name in EXACT:
            assert same(getattr(found, name), getattr(expected, name)), name
        for value in (6.2, 1e-7, 70000.0, 3.4e38):  # a threshold between two values, among the least, above the most
            limit = torch.tensor(value)
            assert int(outlier_stats(x, value).row_count.sum()) == int((x.float().abs() >= limit).sum())


@pytest.mark.parametrize("compute", IMPLEMENTATIONS)
def test_threads_change_no_bit(compute: Callable[..., OutlierStats]) -> None:
    threads, found = torch.get_num_threads(), []
    x = gaussian(3000, 193)
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(compute(x, 2.0, None, True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


needs_cpp = pytest.mark.skipif(
    outliers.implementation("cpu") != "c++", reason="no C++ compiler: in torch it takes long"
)


@needs_cpp
def test_the_width_of_vectors_changes_no_bit() -> None:
    """Of any build: what was measured faster may be another tomorrow, and on another machine."""
    compiler, found = native.find_compiler(), []
    assert compiler is not None
    with native._locked(native.cache_folder("native")) as folder:
        libraries = native._load(
            outliers.SOURCE,
            commands := {
                name: tried
                for capability in sorted({"", "avx2"} if native._has("avx2") else {""})
                for name, tried in native._commands(compiler, capability, True).items()
            },
            {name: folder / f"{native._digest(outliers.SOURCE, tried, b'')}.so" for name, tried in commands.items()},
        )
    data = [gaussian(70, 700) + offset for offset in (0.0, 0.3, 2.0, 900.0)] + [gaussian(3, 9000) * 1e30]
    for library in libraries.values():
        found.append([])
        for dtype in DTYPES:
            for x in data:
                x = x.clamp(-6e4, 6e4).to(dtype)
                room = outliers._empty(x, True)
                outliers._run(outliers._functions(library)[dtype], x, 2.0, None, room, threads=1)
                found[-1] += [tensor.numpy().tobytes() for tensor in room]
    assert all(other == found[0] for other in found)


@needs_cpp
def test_more_than_2_to_the_31_elements() -> None:
    row = gaussian(1, 1 << 14).bfloat16()
    row[0, -1] = 9.0
    M = (1 << 17) + 3
    x = row.expand(M, -1)
    assert x.numel() > 2**31
    found, one = outlier_stats(x), oracle(row, 6.0, None, False)
    assert (found.row_count == 1).all()
    assert (found.row_absmax == 9).all()
    assert found.col_count[-1] == M
    assert found.col_count.sum() == M
    check_moments(found.moments, one.moments * torch.tensor([M, 1, M, M, M]), 1e-6)


@pytest.mark.parametrize("compute", IMPLEMENTATIONS)
def test_rows_more_than_2_to_the_31_elements_apart(compute: Callable[..., OutlierStats]) -> None:
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # never touched but for two pages
    x = base.as_strided((2, 64), (2**31, 1))
    x[0], x[1] = gaussian(64), 7.0
    check(compute(x, 6.0, None, True), oracle(x.clone(), 6.0, None, True))


# --- as an operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [False, True])
def test_it_keeps_the_contract_of_an_operator(quantize: bool) -> None:
    mask = torch.zeros(33, dtype=torch.bool)
    mask[4] = True
    for x, skip in [(gaussian(9, 33), None), (gaussian(9, 33).requires_grad_(), mask), (gaussian(33, 9).t(), None)]:
        torch.library.opcheck(
            torch.ops.quantbench.outlier_stats, (x, 1.0), {"skip_columns": skip, "quantize": quantize}
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_it_compiles_into_one_graph() -> None:
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def scaled(x: Tensor) -> tuple[OutlierStats, Tensor]:
        found = outlier_stats(x * 2, quantize=True)
        return found, found.row_absmax + 1

    for M in (5, 8):
        x = gaussian(M, 40, seed=M).requires_grad_()
        found, more = scaled(x)
        assert isinstance(found, OutlierStats)
        check(found, oracle(x.detach() * 2, 6.0, None, True))
        assert torch.equal(more, found.row_absmax + 1)
    torch._dynamo.reset()


def test_no_gradient_flows() -> None:
    leaf = gaussian(4, 8).requires_grad_()
    for x in (leaf, leaf * 2):
        for found in (outlier_stats(x, quantize=True), torch.ops.quantbench.outlier_stats(x)):
            assert not any(tensor.requires_grad for tensor in found)
    (leaf * outlier_stats(leaf).row_absmax.unsqueeze(1)).sum().backward()
    assert torch.equal(leaf.grad, leaf.detach().abs().amax(1, keepdim=True).expand(4, 8))


@pytest.mark.parametrize("fake", [False, True])
def test_bad_input_is_told_in_one_line(fake: bool) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def refused(
        kind: type[Exception], words: str, x: Tensor, threshold: float = 6.0, mask: Tensor | None = None
    ) -> None:
        if fake:
            x, mask = mode.from_tensor(x), None if mask is None else mode.from_tensor(mask)
        with pytest.raises(kind, match=words) as caught:
            outlier_stats(x, threshold, skip_columns=mask)
        assert "\n" not in str(caught.value)

    x = torch.ones(3, 4)
    refused(ValueError, "3 axes: flatten", torch.ones(2, 3, 4))
    refused(ValueError, "1 axes", torch.ones(4))
    refused(ValueError, "empty", torch.ones(0, 4))
    refused(ValueError, "empty", torch.ones(3, 0))
    for dtype in (torch.int8, torch.int64, torch.float64, torch.bool, torch.complex64):
        refused(TypeError, "convert it to float32", torch.ones(3, 4, dtype=dtype))
    refused(ValueError, "NaN", x, math.nan)
    refused(TypeError, "bool mask", x, 6.0, torch.ones(4))
    refused(ValueError, "one bool for each of 4", x, 6.0, torch.ones(3, dtype=torch.bool))
    refused(ValueError, "one bool for each of 4", x, 6.0, torch.ones(1, 4, dtype=torch.bool))
    refused(ValueError, "move it to", x, 6.0, torch.ones(4, dtype=torch.bool, device="meta"))


def test_which_code_runs_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outliers.implementation("cuda") == outliers.implementation(torch.device("cuda", 1)) == "triton"
    assert outliers.implementation("cpu") in ("c++", "torch")
    chosen = outliers.choice()
    assert (chosen["path"] == "torch") == (outliers.implementation("cpu") == "torch")
    assert not chosen["ms"] or chosen["path"] == min(chosen["ms"], key=chosen["ms"].get)
    monkeypatch.setenv("QUANTBENCH_NATIVE", "0")
    assert outliers.implementation("cpu") == "torch"
    assert outliers.choice() == {"path": "torch", "ms": {}}
    x = gaussian(30, 20)
    check(outlier_stats(x, 1.0, quantize=True), oracle(x, 1.0, None, True), rel=1e-12)


# --- the faults of bitsandbytes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    from bitsandbytes.functional import int8_vectorwise_quant

    return int8_vectorwise_quant


def ours(x: Tensor, threshold: float) -> OutlierStats:
    return outlier_stats(x, threshold, quantize=True)


def test_one_token_changes_no_other(theirs: Callable) -> None:
    quiet = gaussian(6, 32).half()
    loud = torch.cat([quiet, torch.full((1, 32), 100.0).half()])
    assert theirs(quiet.clone(), threshold=6.0)[0].any()
    assert not theirs(loud.clone(), threshold=6.0)[0][:6].any()  # every column is an outlier's now: all rows are zeros
    assert torch.equal(ours(loud, 6.0).q[:6], ours(quiet, 6.0).q)
    assert torch.equal(ours(loud, 6.0).row_scale[:6], ours(quiet, 6.0).row_scale)


def test_the_input_is_not_written_to(theirs: Callable) -> None:
    x = gaussian(4, 8).half()
    x[0, 0] = 9.0
    version = x._version
    theirs(x, threshold=6.0)
    assert x._version == version + 2
    ours(x, 6.0)
    assert x._version == version + 2
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        theirs(leaf, threshold=6.0)
    assert torch.equal(ours(leaf, 6.0).q, ours(x, 6.0).q)


def test_a_row_with_nan_or_inf_is_counted(theirs: Callable) -> None:
    """Its integers are zeros there as here: int8 has no NaN. The scale, the absmax and the moments say so."""
    x = gaussian(3, 8).half()
    x[1, 2], x[2, 3] = math.nan, math.inf
    assert not theirs(x.clone(), threshold=0.0)[0][1:].any()
    found = ours(x, 0.0)
    assert not found.q[1:].any()
    assert str(found.row_scale[1:].tolist()) == str(found.row_absmax[1:].tolist()) == "[nan, inf]"
    assert (found.q * found.row_scale.unsqueeze(1))[1:].isnan().all()
    assert found.moments[1:].isnan().all()
    assert ours(x, 6.0).col_count[3] == 1


def test_bf16_beyond_the_range_of_fp16(theirs: Callable) -> None:
    x = torch.tensor([[70_000.0, -35_000.0, 1000.0]], dtype=torch.bfloat16)
    assert not theirs(x.half(), threshold=0.0)[0].any()  # its layers hand it fp16
    assert ours(x, 0.0).q.tolist() == [[127, -64, 2]]  # 63.5: half to even


def test_the_threshold_is_the_same_for_counting_and_for_leaving_out(theirs: Callable) -> None:
    """6.2 as fp16 is 6.1992: left out of the scale, yet quantized, such a value wraps to 157 - 256 = -99."""
    x = torch.tensor([[6.2, 5.0, 1.0, 0.1]]).half()
    assert float(x[0, 0]) < 6.2
    assert theirs(x.clone(), threshold=6.2)[2].tolist() == [0]  # it is called an outlier
    found = ours(x, 6.2)
    assert found.row_count.tolist() == [0]
    assert found.row_scale.tolist() == [x[0, 0]]
    assert found.q.tolist() == [[127, 102, 20, 2]]


# --- merging ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 1 << 30))
def test_totals_of_batches_are_those_of_all_tokens(heights: list[int], N: int, seed: int) -> None:
    x = gaussian(sum(heights), N, seed=seed) * 3 + 5
    parts = [Totals.of(outlier_stats(batch)) for batch in x.split(heights)]
    merged = functools.reduce(Totals.merge, parts)
    from_the_right = functools.reduce(lambda done, part: part.merge(done), reversed(parts))
    whole = Totals.of(outlier_stats(x))
    assert merged.tokens == len(x)
    assert merged.outlier_tokens == int((x.abs() >= 6).any(1).sum())
    for totals in (merged, from_the_right):
        assert totals.tokens == whole.tokens
        for name in ("row_absmax", "outlier_tokens", "col_absmax", "col_count"):
            assert same(getattr(totals, name), getattr(whole, name)), name
        check_moments(totals.moments, whole.moments, 1e-5)


def test_moments_merge_by_hand_and_over_leading_axes() -> None:
    def moments(*values: float) -> Tensor:
        mean = sum(values) / len(values)
        powers = [sum((value - mean) ** k for value in values) for k in (2, 3, 4)]
        return torch.tensor([len(values), mean, *powers], dtype=torch.float64)

    pairs = [([1.0, 2.0, 6.0], [4.0]), ([-1.0], [1.0]), ([1e9, 1e9 + 1], [1e9 + 5])]
    a, b = (torch.stack([moments(*pair[side]) for pair in pairs]) for side in (0, 1))
    expected = torch.stack([moments(*left, *right) for left, right in pairs])
    torch.testing.assert_close(merge_moments(a, b), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(merge_moments(a, b[0]), torch.stack([merge_moments(row, b[0]) for row in a]))
    none = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(merge_moments(none, a), a)
    assert torch.equal(merge_moments(a, none), a)
    unknown = torch.tensor([2, *[math.nan] * 4], dtype=torch.float64)
    assert merge_moments(a, unknown)[:, 0].tolist() == [5, 3, 4]
    assert merge_moments(a, unknown)[:, 1:].isnan().all()


def test_totals_of_other_widths_do_not_merge() -> None:
    a, b = (Totals.of(outlier_stats(torch.ones(2, N))) for N in (3, 4))
    with pytest.raises(ValueError, match="3 and of 4 features"):
        a.merge(b)
    assert a.over_processes() is a  # alone


RANK = """
import sys, torch, torch.distributed as dist
from quantbench.ops.outliers import Totals, outlier_stats
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
x = torch.randn(100, 24, generator=torch.Generator().manual_seed(0)) * 3
whole = Totals.of(outlier_stats(x[:40])).merge(Totals.of(outlier_stats(x[40:])))
found = Totals.of(outlier_stats(x[:40] if rank == 0 else x[40:])).over_processes()
assert found.tokens == whole.tokens == 100
for name in ("row_absmax", "outlier_tokens", "col_absmax", "col_count", "moments"):
    mine, expected = getattr(found, name), getattr(whole, name)
    assert mine.dtype == expected.dtype and torch.equal(mine, expected), name
try:
    Totals.of(outlier_stats(torch.ones(2, 3 + rank))).over_processes()
    raise SystemExit("widths 3 and 4 were merged")
except ValueError as error:
    assert "[3, 4]" in str(error)
dist.barrier()
dist.destroy_process_group()
"""


def test_totals_merge_over_processes(tmp_path: Path) -> None:
    ranks = [python(RANK, str(rank), str(tmp_path / "meeting"), env={"OMP_NUM_THREADS": "1"}) for rank in (0, 1)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


def python(code: str, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- the build of the kernel ------------------------------------------------------------------------------------------

BUILDING = "quantbench: building the CPU kernel for this machine (once, a few seconds) ...\n"
SMALL = 'extern "C" int answer() { return 42; }\n'  # builds at once: what is tested is the cache


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source of its own, and a cache of its own."""
    if native.find_compiler() is None:
        pytest.skip("no C++ compiler")
    path = tmp_path / "small.cpp"
    path.write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANTBENCH_NATIVE", raising=False)
    native._library.cache_clear()
    yield path
    native._library.cache_clear()  # else the kernel would be looked for in a folder that is gone


def load_anew(source: Path) -> int:
    """As a new process would: the outcome of the last attempt is forgotten."""
    native._library.cache_clear()
    library = native.library(source)
    assert library is not None
    return library.answer()


def built(source: Path) -> Path:
    (path,) = (source.parent / "cache" / "quantbench" / "native").glob("*.so")
    return path


def test_it_is_built_once_and_announced(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_anew(source) == 42
    assert capfd.readouterr().err == BUILDING
    path = built(source)
    assert path.with_name(path.name + ".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".sha256", ""}  # no temporary file is left
    assert load_anew(source) == 42
    assert native.library(source) is native.library(source)
    assert capfd.readouterr().err == ""
    source.write_text(SMALL.replace("42", "43"))
    assert load_anew(source) == 43
    assert capfd.readouterr().err == BUILDING


@pytest.mark.parametrize(
    "harm", ["truncate", "empty", "garbage", "flip", "no digest", "wrong digest", "link", "open to all"]
)
def test_a_broken_cache_heals(source: Path, capfd: pytest.CaptureFixture[str], harm: str) -> None:
    assert load_anew(source) == 42
    path = built(source)
    note, whole = path.with_name(path.name + ".sha256"), path.read_bytes()
    path.unlink()  # this process has it mapped: what follows is another file
    path.write_bytes(whole)
    path.chmod(0o600)
    if harm == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "garbage":
        path.write_bytes(b"\x7fELF garbage" * 100)
    elif harm == "flip":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "no digest":
        note.unlink()
    elif harm == "wrong digest":
        note.write_text("0" * 64)
    elif harm == "link":
        (path.parent.parent / "elsewhere").write_bytes(whole)
        path.unlink()
        path.symlink_to(path.parent.parent / "elsewhere")
    elif harm == "open to all":
        path.chmod(0o666)
    (path.parent / ".tmp-of-a-killed-build").mkdir()
    capfd.readouterr()
    assert load_anew(source) == 42
    assert capfd.readouterr().err == BUILDING
    assert not path.is_symlink()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == note.read_text()
    assert not (path.parent / ".tmp-of-a-killed-build").exists()
    assert load_anew(source) == 42
    assert capfd.readouterr().err == ""


def test_the_build_that_was_measured_faster_is_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_has", lambda feature: True)
    monkeypatch.setattr(native, "WIDTHS", {"wide": [], "narrow": ["-DNARROW"]})
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    source.write_text("#ifdef NARROW\n" + SMALL + "#else\n" + SMALL.replace("42", "512") + "#endif\n")
    measured: list[dict[str, int]] = []

    def milliseconds(libraries: dict[str, ctypes.CDLL]) -> dict[str, float]:
        measured.append({name: library.answer() for name, library in libraries.items()})
        return {"wide": 0.3, "narrow": 0.2}

    def anew() -> int:
        native._library.cache_clear()
        library = native.library(source, milliseconds)
        assert library is not None
        assert native.choice(source, milliseconds) == ("narrow", {"wide": 0.3, "narrow": 0.2})
        return library.answer()

    assert anew() == anew() == 42
    assert measured == [{"wide": 512, "narrow": 42}]  # once
    (note,) = (source.parent / "cache" / "quantbench" / "native").glob("*.fastest.json")
    for broken in ("", "{}", '{"path": "x", "ms": {"wide": 0.3, "narrow": 0.2}}', '{"path": "wide", "ms": 3}', "[1]"):
        note.write_text(broken)
        assert anew() == 42
    assert len(measured) == 6


def test_native_code_is_held_to_the_capability_that_torch_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native._has("avx2"):
        pytest.skip("no processor with AVX2")
    source.write_text('extern "C" int answer() {\n#if defined(__AVX512F__)\nreturn 512;\n#elif defined(__AVX2__)\n')
    with source.open("a") as file:
        file.write("return 256;\n#else\nreturn 128;\n#endif\n}\n")
    for capability, width in (("avx2", 256), ("default", 128)):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        assert load_anew(source) == width
        assert native.choice(source) == (capability, {})


def test_an_unwritable_cache_is_done_without(
    source: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / "cache").write_text("a file, where a folder is wanted")
    temporary = source.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert load_anew(source) == 42
    assert capfd.readouterr().err == BUILDING
    assert not list(temporary.iterdir())


def test_a_cache_of_somebody_else_is_not_used(
    source: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert load_anew(source) == 42  # built for this process alone
    assert not list((source.parent / "cache").rglob("*.so"))


def test_without_a_compiler_torch_does_it(
    source: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(50, 30)
    native._library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(source.parent))
    assert outliers.implementation("cpu") == "torch"
    check(outlier_stats(x, 2.0, quantize=True), oracle(x, 2.0, None, True))
    outlier_stats(x)
    line = "no C++ compiler found (install g++ or clang++, or set CXX); falling back to torch, slower, same results"
    assert capfd.readouterr().err == f"quantbench: {line}\n"


def test_a_compiler_that_fails_is_quoted(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source.write_text("this is no C++")
    assert native.library(source) is None
    first, second = capfd.readouterr().err.splitlines()
    assert first + "\n" == BUILDING
    assert "cannot build small.cpp" in second
    assert "falling back to torch" in second
    assert not list((source.parent / "cache").rglob("*.so"))


def test_two_processes_build_one_library(source: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        sys.modules["torch"] = None  # the build needs none of it
        import importlib.util
        spec = importlib.util.spec_from_file_location("native", sys.argv[1])
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        print(native.library(Path(sys.argv[2])).answer())
    """
    both = [python(code, native.__file__, str(source), env={}) for _ in range(2)]
    outcomes = [process.communicate(timeout=120) for process in both]
    assert [answer for answer, _ in outcomes] == ["42\n", "42\n"], outcomes
    assert sorted(errors for _, errors in outcomes) == ["", BUILDING]  # the second waited, and found it
