"""The portrait of a model that somebody trained: its extreme tokens, layer by layer, with BOS in front and without.

Windows are spread over the documents: the first of each, more of each where that does not suffice. Every window is seen
twice, as `length` tokens of a document and with BOS in the place of the first of them: both ways the same tokens are
predicted, so that losses compare. What stands at the top of a record is the way with BOS,
or without it where the model has none.

    norm            ||h_t|| after a block, of the token of each window that has the largest; mean over windows
    residual peak   that norm over the median token's, mean over windows; the largest over blocks (residual_peak.py)
    sink            the position k <= T/2 at which most heads put more than .3 of their attention (sink_rate.py); drain
                    (value_drain.py), delta logit (delta_logit.py) and attention are given for it, it need not be BOS
    bits per byte   the loss over the bytes of the tokens that were predicted, as they stand in the text (tokenbytes.py)
    extreme         a token whose norm exceeds 3 x the median of its window after the block of the peak
    overflow        the largest |x| of all that passes: residual stream, inputs and outputs of norms (what enters one
                    shows the sum after the attention) and of Linears, the head's among them, scores; and of weights

Layers and positions are counted from 0.
"""

import itertools
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantbench.markup import Table
from quantbench.numerals import NOTHING, plain
from quantbench.strict import quote

if TYPE_CHECKING:
    from torch import Tensor

    from quantbench.anatomy import Anatomy
    from quantbench.metrics import Metric, Reading
    from quantbench.pretrained import Given
    from quantbench.watchers import Carriers

Body = dict[str, Any]
Say = Callable[[str, int, int, str], None]

BATCH = 4  # windows a pass, at most
PASS = 1 << 28  # bytes of scores and logits a pass
SINKS = 8  # positions that are listed, at most
TOKENS = 12  # extreme tokens that are listed, at most
MAXIMA = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
HEADLINES = ("residual-peak", "sink-rate", "bos-attention", "value-drain", "delta-logit")
SIDES = {"with-bos": "with BOS", "without-bos": "without BOS"}


# --- measuring -------------------------------------------------------------------------------------------------------


def portrait(given: "Given", documents: list[str], length: int, windows: int, say: Say = lambda *_: None) -> Body:
    """The body of a record, fit for JSON; `run` in it are the facts of this run.

    At most `windows` windows of `length` tokens are read, as many as the documents have. ValueError where they have
    none, where the model has no positions for so many tokens, and where it gives NaN or infinity.
    """
    from quantbench.anatomy import anatomy

    started = time.perf_counter()
    parts = anatomy(given.model)
    text = _text_of(given, documents, length, windows, parts.room)
    found = sum(text.shares)
    ways = {"with-bos": given.bos, "without-bos": None} if given.bos is not None else {"without-bos": None}
    main = next(iter(ways))
    whole: dict[str, Body] = {}
    for number, (way, bos) in enumerate(ways.items()):

        def told(done: int, label: str = SIDES[way], before: int = number * found) -> None:
            say("measure", before + done, found * len(ways), label)

        whole[way] = _measured(given, parts, text, bos, way == main, told)
    sides: dict[str, Body | None] = {way: whole[way].pop("side") if way in whole else None for way in SIDES}
    notes = []
    if not parts.heads:
        notes.append("this model shows nothing of its attention: sinks, attention, value drain and delta logit are not "
                     "known")  # fmt: skip
    if given.bos is None:
        notes.append("its tokenizer knows no BOS: all is measured without")
    if text.scored_bytes is None:
        notes.append("its tokenizer does not say where in a text its tokens stand: bits per byte are not known")
    if found < windows:
        notes.append(f"the text has {found} windows of {length} tokens, {windows} were asked for")
    return {
        "length": length,
        "windows": found,
        "documents": sum(map(bool, text.shares)),
        "layers": len(parts.blocks),
        **({"front": parts.front} if parts.front else {}),
        "bos": None if given.bos is None else _token(given, given.bos),
        **whole[main],
        **sides,
        "notes": notes,
        "run": {"seconds": round(time.perf_counter() - started, 1), "peak-memory-bytes": _peak_memory()},
    }


