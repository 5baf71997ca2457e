"""The pictures of the results, as SVG whose bytes depend on the records (and matplotlib's version) alone.

Recipes keep one colour and marker within a track, the baseline is black; they are named beside their data.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbench.numerals import estimate, hundredths
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
            axes.set_title(f"{quantizer}   ρ {hundredths(rho['estimate'])}" if rho else quantizer, loc="left")
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
    steps = {entry["step"] for run in runs for entry in run["training"]["timeline"]}
    return _lines(panels, "training step", lambda axes: _training_steps(axes, steps), shown)


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
                steps = {entry["step"] for run in runs for entry in run["training"]["timeline"]}
                _training_steps(axes, steps)
                axes.set_xlim(0, max(1, *steps))
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
    width = left + len(panels) * panel + (len(panels) - 1) * gap + 0.35 + 0.062 * max(map(len, styles), default=0)
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
        if any(styles):  # a line alone may have no name
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


def _training_steps(axes: Axes, steps: set[int]) -> None:
    """A logarithmic axis of steps that has room for step 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    first, last = min(steps - {0}, default=1), max(steps - {0}, default=1)
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
    return f"Spearman ρ {estimate(rho)}, {count}"


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


# --- panels over the layers of one model -----------------------------------------------------------------------------

LEFT_OF, PANEL, GAP = 0.65, 2.25, 0.7  # inches: left of the first panel, a panel, between two


def _panels_width(count: int, right: float) -> float:
    """Of a figure with panels side by side and room at the right of the last."""
    return LEFT_OF + count * PANEL + (count - 1) * GAP + right


def _panel(figure: Figure, place: int, title: str, labels: tuple[str, str], scale: str) -> Axes:
    """The panel at a place from the left; labels of its x and its y axis."""
    width, height = figure.get_size_inches()
    left = LEFT_OF + place * (PANEL + GAP)
    axes = figure.add_axes((left / width, 0.45 / height, PANEL / width, 1 - 0.75 / height))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_yscale(scale)
    return axes


# --- a portrait of one model (portrait.py) ---------------------------------------------------------------------------

SIDES = (("with BOS", "black", "o-"), ("without BOS", "#cc3311", "o--"))  # dashed, as the two often coincide
BY_LAYER = {  # figure of a layer -> (title, unit, scale)
    "norm": ("residual peak", "token norm after the block", "log"),
    "sink-attention": ("attention to the sink", "mean attention weight", "linear"),
    "value-drain": ("value drain", "value norm of the sink / other tokens", "log"),
}


def by_layer(sides: dict[str, dict[str, list[float | None]]]) -> bytes | None:
    """The three signatures layer by layer, a line per side of SIDES; beside the largest norm the median, dotted.

    `sides`: label -> figure -> a number a layer. Panels of which nothing is known are left out; None where all are.
    """
    shown = [figure for figure in BY_LAYER if any(_known(courses, figure) for courses in sides.values())]
    if not shown:
        return None
    layers = max(len(courses["norm"]) for courses in sides.values())
    with _figure(_panels_width(len(shown), 0.95), 2.9) as figure:
        for place, name in enumerate(shown):
            title, unit, scale = BY_LAYER[name]
            axes = _panel(figure, place, title, ("block", unit), scale)
            ends, styles = {}, {}
            for label, colour, line in SIDES:
                courses = sides.get(label, {})
                if not (course := _known(courses, name)):
                    continue
                axes.plot(*zip(*course, strict=True), line, color=colour, linewidth=1.2, markersize=2.2)
                ends[label], styles[label] = course[-1], (colour, "o")
                if name == "norm" and (medians := _known(courses, "median")):
                    axes.plot(*zip(*medians, strict=True), ":", color=colour, linewidth=1.2)
                    ends["median"], styles["median"] = medians[-1], ("0.35", "")
            _counted(axes, layers - 1)
            if scale == "log":
                _plain_ticks(axes.yaxis)
            else:
                axes.set_ylim(0, None)
            if place == len(shown) - 1:
                _name_ends(axes, ends, styles)
            elif name == "norm":
                _note_medians(axes, sides)
        return _svg(figure)


def _known(courses: dict[str, list[float | None]], figure: str) -> list[tuple[float, float]]:
    """(layer, number) where there is one; of what a logarithmic axis shows, where it is above 0."""
    logarithmic = BY_LAYER.get(figure, ("", "", "log"))[2] == "log"
    numbers = enumerate(courses.get(figure, []))
    return [(float(x), y) for x, y in numbers if y is not None and (y > 0 or not logarithmic)]


