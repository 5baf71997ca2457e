"""Numbers as tables show them."""

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"


def plain(value: float | None) -> str:
    """Three significant digits, without an exponent between a ten-thousandth and a billion."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:,.{max(0, 2 - magnitude)}f}".replace("-", "−")


def plus_minus(value: float, half_width: float | None) -> str:
    """The value to the place of the second digit of its half-width: 3.512 ± 0.013."""
    if half_width is None or half_width == 0 or not -7 <= math.floor(math.log10(half_width)) < 9:
        return plain(value)
    places = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{value:,.{places}f} ± {half_width:,.{places}f}".replace("-", "−")


def hundredths(value: float) -> str:
    """Two digits after the point, with a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def estimate(found: Mapping[str, float | None] | None) -> str:
    """{estimate, low, high} in hundredths; without limits where there are none."""
    if found is None or found["estimate"] is None:
        return NOTHING
    low, high = found["low"], found["high"]
    limits = "" if low is None or high is None else f" [{hundredths(low)}, {hundredths(high)}]"
    return f"{hundredths(found['estimate'])}{limits}"


def signed(value: float | None, digits: int = 4) -> str:
    """With its sign, also where it is above 0."""
    return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def spread(interval: Mapping[str, Any] | None, digits: int = 4, sign: bool = True) -> str:
    """{mean, low, high} as mean ± half of its width; the mean alone where there is no interval."""
    if interval is None or interval["mean"] is None:
        return NOTHING
    mean = signed(interval["mean"], digits) if sign else f"{interval['mean']:.{digits}f}"
    if interval["low"] is None:
        return mean
    return f"{mean} ± {(interval['high'] - interval['low']) / 2:.{digits}f}"