@dataclass(frozen=True)
class _Text:
    """The windows that are read."""

    given: "Given"
    texts: list[str]
    length: int
    shares: list[int]  # how many of the first windows of each text
    scored_bytes: int | None  # of the text of all tokens that are predicted: all but the first of each window

    def __iter__(self) -> "Iterator[Tensor]":
        """Their ids [T]. Never more than a document at once is held."""
        for text, share in zip(self.texts, self.shares, strict=False):
            if share:
                windows = self.given.windows([text], self.length, bos=False)
                yield from (ids_T for _, ids_T in itertools.islice(windows, share))

    def batches(self, bos: int | None) -> "Iterator[Tensor]":
        """As ids [B, T], with BOS in the place of the first token where one is given."""
        import torch

        windows, size = iter(self), _batch(self.given, self.length)
        while some := list(itertools.islice(windows, size)):
            ids_BT = torch.stack(some)
            if bos is not None:
                ids_BT[:, 0] = bos
            yield ids_BT


def _text_of(given: "Given", texts: list[str], length: int, windows: int, room: int | None) -> _Text:
    """As many of the windows asked for as there are, of as many documents as it can be."""
    from quantbench.interventions import too_short

    assert windows > 0
    given.check_length(length, room)
    if length < 2:
        raise ValueError(f"--length {length}: 2 or more is needed, so that a token is predicted")
    there: list[int] = []
    for text in texts:
        there.append(sum(1 for _ in itertools.islice(given.windows([text], length, bos=False), windows)))
        if sum(map(bool, there)) == windows:
            break
    if not any(there):
        raise ValueError(too_short(length))
    shares = [0] * len(there)
    while (left := min(windows, sum(there)) - sum(shares)) > 0:
        for number in [n for n, count in enumerate(there) if shares[n] < count][:left]:
            shares[number] += 1
    return _Text(given, texts, length, shares, _scored_bytes(given, texts, length, shares))


def _scored_bytes(given: "Given", texts: list[str], length: int, shares: list[int]) -> int | None:
    from quantbench.tokenbytes import bytes_up_to

    total = 0
    for text, share in zip(texts, shares, strict=False):
        if not share:
            continue
        _, up_to = bytes_up_to(given.tokenizer, text, split_special_tokens=True)  # as `Given.encode` reads it
        if up_to is None:
            return None
        total += sum(int(up_to[(n + 1) * length] - up_to[n * length + 1]) for n in range(share))
    return total