def _note_medians(axes: Axes, sides: dict[str, dict[str, list[float | None]]]) -> None:
    """Says what is dotted, below and right of its middle: medians grow from block to block."""
    courses = [medians for side in sides.values() if (medians := _known(side, "median"))]
    if courses:
        lowest = min(courses, key=lambda medians: medians[len(medians) // 2][1])
        axes.annotate("median token", lowest[len(lowest) // 2], (3, -4), textcoords="offset points", va="top",
                      color="0.35", fontsize=7)  # fmt: skip


# --- heads of one model (dormant.py) ---------------------------------------------------------------------------------

DOMAINS = ("#cc3311", "#0077bb", "#117733", "#ee7733", "#aa4499", "#332288")


def head_map(differences: list[list[float]], framed: list[tuple[int, int, bool]], domains: tuple[str, str]) -> bytes:
    """Layers x heads: the attention to the sink in one domain minus that in the other; red above 0, blue below.

    framed: (layer, head, whether it is dormant in one and active in the other), with a frame, that with a thick one.
    """
    from matplotlib.patches import Rectangle

    layers, heads = len(differences), max(map(len, differences))
    largest = max(0.01, max(abs(x) for row in differences for x in row))
    box = (0.42, 0.16) if heads <= 16 else (0.2, 0.16)  # inches
    left, right, bottom, top = 0.55, 0.2, 0.45, 0.6
    width, height = left + max(box[0] * heads, 3.2) + right, bottom + box[1] * layers + top
    with _figure(width, height) as figure:
        axes = figure.add_axes((left / width, bottom / height, box[0] * heads / width, 1 - (bottom + top) / height))
        axes.set(xlim=(-0.5, heads - 0.5), ylim=(-0.5, layers - 0.5))
        axes.grid(False)
        for layer, row in enumerate(differences):
            for head, difference in enumerate(row):
                colour = _diverging(difference / largest)
                axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, facecolor=colour, edgecolor="none"))
        for layer, head, contrast in framed:
            axes.add_patch(
                Rectangle((head - 0.47, layer - 0.44), 0.94, 0.88, fill=False, edgecolor="black",
                          linewidth=1.3 if contrast else 0.5)
            )  # fmt: skip
            if heads <= 16:
                difference = differences[layer][head]
                ink, shown = "white" if abs(difference) > 0.7 * largest else "black", hundredths(difference)
                axes.text(head, layer, shown, ha="center", va="center_baseline", fontsize=5.5, color=ink)
        for axis, name in ((axes.xaxis, "head"), (axes.yaxis, "layer")):
            _whole_ticks(axis)
            axis.set_label_text(name)
        title = f"attention to the sink: {domains[0]} − {domains[1]}"
        axes.set_title(title, loc="left", fontweight="bold", pad=18)
        told = f"blue −{largest:.2f} to red +{largest:.2f}; framed: intervened on, thick: dormant in one, active in one"
        axes.text(0, 1 + 0.06 / (box[1] * layers), told, transform=axes.transAxes, color="0.35", fontsize=6.5)
        return _svg(figure)


def _diverging(share: float) -> tuple[float, float, float]:
    """From -1, blue, by way of white, to 1, red: of DOMAINS the first two."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(DOMAINS[0] if share > 0 else DOMAINS[1])
    share = min(1.0, abs(share))
    return (1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue))


def _whole_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_tick_params(length=0)


def forest(rows: dict[str, dict[str, Any]], domains: list[str], kinds: tuple[str, ...]) -> bytes:
    """A line per head: the change of the loss and its limits, a colour per domain, a panel per kind of intervention.

    rows: label -> domain -> {kind: {mean, low, high}, verdict}. Filled: active; hollow: dormant; grey: undecided.
    """
    left, panel, gap, right, top, line = 0.6, 2.6, 0.25, 0.15, 0.62, 0.2  # inches
    width = left + len(kinds) * panel + (len(kinds) - 1) * gap + right
    height = top + line * len(rows) + 0.5
    colours = {name: DOMAINS[number % len(DOMAINS)] for number, name in enumerate(domains)}
    with _figure(width, height) as figure:
        for place, kind in enumerate(kinds):
            axes = figure.add_axes(
                ((left + place * (panel + gap)) / width, 0.5 / height, panel / width, line * len(rows) / height)
            )
            axes.axvline(0, color="0.6", linewidth=0.6)
            for y, found in enumerate(rows.values()):
                for number, name in enumerate(domains):
                    at, colour = found[name], colours[name]
                    offset = y + 0.5 * ((number + 0.5) / len(domains) - 0.5)
                    axes.plot([at[kind]["low"], at[kind]["high"]], [offset, offset], color=colour, linewidth=1.0)
                    face = {"active": colour, "dormant": "white"}.get(at["verdict"], "0.65")
                    axes.plot([at[kind]["mean"]], [offset], "o", color=face, markersize=3.4, markeredgecolor=colour,
                              markeredgewidth=0.9)  # fmt: skip
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_yticks(range(len(rows)), list(rows) if place == 0 else [""] * len(rows))
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("change of the loss, nats per token")
            axes.set_title({"moved": "attention moved to the sink"}.get(kind, f"head {kind}"), loc="left",
                           fontweight="bold", pad=16)  # fmt: skip
            if place == 0:
                _legend_of(axes, colours)
        return _svg(figure)


def _legend_of(axes: Axes, colours: dict[str, str]) -> None:
    """The domains in their colours and what the marks mean, above the axes."""
    at: Any = "axes fraction"
    words = [*colours.items(), ("filled: active, hollow: dormant, grey: undecided", "0.35")]
    for number, (word, colour) in enumerate(words):
        corner, shift = ((1, 0), (0, 0)) if number else ((0, 1), (0, 4))  # behind the word before
        at = axes.annotate(f"{word}   ", corner, shift, xycoords=at, textcoords="offset points", va="bottom",
                           color=colour, fontsize=7)  # fmt: skip


# --- ablations of one model (ablation.py) ----------------------------------------------------------------------------

SUBLAYERS = {"mlp": ("MLP zeroed", "black", "o-"), "attention": ("attention zeroed", "#cc3311", "o-")}
LEFT = {  # figure of an ablation -> (title, unit, scale)
    "sink-norm": ("what the sink's norm becomes", "norm of the sink after block {}", "log"),
    "sink-rate": ("sink rate", "share of heads above .3 on one position", "linear"),
    "loss-change": ("what it costs", "change of the loss, nats per token", "linear"),
}


def ablations(whole: dict[str, Any], found: list[dict[str, Any]], peak: int) -> bytes:
    """What is left of the sink, and what it costs, over the layer that is ablated; dashed, the whole model."""
    shown = [name for name in LEFT if any(_left(at, name) is not None for at in found)]
    with _figure(_panels_width(len(shown), 1.0), 2.9) as figure:
        for place, name in enumerate(shown):
            title, unit, scale = LEFT[name]
            axes = _panel(figure, place, title, ("layer", unit.format(peak)), scale)
            ends, styles = {}, {}
            for part, (label, colour, line) in SUBLAYERS.items():
                course = [(float(at["layer"]), y) for at in found if at["part"] == part
                          if (y := _left(at, name)) is not None and (y > 0 or scale != "log")]  # fmt: skip
                if course:
                    axes.plot(*zip(*course, strict=True), line, color=colour, linewidth=1.2, markersize=2.2)
                    ends[label], styles[label] = course[-1], (colour, "o")
            level = 0.0 if name == "loss-change" else whole[name]
            if level is not None and (level > 0 or scale != "log"):
                axes.axhline(level, color="0.5", linewidth=0.8, linestyle="--")
            _counted(axes, max(at["layer"] for at in found))
            if scale == "log":
                _plain_ticks(axes.yaxis)
            elif name == "sink-rate":
                axes.set_ylim(0, None)
            if place == len(shown) - 1:
                _name_ends(axes, ends, styles)
        return _svg(figure)


def _left(at: dict[str, Any], name: str) -> float | None:
    number: float | None = at[name]["mean"] if name == "loss-change" else at[name]
    return number


# --- checkpoints of one model (dynamics.py) --------------------------------------------------------------------------


def over_training(revisions: list[dict[str, Any]], unit: str) -> bytes | None:
    """The three signatures as in `timeline`, and the norm of the first token, of the checkpoints of one model.

    Panels of which nothing is known are left out; None where all are.
    """
    shown = {**SIGNATURES, "first-norm": ("first token", "its largest norm over blocks", "linear")}
    panels = [
        Panel(title, of, scale, {"": course})
        for name, (title, of, scale) in shown.items()
        if (course := _means([(at["step"], at[name]) for at in revisions], scale == "log"))
    ]
    steps = {at["step"] for at in revisions}

    def mark(axes: Axes) -> None:
        for line in axes.get_lines():
            line.set(marker="o", markersize=2.5)
        if unit == "revision":
            _counted(axes, max(steps))
        else:
            _training_steps(axes, steps)

    return _lines(panels, unit, mark, {"": ("black", "o")})
