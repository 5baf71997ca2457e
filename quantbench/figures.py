"""The pictures of the results, as SVG whose bytes depend on the records (and matplotlib's version) alone.

Recipes keep one colour and marker within a track, the baseline is black; they are named beside their data.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbench.relation import finished, point, post_hoc
from quantbench.results import BASELINE, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# The twelve that differ most of Paul Tol's "muted" and "vibrant" sets, legible on white for the colour-blind.
COLOURS = ("#332288", "#cc3311", "#117733", "#ee7733", "#0077bb", "#aa4499", "#999933", "#882255", "#44aa99", "#cc6677")
MARKERS = "osD^vP"
PEAK = "residual peak (largest / median token norm, worst layer)"
ERROR = "KL(full ‖ quantized), nats per token"
SIGNATURES = {
    "residual-peak": ("residual peak", "largest / median token norm", "log"),
    "bos-attention": ("attention to BOS", "mean attention weight", "linear"),
    "value-drain": ("value drain", "value norm of BOS / other tokens", "log"),
}
PROPAGATION = {
    "accumulated": ("accumulated A", "error / output of the block, squared", "log"),
    "local": ("local B", "", "log"),
    "interaction": ("interaction C / R", "share of the whole error", "linear"),
}


def relation(records: list[Record], quantizer: str, rho: dict[str, Any]) -> bytes | None:
    """Residual peak against KL for one quantizer: small marks are runs, large ones recipes (geometric means).

    `rho` are the figures of `relation.relate`. None where fewer than two runs have both numbers.
    """
    runs = finished(records)
    with _figure(6.4, 4.2) as figure:
        axes = figure.add_axes((0.1, 0.13, 0.87, 0.75))
        centres = _scatter(axes, runs, quantizer)
        if not centres:
            return None
        axes.set_xlabel(PEAK)
        axes.set_ylabel(ERROR)
        axes.set_title(f"{runs[0]['track']['title']}: {quantizer}", loc="left", fontweight="bold", pad=18)
        axes.text(0, 1.02, _in_words(rho), transform=axes.transAxes, color="0.35")
        _name_points(axes, centres, _styles(runs))
        return _svg(figure)


def relations(records: list[Record], figures: dict[str, Any]) -> bytes | None:
    """As `relation`, every quantizer of the track as a small panel on common axes."""
    runs = finished(records)
    shown = [q for q in figures if sum(point(r, q, "residual-peak") is not None for r in runs) > 1]
    if len(shown) < 2:
        return None
    from matplotlib.lines import Line2D

    columns = 3 if len(shown) <= 12 else 6
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    with _figure(2.6 * columns + 0.8, 2.2 * rows + 1.1) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, quantizer in zip(grid.flat, shown, strict=False):
            _scatter(axes, runs, quantizer)
            rho = figures[quantizer]["residual-peak"]["rho"]
            axes.set_title(f"{quantizer}   ρ {_signed(rho['estimate'])}" if rho else quantizer, loc="left")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes in grid.flat[max(0, len(shown) - columns) : len(shown)]:
            axes.xaxis.set_tick_params(labelbottom=True)
        styles = _styles(runs)
        handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=4) for c, m in styles.values()]
        legend_rows = math.ceil(len(styles) / (2 * columns))
        bottom = (0.55 + 0.17 * legend_rows) / figure.get_figheight()
        figure.legend(handles, list(styles), loc="lower center", ncols=min(len(styles), 2 * columns), frameon=False)
        figure.subplots_adjust(0.85 / figure.get_figwidth(), bottom, 0.98, 1 - 0.3 / figure.get_figheight(), 0.08, 0.3)
        middle = (bottom + 1) / 2
        figure.text(0.5, bottom - 0.38 / figure.get_figheight(), PEAK, ha="center", va="center")
        figure.text(0.15 / figure.get_figwidth(), middle, ERROR, rotation=90, ha="center", va="center")
        return _svg(figure)


def timeline(records: list[Record]) -> bytes | None:
    """The three signatures over training, a line per pretraining recipe (mean over seeds).

    None where nothing was logged.
    """
    runs = [run for run in finished(records) if not post_hoc(run)]
    panels = []
    for signature, (title, unit, scale) in SIGNATURES.items():
        courses = {
            recipe: _course([r for r in runs if r["recipe"]["name"] == recipe], signature, scale == "log")
            for recipe in _styles(runs)
        }
        panels.append(Panel(title, unit, scale, courses))
    styles = _styles(finished(records))
    shown = {name: style for name, style in styles.items() if name in {run["recipe"]["name"] for run in runs}}
    return _lines(panels, "training step", lambda axes: _training_steps(axes, runs), shown)


def dynamics(records: list[Record]) -> bytes | None:
    """The watched timelines, drawn as arXiv:2410.13835 draws them: a colour per recipe (means over seeds).

    Excess risks; attention to BOS and delta logit at the layer of each recipe's sink, dashed at triggers; value norms
    there, dashed of the other tokens; residual norms after every block, dashed of the others. None where no timeline
    is watched.
    """
    runs = [r for r in finished(records) if not post_hoc(r) and any("watched" in e for e in r["training"]["timeline"])]
    if not runs:
        return None
    from matplotlib.lines import Line2D

    by_recipe = {n: [r for r in runs if r["recipe"]["name"] == n] for n in _styles(finished(records))}
    sinks = {name: _sink_layer(mine) for name, mine in by_recipe.items() if mine}
    layers = max(len(entry["watched"]["residual-bos"]) for r in runs for entry in r["training"]["timeline"][-1:])
    task = {name for r in runs for name in r["training"]["timeline"][-1]["watched"]["task"]}
    wanted: list[tuple[str, str, str, list[tuple[str, int | None]]]] = [
        (title, "nats", "log", [(name, None)]) for name, title in RISKS.items() if name in task
    ]
    wanted += [(title, unit, scale, [(name, None) for name in names]) for title, unit, scale, names in WATCHED]
    for layer in range(layers):
        pair: list[tuple[str, int | None]] = [("residual-bos", layer), ("residual-others", layer)]
        wanted.append((f"residual norm after block {layer}", "", "log", pair))
    columns = 4
    rows = math.ceil(len(wanted) / columns)
    styles = _styles(finished(records))
    with _figure(2.5 * columns, 2.1 * rows + 0.5) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, unit, scale, names) in zip(grid.flat, wanted, strict=False):
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_ylabel(unit)
            axes.set_yscale(scale)
            courses = []
            for recipe, layer in sinks.items():
                for (name, at), dashes in zip(names, ("-", "--"), strict=False):
                    points = [
                        (entry["step"], _watched(entry["watched"], name, layer if at is None else at))
                        for run in by_recipe[recipe]
                        for entry in run["training"]["timeline"]
                        if "watched" in entry
                    ]
                    if course := _means(points, scale == "log"):
                        courses.append((course, dashes, styles[recipe][0]))
            if courses:
                _limit(axes, [y for course, _, _ in courses for _, y in course], scale)
                for course, dashes, colour in courses:
                    axes.plot(*zip(*course, strict=True), dashes, color=colour, linewidth=1.1)
                _training_steps(axes, runs)
                axes.set_xlim(0, max(1, *(entry["step"] for r in runs for entry in r["training"]["timeline"])))
                if scale == "log":
                    _plain_ticks(axes.yaxis)
        for axes in grid.flat[len(wanted) :]:
            axes.set_visible(False)
        handles = [Line2D([], [], color=styles[name][0]) for name in sinks]
        figure.legend(handles, list(sinks), loc="lower center", ncols=min(len(sinks), 6), frameon=False)
        top = figure.get_figheight()
        figure.subplots_adjust(0.06, 0.65 / top, 0.99, 1 - 0.3 / top, 0.32, 0.5)
        return _svg(figure)


def _limit(axes: Axes, values: list[float], scale: str) -> None:
    """Room for the values, also where all of them are one."""
    low, high = min(values), max(values)
    if scale == "log":
        room = max(1.05, (high / low) ** 0.05)
        axes.set_ylim(low / room, high * room)
    else:
        room = max(1e-3, 0.05 * (high - low))
        axes.set_ylim(low - room, high + room)


RISKS = {"excess-risk-trigger": "excess risk, triggers", "excess-risk-bigram": "excess risk, others"}
WATCHED = (
    ("attention to BOS (-- triggers)", "mass", "linear", ("bos-attention", "trigger-attention")),
    ("delta logit", "", "linear", ("delta-logit",)),
    ("value norm of BOS (-- others)", "", "log", ("value-bos", "value-others")),
)


def _sink_layer(runs: list[Record]) -> int:
    """The layer with the most attention to BOS at the end, over the runs of a recipe."""
    last = [run["training"]["timeline"][-1]["watched"]["bos-attention"] for run in runs]
    totals = [math.fsum(each[layer] or 0.0 for each in last) for layer in range(len(last[0]))]
    return totals.index(max(totals))


def _watched(figures: dict[str, Any], name: str, layer: int) -> float | None:
    if name in figures["task"]:
        value: float | None = figures["task"][name]
        return value
    return figures[name][layer] if name in figures else None


def propagation(sites: list[Record], records: list[Record]) -> bytes | None:
    """How each block's error comes about, a line per recipe (mean over seeds), of records of `quantbench sites`.

    Of tokens that are not extreme. Recipes have the styles that they have among `records`. None where nothing is known.
    """
    by_recipe: dict[str, list[Record]] = {}
    for record in sites:
        if record["propagation"] is not None:
            by_recipe.setdefault(record["recipe"]["name"], []).append(record)
    panels = []
    for part, (title, unit, scale) in PROPAGATION.items():
        courses = {}
        for recipe, runs in by_recipe.items():
            points = [
                (layer, _part(found, part)) for r in runs for layer, found in enumerate(r["propagation"]["non-sink"])
            ]
            courses[recipe] = _means(points, scale == "log")
        panels.append(Panel(title, unit, scale, courses))
    styles = _styles([*finished(records), *sites])
    last = max((len(r["propagation"]["non-sink"]) - 1 for runs in by_recipe.values() for r in runs), default=0)
    shown = {name: styles[name] for name in styles if name in by_recipe}
    return _lines(panels, "block", lambda axes: _counted(axes, last), shown, left=0.8)


def _part(found: dict[str, float | None], part: str) -> float | None:
    """Of a block's error; the interaction, which has a sign, relative to the whole."""
    value, whole = found[part], found["total"]
    return value if part != "interaction" or value is None or not whole else value / whole


