"""What is done to a model that somebody trained, to see what a part of it is for, and what that costs in loss.

    silenced    what a sublayer adds to the residual stream is 0
    zeroed      a head adds nothing: its columns h*E..(h+1)*E of the input of W_O are 0
    moved       all the attention of a head stands on one position, for every query that can see it

A part is changed by hooks, which are always removed; no weight is touched. What stands in front of the changed block is
computed once (`Relay`).

Shapes: B sequences, T tokens, H query heads, E features of a head, S keys, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantbench.anatomy import Anatomy, Heads, device_of
from quantbench.trace import token_losses

if TYPE_CHECKING:
    from quantbench.pretrained import Given


# --- text ------------------------------------------------------------------------------------------------------------


SHORTEST = 4  # tokens of a window, as the verbs take it


def too_short(length: int, least: int = SHORTEST) -> str:
    """That no text fills a window, and what helps; `least`: tokens that a window must have."""
    remedy = ", or shorter windows (--length)" if length > least else ""
    return f"no document has {length} tokens: give longer text{remedy}"


def windows_of(
    given: "Given",
    documents: Sequence[str],
    length: int,
    count: int,
    room: int | None,
    each: int | None = None,
    least: int = SHORTEST,
) -> list[Tensor]:
    """Ids [T] of `count` windows behind BOS, or as many as there are: the first of each document, then more of each.

    At most `each` of a document. Ids are kept, which are far smaller than the text that they are of. ValueError where
    there is none, or the model has no positions for so many tokens.
    """
    given.check_length(length, room)
    found: list[Tensor] = []
    going: Any = (given.windows([text], length) for text in documents)
    rounds = 0
    while len(found) < count and (each is None or rounds < each):
        left = []
        for windows in going:
            if (window := next(windows, None)) is None:
                continue
            found.append(window[1])
            left.append(windows)
            if len(found) == count:
                break
        if not left:
            break
        going, rounds = left, rounds + 1
    if not found:
        raise ValueError(too_short(length, least))
    return found


def losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """The mean loss of the tokens that are predicted, nats, of each sequence, [B] in float64."""
    return token_losses(logits_BTV[:, :-1], ids_BT[:, 1:]).double().mean(-1).cpu()


# --- passes ----------------------------------------------------------------------------------------------------------


class _ArrivedError(Exception):
    """Ends a pass at the block that it was made for."""


class Relay:
    """A batch on its way through a model. Passes begin at block `start`: those before it hand on what they gave.

    What they gave is kept of the last of them alone. To be used within `trace.full_precision`: a cache would be filled
    by some blocks and not by others.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, ids_BT: Tensor) -> None:
        self.model, self.blocks = model, parts.blocks
        self.ids_BT = ids_BT.to(device_of(model))
        self.start = 0
        self._given: Any = None  # the output of block start - 1

    def advance(self, layer: int) -> None:
        """Lets the passes that follow begin at a later block."""
        assert layer >= self.start
        if layer == self.start:
            return
        found = []

        def arrive(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _ArrivedError

        last = self.blocks[layer - 1]
        with self._handing_on(), last.register_forward_hook(arrive), suppress(_ArrivedError):
            self.model(self.ids_BT)
        (self._given,), self.start = found, layer

    def losses(self) -> Tensor:
        """Of a pass from there, [B]."""
        with self._handing_on():
            return losses(self.model(self.ids_BT).logits, self.ids_BT)

    @contextmanager
    def _handing_on(self) -> Iterator[None]:
        skipped: list[Any] = self.blocks[: self.start]
        former = [vars(block).get("forward") for block in skipped]  # accelerate puts one of its own there
        given = self._given
        for block in skipped:
            block.forward = lambda *args, **kwargs: given
        try:
            yield
        finally:
            for block, own in zip(skipped, former, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own


# --- interventions ---------------------------------------------------------------------------------------------------


def stream(output: Any) -> Tensor:
    """What a module hands on: its output, or the first of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_stream(output: Any, x: Tensor) -> Any:
    """The output of a module with something else in that place."""
    return (x, *output[1:]) if isinstance(output, tuple) else x


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Within it, the module's output (or the first of a tuple) is 0."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return with_stream(output, torch.zeros_like(stream(output)))

    with module.register_forward_hook(after):
        yield


@contextmanager
def zeroed(heads: Heads, head: int, count: int) -> Iterator[None]:
    """Within it, one of the `count` heads of a layer adds nothing to the stream."""
    features = heads.output.in_features // count
    columns = slice(head * features, (head + 1) * features)

    def before(module: nn.Module, args: Any) -> Any:
        x = args[0].clone()
        x[..., columns] = 0
        return (x, *args[1:])

    with heads.output.register_forward_pre_hook(before):
        yield


@contextmanager
def moved(heads: Heads, head: int, position: int) -> Iterator[None]:
    """Within it, all the attention of a head stands on one position, for the queries from there on.

    All: what a query's weights sum to, which a form other than softmax may leave below or above 1; learned keys' share
    is moved, too. A window that would hide the position from a query does not.
    """

    def after(module: nn.Module, args: Any, weights_BHTS: Tensor) -> Tensor:
        weights_BHTS = weights_BHTS.clone()
        mass_BT = weights_BHTS[:, head, position:].sum(-1)
        weights_BHTS[:, head, position:] = 0
        weights_BHTS[:, head, position:, position] = mass_BT
        return weights_BHTS

    with heads.weights.register_forward_hook(after):
        yield