def _batch(given: "Given", length: int) -> int:
    """How many windows a pass holds: of scores some copies are made, most of them in float64."""
    config = given.model.config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "heads", 1)
    logits, scores = 8 * length * config.vocab_size, 40 * heads * length * length
    return max(1, min(BATCH, PASS // (logits + scores)))


def _measured(
    given: "Given",
    parts: "Anatomy",
    text: _Text,
    bos: int | None,
    main: bool,
    told: Callable[[int], None],
) -> Body:
    """One of the two ways: `side`, which is given for both; and, of the main one, what stands at the top."""
    from quantbench import catalog
    from quantbench.metrics import Metric
    from quantbench.trace import at_layers, hooked, observe
    from quantbench.watchers import Carriers, Largest, Loss

    names = catalog.names("metrics") if main else HEADLINES
    kinds = {name: catalog.load("metrics", name) for name in names}
    inside = {n for n, k in kinds.items() if k.attention is not Metric.attention or k.values is not Metric.values}
    metrics: dict[str, Metric] = {n: kind() for n, kind in kinds.items() if parts.heads or n not in inside}
    carriers, loss = Carriers(), Loss()
    largest = Largest(given.model, parts, given.about["dtype"])
    seen = 0

    def passing() -> "Iterator[Tensor]":
        nonlocal seen
        for ids_BT in text.batches(bos):
            told(seen)
            yield ids_BT
            seen += len(ids_BT)

    with hooked(largest.wires()), loss.of(given.model):
        observe(given.model, passing(), [*metrics.values(), carriers], parts)
    told(seen)

    readings = {name: at_layers(metric, parts) for name, metric in metrics.items()}
    layers = _layers(given, parts, carriers, metrics, readings)
    peak = _index(readings["residual-peak"].extra["layer"])
    k = _index(readings["sink-rate"].extra["k"]) if parts.heads else None
    mean = loss.total / loss.tokens
    at_peak = layers[peak] if peak is not None else dict.fromkeys(layers[0])
    side: Body = {
        "loss": _finite(mean),
        "perplexity": _finite(math.exp(mean)) if mean < 700 else None,
        "bits-per-byte": _finite(loss.total / math.log(2) / text.scored_bytes) if text.scored_bytes else None,
        "tokens": loss.tokens,
        **{name: readings[name].value if name in readings else None for name in HEADLINES},
        "layer": peak,
        **{name: at_peak[name] for name in ("norm", "median", "position", "token", "text", "feature", "value")},
        "sink": k,
        "sink-attention": _over_layers(layers, "sink-attention"),
        "sink-value-drain": _over_layers(layers, "value-drain"),
        "sink-delta-logit": _over_layers(layers, "delta-logit"),
        "largest": max(value for value, _, _ in largest.found.values()),
        "per-layer": {n: [at[n] for at in layers] for n in ("norm", "median", "sink-attention", "value-drain")},
    }
    if not main:
        return {"side": side}
    ids = text.batches(bos) if parts.heads else None
    return {
        "side": side,
        "residual-peak": side["residual-peak"],
        "layer": peak,
        "per-layer": layers,
        "metrics": {name: _as_in_records(readings.get(name)) for name in names},
        "sinks": {
            "k": k,
            **_sinks(given, metrics, ids, parts.front),
            "extreme": None if peak is None else _extreme(given, carriers, peak),
        },
        "overflow": _overflow(largest.found),
    }


def _layers(
    given: "Given",
    parts: "Anatomy",
    carriers: "Carriers",
    metrics: "dict[str, Metric]",
    readings: "dict[str, Reading]",
) -> list[Body]:
    """The figures of each layer."""
    ratios = readings["residual-peak"].per_layer
    found = []
    for layer, (largest, middle, bos, ratio) in enumerate(
        zip(carriers.largest.per_layer(), carriers.median.per_layer(), carriers.bos.per_layer(), ratios, strict=True)
    ):
        carrier = carriers.layers[layer].most_common()
        found.append({
            "layer": layer,
            "norm": _finite(largest),
            "median": _finite(middle),
            "ratio": _finite(ratio),
            "bos-norm": _finite(bos),
            "excess": _finite(readings["residual-peak"].extra.get(f"excess.{layer}")),
            **carrier,
            "text": None if carrier["token"] is None else _text(given, carrier["token"]),
            **_of_the_sink(layer, parts, metrics, readings),
        })  # fmt: skip
    return found


def _of_the_sink(layer: int, parts: "Anatomy", metrics: "dict[str, Any]", readings: "dict[str, Reading]") -> Body:
    """What a layer's heads do with the sink of the model, and with BOS; means over heads."""
    names = ("bos-attention", "sink-attention", "sink-rate", "value-drain", "value-drain-plain", "delta-logit")
    k = _index(readings["sink-rate"].extra["k"]) if "sink-rate" in readings else None
    if k is None or layer not in parts.heads:
        return dict.fromkeys(names)
    sink, drain, delta = metrics["sink-rate"], metrics["value-drain"], metrics["delta-logit"]
    return {
        "bos-attention": readings["bos-attention"].per_layer[layer],
        "sink-attention": _mean(sink.alphas.mean(layer)[:, k]),
        "sink-rate": readings["sink-rate"].per_layer[layer],
        "value-drain": _mean(drain.projected.mean(layer)[:, k]),
        "value-drain-plain": _mean(drain.plain.mean(layer)[:, k]),
        "delta-logit": _mean(delta.deltas.mean(layer)[:, k]),
    }


def _sinks(given: "Given", metrics: "dict[str, Any]", batches: "Iterator[Tensor] | None", front: int) -> Body:
    """The positions that some head parks at, most heads first, with the token that usually stands there."""
    if batches is None:
        return {"heads": None, "searched": None, "positions": None}
    from quantbench.metrics.sink_rate import EPSILON
    from quantbench.watchers import first

    hits_LHK, alphas_LHK = metrics["sink-rate"].hits.stacked(), metrics["sink-rate"].alphas.stacked()
    shares_K, drawn_K = hits_LHK.mean((0, 1)).tolist(), alphas_LHK.mean((0, 1)).tolist()
    heads_K = (alphas_LHK > EPSILON).sum((0, 1)).tolist()
    order = sorted(range(len(shares_K)), key=lambda k: (-shares_K[k], -drawn_K[k], k))
    chosen = [k for k in order if shares_K[k] > 0][:SINKS]
    tokens: dict[int, Counter[int]] = {k: Counter() for k in chosen if k >= front}
    for ids_BT in batches:  # once more, for these positions alone
        for k, counter in tokens.items():
            counter.update(ids_BT[:, k - front].tolist())
    positions = []
    for k in chosen:
        entry = {"position": k, "share": shares_K[k], "heads": heads_K[k], "attention": drawn_K[k], "token": None,
                 "text": None, "token-share": None}  # fmt: skip
        if stood := tokens.get(k):
            token = first(stood)
            entry |= _token(given, token) | {"token-share": stood[token] / stood.total()}
        positions.append(entry)
    return {"heads": hits_LHK.shape[0] * hits_LHK.shape[1], "searched": len(shares_K), "positions": positions}


def _extreme(given: "Given", carriers: "Carriers", layer: int) -> Body:
    """The extreme tokens after a block, by id, the most frequent first."""
    found = carriers.layers[layer]
    count = found.extreme_positions.total()
    tokens = []
    for token, seen in sorted(found.extreme.items(), key=lambda pair: (-pair[1].count, pair[0]))[:TOKENS]:
        known = token in carriers.occurrences  # learned tokens in front have no id
        tokens.append({
            **(_token(given, token) if known else {"token": None, "text": None}),
            "count": seen.count,
            "of": carriers.occurrences[token] if known else None,
            "first": seen.first,
            "last": seen.last,
        })  # fmt: skip
    at = sorted(found.extreme_positions.items(), key=lambda pair: (-pair[1], pair[0]))[:SINKS]
    return {
        "layer": layer,
        "per-window": count / carriers.sequences,
        "ids": len(found.extreme),
        "tokens": tokens,
        "positions": [{"position": position, "count": seen} for position, seen in at],
    }


def _overflow(found: dict[str, tuple[float, str, int | None]]) -> Body:
    """The largest number anywhere, at each kind of site, and which dtypes have room for it."""
    from quantbench.watchers import SITES

    keys = ("largest", "place", "layer")
    sites = {site: dict(zip(keys, found[site], strict=True)) for site in SITES if site in found}
    site = max(sites, key=lambda name: found[name][0])
    largest = found[site][0]
    rooms = {
        dtype: {"fits": largest <= most, "room": _finite(most / largest) if largest else None}
        for dtype, most in MAXIMA.items()
    }
    return {"site": site, **sites[site], "sites": sites, **rooms}


def _as_in_records(reading: "Reading | None") -> Body:
    if reading is None:
        return {"value": None, "per-layer": [], "extra": {}}
    extra = {name: _finite(number) for name, number in reading.extra.items()}
    return {"value": _finite(reading.value), "per-layer": [_finite(x) for x in reading.per_layer], "extra": extra}


def _token(given: "Given", token: int) -> Body:
    return {"token": token, "text": _text(given, token)}


def _text(given: "Given", token: int) -> str:
    return str(given.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _mean(x: "Tensor") -> float | None:
    """Of the heads at which it is defined."""
    return _finite(float(x.nanmean()))


def _over_layers(layers: list[Body], name: str) -> float | None:
    known = [at[name] for at in layers if at[name] is not None]
    return math.fsum(known) / len(known) if known else None


def _index(number: float | None) -> int | None:
    """A layer or position, among whose companions there are numbers of other kinds."""
    return None if number is None else int(number)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _peak_memory() -> int:
    """Of this process, since it began, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- showing ---------------------------------------------------------------------------------------------------------


def tables(record: Body) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of a record, for the terminal and for the page."""
    sides = {SIDES[way]: record[way] for way in SIDES if record[way] is not None}
    first = next(iter(sides))
    found = [
        (_heading(record), _signatures(sides)),
        (_layer_heading(record, first), _layer_table(record["per-layer"])),
    ]
    if sinks := record["sinks"]["positions"]:
        found.append(
            (f"Where heads park more than .3 of their attention, {first}", _sink_table(sinks, record["sinks"]["heads"]))
        )
    if (extreme := record["sinks"]["extreme"]) and extreme["tokens"]:
        title = (
            f"Extreme tokens after block {extreme['layer']}, {first}: {plain(extreme['per-window'])} a window, "
            f"{extreme['ids']:,} ids"
        )
        found.append((title, _extreme_table(extreme)))
    found.append((f"Largest numbers, {first}: {_room(record['overflow'])}", _overflow_table(record["overflow"])))
    found.append((f"Metrics, {first}", _metric_table(record["metrics"])))
    return found


def pictures(record: Body) -> dict[str, bytes]:
    """file name -> SVG."""
    from quantbench import figures

    sides = {SIDES[way]: record[way]["per-layer"] for way in SIDES if record[way] is not None}
    drawn = figures.by_layer(sides)
    return {} if drawn is None else {"measure-layers.svg": drawn}


def _heading(record: Body) -> str:
    windows, documents = (
        f"{record[name]} {name if record[name] > 1 else name[:-1]}" for name in ("windows", "documents")
    )
    return ". ".join([f"Signatures: {windows} of {record['length']} tokens from {documents}", *record["notes"]])


def _layer_heading(record: Body, way: str) -> str:
    told = f"Layer by layer, {way}: the largest norm, the median, and who carries the largest (the share of windows)"
    if (k := record["sinks"]["k"]) is None:
        return told
    return f"{told}; attention to position {k}, heads above .3 there, its value norm / others', its logit - others'"


def _signatures(sides: dict[str, Body]) -> Table:
    rows: list[tuple[str, Callable[[Body], str]]] = [
        ("loss, nats per token", lambda side: plain(side["loss"])),
        ("perplexity", lambda side: plain(side["perplexity"])),
        ("bits per byte", lambda side: plain(side["bits-per-byte"])),
        ("residual peak: largest norm / median", lambda side: plain(side["residual-peak"])),
        ("after block", lambda side: _whole(side["layer"])),
        ("largest norm there", lambda side: plain(side["norm"])),
        ("median norm there", lambda side: plain(side["median"])),
        ("carried at position", lambda side: _whole(side["position"])),
        ("by the token", lambda side: _shown(side["text"])),
        ("in the feature", lambda side: _whole(side["feature"])),
        ("which is", lambda side: plain(side["value"])),
        ("sink rate: share of heads", lambda side: plain(side["sink-rate"])),
        ("sink at position", lambda side: _whole(side["sink"])),
        ("attention to the sink", lambda side: plain(side["sink-attention"])),
        ("value norm of the sink / others", lambda side: plain(side["sink-value-drain"])),
        ("delta logit of the sink", lambda side: plain(side["sink-delta-logit"])),
        ("largest number anywhere", lambda side: plain(side["largest"])),
    ]
    return ["", *sides], [[name, *map(show, sides.values())] for name, show in rows]


def _layer_table(layers: list[Body]) -> Table:
    columns: dict[str, Callable[[Body], str]] = {
        "block": lambda at: str(at["layer"]),
        "norm": lambda at: plain(at["norm"]),
        "median": lambda at: plain(at["median"]),
        "ratio": lambda at: plain(at["ratio"]),
        "at": lambda at: _agreed(str(at["position"]), at["position-share"]),
        "token": lambda at: _agreed(_shown(at["text"]), at["token-share"]),
        "feature": lambda at: _agreed(str(at["feature"]), at["feature-share"]),
        "value": lambda at: plain(at["value"]),
    }
    if any(at["sink-attention"] is not None for at in layers):
        columns |= {
            "to sink": lambda at: plain(at["sink-attention"]),
            "heads": lambda at: plain(at["sink-rate"]),
            "drain": lambda at: plain(at["value-drain"]),
            "Δ logit": lambda at: plain(at["delta-logit"]),
        }
    return list(columns), [[show(at) for show in columns.values()] for at in layers]


def _sink_table(sinks: list[Body], heads: int) -> Table:
    rows = [
        [str(at["position"]), _shown(at["text"]), _percent(at["token-share"]), plain(at["share"]),
         f"{at['heads']} of {heads}", plain(at["attention"])]
        for at in sinks
    ]  # fmt: skip
    return ["position", "token", "stands there in", "share of heads", "by their mean", "attention"], rows


def _extreme_table(extreme: Body) -> Table:
    rows = [
        [_shown(seen["text"]), _whole(seen["token"]), f"{seen['count']:,}",
         NOTHING if seen["of"] is None else f"{seen['of']:,}", _between(seen["first"], seen["last"])]
        for seen in extreme["tokens"]
    ]  # fmt: skip
    return ["token", "id", "times extreme", "of", "at positions"], rows


def _overflow_table(overflow: Body) -> Table:
    rows = [
        [site.replace("-", " "), plain(found["largest"]), _whole(found["layer"]), found["place"]]
        for site, found in overflow["sites"].items()
    ]
    return ["site", "largest", "block", "module"], rows


def _metric_table(metrics: dict[str, Body]) -> Table:
    rows = [
        [name, plain(found["value"]), _whole(found["extra"].get("layer", found["extra"].get("k")))]
        for name, found in metrics.items()
    ]
    return ["metric", "value", "block or position"], rows


def _room(overflow: Body) -> str:
    told = []
    for dtype in MAXIMA:
        found = overflow[dtype]
        if not found["fits"]:
            told.append(f"{dtype} overflows, {plain(1 / found['room'])} times too large")
        elif found["room"] is None or found["room"] > 1e6:
            told.append(f"{dtype} holds them")
        else:
            told.append(f"{dtype} holds them with {plain(found['room'])} x room")
    return "; ".join(told)


def _whole(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f}%"


def _agreed(text: str, share: float) -> str:
    """With the share of windows that agree, where not all do."""
    return text if share == 1 else f"{text} ({_percent(share)})"


def _between(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _shown(text: str | None) -> str:
    """A token's text, in quotes and in one line."""
    return NOTHING if text is None else quote(text, 24)
