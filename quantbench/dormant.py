"""Active-dormant heads: attention that is parked on the sink in one domain of text and at work in another.

Guo et al. (arXiv:2410.13835): a head is dormant on a domain where it looks at the sink token alone and the model does
as well without it, and active where zeroing it costs loss. Of every head and domain:

    attention    mean over queries from 32 on of A[i, sink]; the sink is BOS, or the first token where there is no BOS;
                 the position k <= T/2 that most heads park at (sink_rate.py) is stated beside it
    zeroed       loss without the head minus loss with it: its columns of the input of W_O are 0
    moved        the same where all of the head's attention stands on the sink: a dormant head is where it was

Means are over texts of a domain, one window each, of different documents; a domain of one document, as a text file is,
gives windows that do not overlap and are spread evenly over it. Losses are paired by text; limits are those of
Student's t at 95%, head by head, not adjusted for how many heads are looked at. Over windows of one document they speak
of that document alone: these are more alike than documents are. A head is

    dormant      in a domain where its attention is above PARKED and the limits of `zeroed` lie within +-NEGLIGIBLE
    active       where it is not dormant and the limits of `zeroed` lie above 0
    undecided    else: it costs nothing that can be shown, but neither is it parked, or the texts are too few

Heads that are intervened on are those whose attention differs most between two domains, either way in turn. Those that
are dormant in one domain and active in another come first.

Shapes: B texts, T tokens, L layers, H query heads.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from quantbench.markup import Table
from quantbench.numerals import NOTHING, plain, spread

if TYPE_CHECKING:
    from torch import Tensor

    from quantbench.anatomy import Anatomy
    from quantbench.pretrained import Given

Body = dict[str, Any]
Say = Callable[[str, int, int, str], None]
Head = tuple[int, int]  # layer, number in it

FIRST = 32  # queries before it see few other keys, so that the sink draws much of them in every head
SHORTEST = FIRST + 4  # tokens of a window
PARKED = 0.5  # attention
NEGLIGIBLE = 0.01  # nats per token
INTERVENTIONS = ("zeroed", "moved")


# --- measuring -------------------------------------------------------------------------------------------------------


def survey(
    given: "Given", domains: dict[str, list[str]], length: int, texts: int, top: int, say: Say = lambda *_: None
) -> Body:
    """The body of a record, fit for JSON; `run` in it are the facts of this run.

    `texts` (2 or more) windows of `length` tokens of each domain, or as many as it has documents so long; of one
    document, as many as it has. ValueError where that is fewer than two, for windows in which no query counts, and
    where the model shows no heads or gives no numbers.
    """
    from quantbench.anatomy import anatomy

    started = time.perf_counter()
    assert len(domains) > 1
    assert texts > 1
    parts = anatomy(given.model)
    if not parts.heads:
        raise ValueError("this model shows nothing of its attention: its heads cannot be told apart")
    most = parts.room or getattr(given.model.config, "max_position_embeddings", None)
    if most is not None and most < SHORTEST:
        raise ValueError(f"this model has positions for {most} tokens: its heads cannot be told apart, of which "
                         f"attention counts from query {FIRST} on")  # fmt: skip
    if length < SHORTEST:
        raise ValueError(f"--length {length}: attention counts from query {FIRST} on: take windows of {SHORTEST} or "
                         "more")  # fmt: skip
    read: dict[str, list[Tensor]] = {}
    of: dict[str, int] = {}
    for name, documents in domains.items():
        try:
            read[name], of[name] = _windows(given, documents, length, texts, parts.room)
        except ValueError as error:
            raise ValueError(f"domain {name}: {error}") from None
    seen = _look(given, parts, read, say)
    heads = _candidates({name: found["attention"] for name, found in seen.items()}, top)
    before = {name: found["losses"] for name, found in seen.items()}
    counts = [len(layer) for layer in next(iter(seen.values()))["attention"][0]]
    changes = _intervene(given, parts, read, before, heads, counts, say)
    found = [_head(head, seen, changes) for head in heads]
    found.sort(key=lambda at: (not at["contrasts"], -abs(at["difference"]), at["layer"], at["head"]))
    notes = [
        f"domain {name}: {len(windows)} {'documents' if of[name] > 1 else 'windows'} have {length} tokens, {texts} "
        "were asked for"
        for name, windows in read.items()
        if len(windows) < texts
    ]
    notes += [
        f"domain {name}: {len(windows)} windows of one document: limits are of that text"
        for name, windows in read.items()
        if of[name] < len(windows)
    ]
    if given.bos is None:
        notes.append("its tokenizer knows no BOS: the sink is the first token of the text")
    searched = next(iter(seen.values()))["searched"]
    if searched is not None and searched != parts.front:
        notes.append(f"most heads park at position {searched}, not at {parts.front}, of which all of this is")
    return {
        "length": length,
        "first-query": FIRST,
        "layers": len(parts.blocks),
        "heads": sum(counts),
        "sink": parts.front,
        "searched-sink": searched,
        "parked": PARKED,
        "negligible": NEGLIGIBLE,
        "domains": {name: _domain(found, len(read[name]), of[name]) for name, found in seen.items()},
        "candidates": found,
        "notes": notes,
        "run": {"seconds": round(time.perf_counter() - started, 1)},
    }


def _windows(
    given: "Given", documents: list[str], length: int, texts: int, room: int | None
) -> "tuple[list[Tensor], int]":
    """Windows behind BOS, as many as are asked for or there are; and of how many documents.

    The first window of each document; of one document alone, windows that are spread evenly over it.
    """
    from quantbench.interventions import windows_of

    first = windows_of(given, documents, length, texts, room, each=1, least=SHORTEST)
    if len(first) > 1:
        return first, len(first)
    every = [ids_T for _, ids_T in given.windows(documents, length)]  # all of one document: the others fill none
    if len(every) < 2:
        shorter = ", or shorter windows (--length)" if length > SHORTEST else ""
        raise ValueError(
            f"its text fills one window of {length} tokens, two are needed for an interval: give longer text{shorter}"
        )
    count = min(texts, len(every))
    return [every[i * len(every) // count] for i in range(count)], 1


def _look(given: "Given", parts: "Anatomy", read: "dict[str, list[Tensor]]", say: Say) -> dict[str, Body]:
    """Domain -> the losses of its texts, the attention [text][layer][head], and the sink that a search finds in all."""
    import torch

    from quantbench.anatomy import device_of
    from quantbench.interventions import losses
    from quantbench.metrics import LayerMean
    from quantbench.metrics.sink_rate import EPSILON, received, searched
    from quantbench.trace import full_precision, hooked, remedy

    hits, alphas = LayerMean(), LayerMean()  # over all domains
    count, done = sum(map(len, read.values())), 0
    found: dict[str, Body] = {}
    for name, windows in read.items():
        found[name] = {"losses": [], "attention": []}
        for ids_T in windows:
            say("look", done, count, name)
            layers: dict[int, list[float]] = {}

            def see(layer: int, weights_BHTS: "Tensor", layers: dict[int, list[float]] = layers) -> None:
                parked_BH = weights_BHTS[:, :, parts.front + FIRST :, parts.front].mean(-1, dtype=torch.float64)
                layers[layer] = parked_BH[0].tolist()
                alphas_BHK = received(weights_BHTS)
                alphas.add(layer, alphas_BHK)
                hits.add(layer, (alphas_BHK > EPSILON).double())

            wires = [(heads.weights, partial(see, layer), False) for layer, heads in parts.heads.items()]
            ids_BT = ids_T[None].to(device_of(given.model))
            with full_precision(given.model), hooked(wires):
                (loss,) = losses(given.model(ids_BT).logits, ids_BT).tolist()
            attention = [layers.get(layer, []) for layer in range(len(parts.blocks))]
            if not math.isfinite(loss) or not all(math.isfinite(x) for x in itertools.chain(*attention)):
                dtype = given.about["dtype"]
                raise ValueError(f"domain {name}: the model gives NaN or infinity in {dtype}: {remedy(dtype)}")
            found[name]["losses"].append(loss)
            found[name]["attention"].append(attention)
            done += 1
    say("look", done, count, "")
    k = searched(hits.stacked().mean((0, 1)), alphas.stacked().mean((0, 1)))
    for name in found:
        found[name]["searched"] = k
    return found


def _candidates(attention: dict[str, list[list[list[float]]]], top: int) -> list[Head]:
    """The heads that differ most between two domains: the first of each ordered pair in turn, then the second, ..."""
    means = {name: _mean_of(texts) for name, texts in attention.items()}
    orders = []
    for one, other in itertools.permutations(means, 2):
        differences = {head: means[one][head] - means[other][head] for head in means[one]}
        orders.append(sorted((h for h in differences if differences[h] > 0), key=lambda h: (-differences[h], h)))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*orders))
    return list(dict.fromkeys(head for head in turns if head is not None))[:top]


def _mean_of(texts: list[list[list[float]]]) -> dict[Head, float]:
    return {
        (layer, head): math.fsum(text[layer][head] for text in texts) / len(texts)
        for layer, heads in enumerate(texts[0])
        for head in range(len(heads))
    }


def _intervene(
    given: "Given",
    parts: "Anatomy",
    read: "dict[str, list[Tensor]]",
    before: dict[str, list[float]],
    heads: list[Head],
    counts: list[int],
    say: Say,
) -> dict[tuple[str, Head, str], list[float]]:
    """(domain, head, intervention) -> the change of the loss of each text.

    Text by text and layer by layer: what a layer reads is computed once, and kept for this text alone.
    """
    from quantbench.interventions import Relay
    from quantbench.trace import full_precision

    changes: dict[tuple[str, Head, str], list[float]] = {}
    count, done = sum(map(len, read.values())) * len(heads), 0
    for name, windows in read.items():
        for ids_T, loss in zip(windows, before[name], strict=True):
            with full_precision(given.model):
                relay = Relay(given.model, parts, ids_T[None])
                for layer, head in sorted(heads):
                    say("intervene", done, count, f"{name}, {_label((layer, head))}")
                    relay.advance(layer)
                    for kind, intervention in _interventions(parts, (layer, head), counts[layer]):
                        with intervention:
                            (after,) = relay.losses().tolist()
                        changes.setdefault((name, (layer, head), kind), []).append(after - loss)
                    done += 1
    say("intervene", done, count, "")
    return changes


def _interventions(parts: "Anatomy", head: Head, count: int) -> Iterator[tuple[str, Any]]:
    from quantbench.interventions import moved, zeroed

    heads, number = parts.heads[head[0]], head[1]
    yield "zeroed", zeroed(heads, number, count)
    yield "moved", moved(heads, number, parts.front)


def _head(head: Head, seen: dict[str, Body], changes: dict[tuple[str, Head, str], list[float]]) -> Body:
    """What is known of a head that was intervened on."""
    layer, number = head
    domains: dict[str, Body] = {}
    for name, found in seen.items():
        attention = _interval([text[layer][number] for text in found["attention"]])
        costs = {kind: _interval(changes[name, head, kind]) for kind in INTERVENTIONS}
        domains[name] = {"attention": attention, **costs, "verdict": verdict(attention["mean"], costs["zeroed"])}
    pairs = itertools.permutations(domains, 2)
    contrasts = [
        {"dormant": one, "active": other}
        for one, other in pairs
        if (domains[one]["verdict"], domains[other]["verdict"]) == ("dormant", "active")
    ]
    one, other = max(
        itertools.combinations(domains, 2),
        key=lambda pair: abs(domains[pair[0]]["attention"]["mean"] - domains[pair[1]]["attention"]["mean"]),
    )
    difference = domains[one]["attention"]["mean"] - domains[other]["attention"]["mean"]
    return {"layer": layer, "head": number, "difference": difference, "contrasts": contrasts, "domains": domains}


def verdict(attention: float, zeroed: Body) -> str:
    """dormant, active or undecided, from the mean attention to the sink and {mean, low, high} of the loss change."""
    if attention > PARKED and zeroed["low"] >= -NEGLIGIBLE and zeroed["high"] <= NEGLIGIBLE:
        return "dormant"
    return "active" if zeroed["low"] > 0 else "undecided"


def _domain(found: Body, texts: int, documents: int) -> Body:
    """The loss of a domain, and the mean and limits of every head's attention, [layer][head]."""
    layers = found["attention"][0]
    intervals = [
        [_interval([text[layer][head] for text in found["attention"]]) for head in range(len(layers[layer]))]
        for layer in range(len(layers))
    ]
    attention = {key: [[round(at[key], 6) for at in heads] for heads in intervals] for key in ("mean", "low", "high")}
    several = {"documents": documents} if documents < texts else {}
    return {"texts": texts, **several, "loss": _interval(found["losses"]), "attention": attention}


