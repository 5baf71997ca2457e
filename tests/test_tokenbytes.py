"""The bytes of a text that tokens stand for, against the bytes that are plain from the tokens themselves."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantbench.tokenbytes import bytes_up_to

MIXED = "一 ½ naïve 👍🏽 a  b e\u0301 ﬁne, 的是在 über größer\n— x"
CHINESE = "".join(random.Random(0).choice("的一是在不了有和人这中大为上个国我以要他") for _ in range(200))
TEXTS = {"mixed": MIXED, "chinese": CHINESE, "ascii": "the cat sat on the mat", "empty": ""}


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level(vocab: int = 300, normalizer: Any = None, prefix: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([MIXED, CHINESE], trainer)
    return fast(tokenizer)


BYTES = [f"<0x{number:02X}>" for number in range(256)]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put in front, and what has no token is spelled in bytes."""
    vocab = {token: number for number, token in enumerate(["<unk>", *BYTES, *"▁abcdefnortuxhmsi,的"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As Gemma's kind, behind a normaliser that makes several characters of one."""
    pieces = [("<unk>", 0.0), *((token, -1.0) for token in [*BYTES, *"▁abcdefnortuxhmsi,的"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return fast(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """Drops spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "the": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "a token a byte": lambda: byte_level(256),
    "byte-level": byte_level,
    "byte-level, spaced": lambda: byte_level(prefix=True),
    "byte-level, composed": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, normalised": lambda: byte_level(normalizer=normalizers.NFKC()),
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "words": words,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_all_tokens_have_all_bytes_and_each_some_part(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids, up_to = bytes_up_to(tokenizer, TEXTS[text])
    assert ids == tokenizer.encode(TEXTS[text], add_special_tokens=False)
    assert up_to is not None
    assert len(up_to) == len(ids) + 1
    assert (up_to[1:] >= up_to[:-1]).all()
    assert up_to[-1] == len(TEXTS[text].encode()) if ids else up_to.tolist() == [0]


@pytest.mark.parametrize("kind", ["a token a byte", "byte-level"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_have_the_bytes_that_they_spell(kind: str, text: str) -> None:
    """Their alphabet has a character a byte."""
    ids, up_to = bytes_up_to(TOKENIZERS[kind](), TEXTS[text])
    spelled = [len(token) for token in TOKENIZERS[kind]().convert_ids_to_tokens(ids)]
    assert up_to is not None
    assert [int(b - a) for a, b in pairwise(up_to)] == spelled


def test_fallback_bytes_are_one_each_and_the_space_in_front_is_no_text() -> None:
    tokenizer = byte_fallback()
    ids, up_to = bytes_up_to(tokenizer, "一a 的")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0xE4>", "<0xB8>", "<0x80>", "a", "▁", "的"]
    assert up_to is not None
    assert up_to.tolist() == [0, 0, 1, 2, 3, 4, 5, 8]


def test_a_character_that_a_normaliser_made_another_counts_where_it_is_complete() -> None:
    tokenizer = unigram()
    ids, up_to = bytes_up_to(tokenizer, "a½")  # becomes 1⁄2, of five bytes that are not its two
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == ["<0x31>", "<0xE2>", "<0x81>", "<0x84>", "<0x32>"]
    assert up_to is not None
    assert up_to[-6:].tolist() == [1, 1, 1, 1, 1, 3]


def test_what_is_dropped_counts_with_the_token_behind_it() -> None:
    _, up_to = bytes_up_to(words(), "the  a ü")
    assert up_to is not None
    assert up_to.tolist() == [0, 3, 6, 9]


def test_without_offsets_nothing_is_said() -> None:
    class Slow:
        is_fast = False

        def encode(self, text: str, **how: Any) -> list[int]:
            return list(text.encode())

    assert bytes_up_to(Slow(), "aü") == ([97, 195, 188], None)
