"""Hadamard rotation of the residual stream: no feature stands out for longer (QuaRot, arXiv:2404.00456).

    x' = x Q,    Q = diag(random signs) H / sqrt(D),    H a Hadamard matrix (entries +-1, H H^T = D I)

RMS norms without a gain commute with a rotation. So the gains go into the Linears that read the norms, and then the
embeddings, whatever writes the stream, whatever reads it, and the head are multiplied by Q. The same is done with the
input of each MLP's last Linear, on which Q stands in front as a matrix product: the nonlinearity before it is no linear
map. One outlier of size c becomes D entries of c / sqrt(D).

What it changes: the weights of every Linear, the embeddings and the gains, but not the function. A LayerNorm becomes an
RMS norm first: the writers lose their mean (SliceGPT, arXiv:2401.15024), its bias goes to the readers. Tied embeddings
are untied.
What it costs: all is folded at inference but the rotation in front of the MLP's last Linear (K log K additions a token
as a fast transform, K^2 products here).

How it differs from QuaRot. Values and keys are not rotated head by head. Where no Hadamard matrix of the order is made
here (Sylvester's and Paley's are: any power of 2 times q + 1, q a prime of 3 mod 4), a random orthogonal one stands in.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from quantbench.anatomy import Anatomy, Stream, anatomy, bar_saving, replace, untie
from quantbench.calibration import Calibration
from quantbench.mitigations import Mitigation, Prepared, fold_projection, rewrite


@dataclass(frozen=True)
class Hadamard(Mitigation):
    seed: int = 0  # of the signs

    def prepare(self, model: nn.Module, calibration: Calibration) -> Prepared:
        parts = anatomy(model)
        if parts.stream is None:
            raise ValueError("hadamard: not applicable: the Linears of this model have no norm in front")
        stream, generator = parts.stream, Generator().manual_seed(self.seed)

        def change() -> None:
            fold(model, parts, stream)
            rotate_stream(parts, stream, rotation(parts.table.embedding_dim, generator))
            for down in stream.downs:
                replace(model, down, Rotated(down, rotation(down.in_features, generator)))

        rewrite("hadamard", model, calibration, change)
        bar_saving(model)
        return Prepared(model)


class Rotated(nn.Module):
    """A Linear whose input is rotated first, and whose weights are in the rotated basis: the same function."""

    rotation_KK: Tensor

    def __init__(self, linear: nn.Linear, rotation_KK: Tensor) -> None:
        super().__init__()
        _set(linear.weight, linear.weight.double() @ rotation_KK.to(linear.weight.device))
        self.linear = linear
        self.register_buffer("rotation_KK", rotation_KK.to(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x @ self.rotation_KK)


# --- in a model ------------------------------------------------------------------------------------------------------


def fold(model: Any, parts: Anatomy, stream: Stream) -> None:
    """Leaves nothing between the stream and its readers but RMS norms without a gain."""
    fold_projection(model)
    untie(model)
    norms = [*stream.norms, (stream.last, [parts.head])]
    if any(isinstance(norm, nn.LayerNorm) for norm, _ in norms):
        _centre(stream)
    for norm, readers in norms:
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        for reader in readers if bias is not None else ():
            shift_N = reader.weight.double() @ bias.double()
            shift_N += 0.0 if reader.bias is None else reader.bias.double()
            reader.bias = nn.Parameter(shift_N.to(reader.weight.dtype))
        for reader in readers if gain is not None else ():
            _set(reader.weight, reader.weight.double() * gain.double())
        if isinstance(norm, nn.LayerNorm):
            plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps).to(parts.table.weight)
            replace(model, norm, plain)
        elif gain is not None:
            gain.fill_(1.0)


def _centre(stream: Stream) -> None:
    """The mean over the features of the stream is 0: a LayerNorm takes it out anyway."""
    for table in stream.tables:
        _set(table.weight, table.weight.double() - table.weight.double().mean(1, keepdim=True))
    for writer in stream.writers:
        _set(writer.weight, writer.weight.double() - writer.weight.double().mean(0))
        if writer.bias is not None:
            _set(writer.bias, writer.bias.double() - writer.bias.double().mean())


def rotate_stream(parts: Anatomy, stream: Stream, rotation_DD: Tensor) -> None:
    """Writes and reads the stream in another orthonormal basis."""
    q_DD = rotation_DD.to(parts.table.weight.device)
    for table in stream.tables:
        _set(table.weight, table.weight.double() @ q_DD)
    for writer in stream.writers:
        _set(writer.weight, q_DD.T @ writer.weight.double())
        if writer.bias is not None:
            _set(writer.bias, writer.bias.double() @ q_DD)
    for reader in [parts.head, *(reader for _, readers in stream.norms for reader in readers)]:
        _set(reader.weight, reader.weight.double() @ q_DD)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


# --- matrices --------------------------------------------------------------------------------------------------------


def rotation(order: int, generator: Generator) -> Tensor:
    """A random orthogonal matrix, float64: Hadamard's where there is one, all of whose entries are of one size."""
    found = hadamard(order)
    if found is None:
        return torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
    signs = torch.randint(2, (order, 1), generator=generator) * 2 - 1
    return signs * found / order**0.5


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64: Sylvester's doubling of Paley's first construction, or of [1]; else None."""
    half, doublings = order, 0
    while half > 1 and not _paley(half):
        if half % 2:
            return None
        half, doublings = half // 2, doublings + 1
    found = paley(half - 1) if half > 1 else torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found


def _paley(order: int) -> bool:
    q = order - 1
    return q % 4 == 3 and all(q % factor for factor in range(2, int(q**0.5) + 1))


def paley(q: int) -> Tensor:
    """Of order q + 1, q a prime of 3 mod 4: I + S, S skew, with the quadratic residues of j - i in its core."""
    residues = torch.zeros(q, dtype=torch.float64).index_fill(0, torch.arange(1, q) ** 2 % q, 2.0) - 1
    residues[0] = 0.0
    places = torch.arange(q)
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1.0, -1.0
    s[1:, 1:] = residues[(places - places[:, None]) % q]
    return s + torch.eye(q + 1, dtype=torch.float64)