class Panel(NamedTuple):
    """One axes of a row of them: a line per recipe."""

    title: str
    unit: str
    scale: str
    courses: dict[str, list[tuple[float, float]]]


def _lines(
    panels: list[Panel],
    xlabel: str,
    mark_x: Callable[[Axes], None],
    styles: dict[str, tuple[str, str]],
    left: float = 0.6,
) -> bytes | None:
    """Panels side by side, the recipes named once, at the right. None where there is no line."""
    panel, gap = 2.25, 0.65  # inches, as `left`; right of the last panel there is room for the longest name
    width = left + 3 * panel + 2 * gap + 0.35 + 0.062 * max(map(len, styles), default=0)
    height = max(3.2, 0.155 * len(styles) + 1.0)
    with _figure(width, height) as figure:
        last = None
        for place, (title, unit, scale, courses) in enumerate(panels):
            axes = figure.add_axes(
                ((left + place * (panel + gap)) / width, 0.5 / height, panel / width, 1 - 0.95 / height)
            )
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_ylabel(unit)
            axes.set_xlabel(xlabel)
            axes.set_yscale(scale)
            ends = {}
            for recipe, (colour, _) in styles.items():
                if course := courses[recipe]:
                    thickness, order = (1.8, 3) if recipe == BASELINE else (1.0, 2)
                    axes.plot(*zip(*course, strict=True), color=colour, linewidth=thickness, zorder=order)
                    ends[recipe] = course[-1]
            if ends:
                last = (axes, ends)
                mark_x(axes)
                if scale == "log":
                    _plain_ticks(axes.yaxis)
        if last is None:
            return None
        _name_ends(*last, styles)
        return _svg(figure)