def _interval(values: list[float]) -> Body:
    from quantbench.stats import t_interval

    found = t_interval(values)
    assert found is not None, "a domain has two texts or more"
    return asdict(found)


# --- showing ---------------------------------------------------------------------------------------------------------


def tables(record: Body) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of a record, for the terminal and for the page."""
    domains, heads = list(record["domains"]), record["candidates"]
    contrasting = sum(bool(at["contrasts"]) for at in heads)
    told = (
        f"Heads whose attention to the sink differs most between domains: {contrasting} of {len(heads)} dormant in one "
        f"and active in another. Attention: of queries from {record['first-query']} on to position {record['sink']}; "
        f"zeroed, moved: change of the loss in nats per token, ± 95% over texts; dormant: attention above "
        f"{record['parked']} and zeroed within ±{record['negligible']}, active: zeroed above 0"
    )
    columns = [f"{what}, {name}" for what in ("attention", "zeroed", "moved") for name in domains]
    rows = []
    for at in heads:
        found = [at["domains"][name] for name in domains]
        cells = [spread(one["attention"], 3, sign=False) for one in found]
        cells += [spread(one[kind]) for kind in INTERVENTIONS for one in found]
        rows.append([_label((at["layer"], at["head"])), *cells, *(one["verdict"] for one in found)])
    found = [(". ".join([_heading(record), *record["notes"]]), _domain_table(record))]
    if rows:
        found.append((told, (["head", *columns, *domains], rows)))
    return found


def pictures(record: Body) -> dict[str, bytes]:
    """file name -> SVG."""
    from quantbench import figures

    one, other = list(record["domains"])[:2]
    attention = [record["domains"][name]["attention"]["mean"] for name in (one, other)]
    differences = [[a - b for a, b in zip(*heads, strict=True)] for heads in zip(*attention, strict=True)]
    framed = [(at["layer"], at["head"], bool(at["contrasts"])) for at in record["candidates"]]
    drawn = {"heads-map.svg": figures.head_map(differences, framed, (one, other))}
    rows = {_label((at["layer"], at["head"])): at["domains"] for at in record["candidates"]}
    if rows:
        drawn["heads-forest.svg"] = figures.forest(rows, list(record["domains"]), INTERVENTIONS)
    return drawn


def _heading(record: Body) -> str:
    counts = ", ".join(f"{found['texts']} of {name}" for name, found in record["domains"].items())
    different = "" if any("documents" in found for found in record["domains"].values()) else " of different documents"
    searched = record["searched-sink"]
    return (
        f"Heads: windows of {record['length']} tokens{different} ({counts}); sink: position "
        f"{record['sink']} (found by search: {NOTHING if searched is None else searched})"
    )


def _domain_table(record: Body) -> Table:
    rows = []
    for name, found in record["domains"].items():
        means = list(itertools.chain(*found["attention"]["mean"]))
        parked = sum(mean > record["parked"] for mean in means)
        rows.append([name, str(found["texts"]), spread(found["loss"], 3, sign=False),
                     plain(math.fsum(means) / len(means)), f"{parked} of {len(means)}"])  # fmt: skip
    return ["domain", "texts", "loss, nats per token", "attention to the sink", f"heads above {record['parked']}"], rows


def _label(head: Head) -> str:
    return f"L{head[0]}H{head[1]}"
