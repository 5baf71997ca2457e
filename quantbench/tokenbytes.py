"""Which bytes of a text its tokens stand for: what bits per byte divide by.

A window of tokens seldom ends where a character does, and what is decoded of half a character is another one. So bytes
are not those of decoded windows but of the text itself, cut where the tokens are:

    - a token's bytes (UTF-8) reach from where the one before it ends to its own end, by the offsets that the tokenizer
      gives. What it drops of a text, such as spaces or accents, counts with the token that follows;
    - of a character that several tokens share each has the bytes that it spells: those of a byte-level token, the one
      of a byte-fallback token (<0xE4>). Where these do not add up to the character, as when a normaliser has made
      another one of it, all of it counts with the token that completes it.

So the bytes of all tokens of a text add up to it, however it is cut into windows. A tokenizer without offsets (none of
the `tokenizers` library) gives None, and so no bits per byte.
"""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def bytes_up_to(tokenizer: Any, text: str, **how: Any) -> tuple[list[int], NDArray[np.int64] | None]:
    """The ids of a text, without special tokens around it, and how many of its bytes those before each stand for.

    The second is [tokens + 1], so that ids[a:b] stand for found[b] - found[a] bytes. `how` goes to the tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer.encode(text, add_special_tokens=False, **how)), None
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **how)
    ids: list[int] = found["input_ids"]
    if not ids:
        return ids, np.zeros(1, np.int64)
    offsets = np.array(found["offset_mapping"], np.int64)
    starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
    at = _bytes_before(text)  # of each character
    up_to = np.concatenate(([0], at[ends]))
    shared = np.flatnonzero(starts[1:] < ends[:-1])  # of whose last character the next token has a part
    if len(shared):
        spelled = _Spelled(tokenizer)
        for first, last in _runs(shared.tolist()):
            own = [spelled.bytes_of(token) for token in ids[first : last + 1]]
            begin = int(at[starts[first]])
            whole = sum(own) == at[ends[last]] - begin
            before = int(up_to[first])  # where it is not known who has what, the last token has all
            up_to[first + 1 : last + 1] = begin + np.cumsum(own[:-1]) if whole else before
    return ids, up_to


def _runs(shared: list[int]) -> list[tuple[int, int]]:
    """(first, last) of the tokens that hang together, from those that share a character with the next."""
    found: list[tuple[int, int]] = []
    for number in shared:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _bytes_before(text: str) -> NDArray[np.int64]:
    """How many UTF-8 bytes stand before each character, and in all, [characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))


class _Spelled:
    """How many bytes a token spells out: 0 for one that spells characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.byte_level = _names_byte_level(json.loads(tokenizer.backend_tokenizer.to_str()))
        self.known: dict[int, int] = {}

    def bytes_of(self, token: int) -> int:
        if token not in self.known:
            spelling = str(self.tokenizer.convert_ids_to_tokens(token))
            # The alphabet of a byte-level tokenizer has one character a byte.
            self.known[token] = len(spelling) if self.byte_level else int(bool(FALLBACK.fullmatch(spelling)))
        return self.known[token]


def _names_byte_level(part: Any) -> bool:
    """Whether a `tokenizers` JSON spells bytes as characters."""
    parts = [part.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        found = parts.pop()
        if isinstance(found, dict):
            if found.get("type") == "ByteLevel":
                return True
            for name in ("normalizers", "pretokenizers", "decoders"):
                parts += found.get(name, [])
    return False