def heat(columns: list[str], rows: list[tuple[str, list[tuple[float, str, bool]]]]) -> bytes | None:
    """A box per recipe and column: its colour is log10 of the damage, its text a ratio, its frame a significance.

    `rows`: recipe -> (damage, text, framed) per column; a damage that is not above 0 stays white.
    """
    if not columns or not rows:
        return None
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    damages = [damage for _, boxes in rows for damage, _, _ in boxes if damage > 0]
    if not damages:
        return None
    lowest, highest = max(min(damages), max(damages) * 1e-6), max(damages)
    norm = LogNorm(lowest, highest)
    left, right, top, box = 1.35, 0.75, 1.45, (0.5, 0.24)  # inches; names lean over the right edge
    width, height = left + box[0] * len(columns) + right, top + box[1] * len(rows) + 0.25
    with _figure(width, height) as figure:
        axes = figure.add_axes((left / width, 0.25 / height, 1 - (left + right) / width, 1 - (top + 0.25) / height))
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.grid(False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=60, ha="left", rotation_mode="anchor")
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [name for name, _ in rows])
        for y, (_, boxes) in enumerate(rows):
            for x, (damage, text, framed) in enumerate(boxes):
                shade = float(norm(max(damage, lowest))) if damage > 0 else 0.0
                colour = (1 - 0.35 * shade, 1 - 0.9 * shade, 1 - 0.85 * shade) if damage > 0 else "white"
                axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, facecolor=colour, edgecolor="none"))
                ink = "white" if shade > 0.6 else "0.2"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.5, color=ink)
                if framed:
                    axes.add_patch(
                        Rectangle((x + 0.05, y + 0.09), 0.9, 0.82, fill=False, edgecolor="black", linewidth=1)
                    )
        for spine in axes.spines.values():
            spine.set_visible(False)
        low, high = (f"{value:.2g}" for value in (lowest, highest))
        axes.text(0, len(rows) + 0.75, f"white {low} to red {high} nats per token, log scale", color="0.35")
        return _svg(figure)


def _styles(runs: list[Record]) -> dict[str, tuple[str, str]]:
    """recipe -> (colour, marker), the baseline first."""
    recipes = sorted({r["recipe"]["name"] for r in runs}, key=lambda name: (name != BASELINE, name))
    others = iter([(colour, marker) for marker in MARKERS for colour in COLOURS] * len(recipes))
    return {name: ("black", "o") if name == BASELINE else next(others) for name in recipes}


def _scatter(axes: Axes, runs: list[Record], quantizer: str) -> dict[str, tuple[float, float]]:
    """Draws the runs and the recipes' geometric means, and returns the means; nothing below two runs."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if at := point(run, quantizer, "residual-peak"):
            points.setdefault(run["recipe"]["name"], []).append(at)
    if sum(map(len, points.values())) < 2:
        return {}
    axes.set_xscale("log")
    axes.set_yscale("log")
    centres, hollow = {}, {run["recipe"]["name"] for run in runs if post_hoc(run)}
    for recipe, (colour, marker) in _styles(runs).items():
        if recipe not in points:
            continue
        xs, ys = zip(*points[recipe], strict=True)
        x, y = (math.exp(math.fsum(map(math.log, values)) / len(values)) for values in (xs, ys))
        axes.plot(xs, ys, marker, color=colour, markersize=2.5, alpha=0.45, markeredgewidth=0)
        face, edge = ("white", colour) if recipe in hollow else (colour, "white")
        axes.plot([x], [y], marker, color=face, markersize=5.5, markeredgecolor=edge, markeredgewidth=0.8)
        centres[recipe] = (x, y)
    axes.margins(0.08)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    return centres


def _training_steps(axes: Axes, runs: list[Record]) -> None:
    """A logarithmic axis of steps that has room for step 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    steps = sorted({entry["step"] for r in runs for entry in r["training"]["timeline"]} - {0})
    first, last = (steps[0], steps[-1]) if steps else (1, 1)
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    decades = [10**power for power in range(10) if first <= 10**power <= last]
    axes.xaxis.set_major_locator(FixedLocator([0, *decades]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _counted(axes: Axes, last: int) -> None:
    """An axis of what is counted from 0."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.05 * (last + 1), 1.05 * (last + 1) - 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_ticks(axis: Axis) -> None:
    """1, 10, 100 on a logarithmic axis, and 2 and 5 between them where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 60 * low else (1.0,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_points(axes: Axes, centres: dict[str, tuple[float, float]], styles: dict[str, tuple[str, str]]) -> None:
    """Writes each recipe's name beside its mean, at the nearest place that is still free, with a line if it is far."""
    axes.get_xlim(), axes.get_ylim()  # makes the limits, and with them transData, those of the data
    box = axes.get_window_extent()
    to_points = 72 / axes.figure.dpi
    at = {name: axes.transData.transform(xy) * to_points for name, xy in centres.items()}
    taken = [(x - 3.0, y - 3.0, x + 3.0, y + 3.0) for x, y in at.values()]
    left, bottom, right, top = (side * to_points for side in (box.x0, box.y0, box.x1, box.y1))
    for name, (x, y) in at.items():
        width, height = 4.1 * len(name), 8.0
        for radius, angle in ((r, a) for r in range(6, 200, 7) for a in (0, 180, 90, 270, 30, 150, 330, 210, 60, 120)):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            x0 = x + dx - (width if dx < -1 else width / 2 if abs(dx) <= 1 else 0.0)
            label = (x0, y + dy - height / 2, x0 + width, y + dy + height / 2)
            inside = left < label[0] and label[2] < right and bottom < label[1] and label[3] < top
            if inside and not any(_overlap(label, other) for other in taken):
                break
        else:
            continue  # no room at all: a thousand recipes
        taken.append(label)
        colour, _ = styles[name]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name,
            centres[name],
            (x0 - x, dy),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=7,
            arrowprops=line if radius > 13 else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _name_ends(axes: Axes, ends: dict[str, tuple[float, float]], styles: dict[str, tuple[str, str]]) -> None:
    """Names lines right of the axes, in the order of their ends, moved apart as far as it takes."""
    axes.get_xlim(), axes.get_ylim()  # makes the limits, and with them transData, those of the data
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    to_axes = axes.transAxes.inverted()
    wanted = {name: to_axes.transform(axes.transData.transform(end)) for name, end in ends.items()}
    step = min(8.5 / height, 1.1 / max(1, len(ends)))
    order = sorted(wanted, key=lambda name: (wanted[name][1], name))
    places: list[float] = []
    for name in order:
        places.append(max(wanted[name][1], places[-1] + step if places else -1.0))
    top = 1.03
    for index in reversed(range(len(places))):  # those pushed out at the top come down again
        top = places[index] = min(places[index], top)
        top -= step
    for name, y in zip(order, places, strict=True):
        x_end, y_end = wanted[name]
        colour, _ = styles[name]
        axes.plot(
            [x_end, 1.03, 1.05],
            [y_end, y, y],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.5,
            alpha=0.6,
            clip_on=False,
        )
        weight = "bold" if name == BASELINE else "normal"
        axes.text(1.06, y, name, transform=axes.transAxes, color=colour, va="center", fontsize=7, fontweight=weight)


def _course(runs: list[Record], signature: str, logarithmic: bool) -> list[tuple[float, float]]:
    """(step, mean over seeds): the geometric mean where the axis is logarithmic."""
    return _means([(e["step"], e[signature]) for run in runs for e in run["training"]["timeline"]], logarithmic)


def _means(points: list[tuple[int, float | None]], logarithmic: bool) -> list[tuple[float, float]]:
    """(x, mean of all y there), ascending."""
    by_x: dict[int, list[float]] = {}
    for x, y in points:
        if y is not None and (y > 0 or not logarithmic):
            by_x.setdefault(x, []).append(math.log(y) if logarithmic else y)
    means = [(x, math.fsum(values) / len(values)) for x, values in sorted(by_x.items())]
    return [(float(x), math.exp(mean) if logarithmic else mean) for x, mean in means]


def _in_words(figures: dict[str, Any]) -> str:
    rho = figures["rho"]
    count = f"{figures['recipes']} recipes, {figures['n']} runs"
    if rho is None:
        return count
    limits = "" if rho["low"] is None else f" [{_signed(rho['low'])}, {_signed(rho['high'])}]"
    return f"Spearman ρ {_signed(rho['estimate'])}{limits}, {count}"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure (inches) under settings that no user's matplotlibrc changes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = {
            "text.parse_math": False,  # a $ in a title is a $
            "svg.hashsalt": "quantbench",  # ids from content, not at random
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.edgecolor": "0.3",
            "xtick.color": "0.3",
            "ytick.color": "0.3",
            "axes.grid": True,
            "grid.color": "0.92",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.fontsize": 7,
        }
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasSVG(figure)
        yield figure


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
