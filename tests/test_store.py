"""The store: whole or absent under SIGKILL, every flipped bit noticed, one writer per key."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.store import Store, atomic_write, check_writable, digest

INPUTS = {"recipe": {"name": "baseline", "lr": 3e-3}, "seed": 0, "versions": {"trace": 1}}
FILES = {"weights.safetensors": bytes(range(256)) * 8, "losses.json": b"[[0, 4.2]]\n"}


def finished(store: Store, inputs: dict[str, object] | None = None) -> Path:
    with store.cell("pretrain", inputs or INPUTS) as cell:
        return cell.commit(FILES)


def interrupted(store: Store, inputs: dict[str, object]) -> None:
    """A run that ends before its commit."""
    with store.cell("pretrain", inputs) as cell:
        (cell.work / "step-500").write_bytes(b"weights")


def strays(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.name.startswith(".tmp-") or p.suffix == ".work")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child that runs `code` after the imports; it prints a line when it is ready."""
    head = "import sys, itertools, time\nfrom pathlib import Path\nfrom quantbench.store import Store, atomic_write\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at_random(code: str, path: Path, generator: random.Random, longest: float = 0.03) -> None:
    with start(code, path) as child:
        assert (child.stdout and child.stdout.readline()) == "ready\n"
        time.sleep(generator.uniform(0, longest))
        child.send_signal(signal.SIGKILL)


# --- cells ---------------------------------------------------------------------------------------------------------


def test_a_committed_cell_is_found_again_with_its_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load("pretrain", INPUTS) is None
    with store.cell("pretrain", INPUTS) as cell:
        assert cell.path is None
        (cell.work / "step-500").write_bytes(b"partial")
        copied = cell.work / "copied"
        copied.write_bytes(b"x" * 3_000_000)
        assert cell.commit({**FILES, "copied": copied}) == cell.path
    path = Store(tmp_path).load("pretrain", dict(reversed(INPUTS.items())))
    assert path is not None
    assert path == cell.path
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "cell.json"} == {
        **FILES,
        "copied": b"x" * 3_000_000,
    }
    assert strays(tmp_path) == []


def test_partial_work_survives_until_the_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, INPUTS)
    assert store.load("pretrain", INPUTS) is None
    with store.cell("pretrain", INPUTS) as cell:
        assert (cell.work / "step-500").read_bytes() == b"weights"
        cell.commit(FILES)
    assert strays(tmp_path) == []


def test_a_run_that_left_no_partial_work_leaves_no_folder(tmp_path: Path) -> None:
    with Store(tmp_path).cell("pretrain", INPUTS) as cell:
        assert list(cell.work.iterdir()) == []
    assert strays(tmp_path) == []


def test_changing_any_field_changes_the_key(tmp_path: Path) -> None:
    variants: list[dict[str, object]] = [
        INPUTS,
        {**INPUTS, "seed": 1},
        {**INPUTS, "seed": 0.0},
        {**INPUTS, "seed": "0"},
        {**INPUTS, "seed": None},
        {**INPUTS, "seed": False},
        {**INPUTS, "seed": [0]},
        {**INPUTS, "recipe": {"name": "baseline", "lr": 3.0000000000000005e-3}},
        {**INPUTS, "recipe": {"name": "baseline "}},
        {**INPUTS, "versions": {"trace": 1, "store": 1}},
        {"recipe": INPUTS["recipe"], "seed": 0},
    ]
    store = Store(tmp_path)
    for inputs in variants:
        assert store.load("pretrain", inputs) is None, inputs
        finished(store, inputs)
    assert store.load("quantize", INPUTS) is None
    assert len({digest(inputs) for inputs in variants}) == len(variants)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(trees, trees)
def test_digests_are_equal_only_for_equal_values(left: object, right: object) -> None:
    assert (digest(left) == digest(right)) == (repr_of(left) == repr_of(right))


def repr_of(value: object) -> str:
    """An independent canonical form: equal for equal JSON values of equal types."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{repr_of(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(repr_of, value)) + "]"
    return repr(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: "a"}, {"a": b"bytes"}, {"a": {2}}])
def test_what_json_cannot_hold_exactly_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON|must be text"):
        Store(tmp_path).load("pretrain", {"value": value})


@pytest.mark.parametrize("stage", ["", "..", "a/b", "/etc", "Pretrain", ".hidden", "a" * 65, "a\n"])
def test_hostile_stage_names_are_refused(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match="stage"):
        Store(tmp_path).load(stage, INPUTS)


@pytest.mark.parametrize("name", ["", "..", "../evil", "a/b", "cell.json", ".hidden", "a\0b"])
def test_hostile_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with Store(tmp_path).cell("pretrain", INPUTS) as cell, pytest.raises(ValueError, match="cannot hold"):
        cell.commit({name: b""})


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    store = Store(tmp_path / "store")
    store.root.mkdir()
    (store.root / "pretrain").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out"):
        store.load("pretrain", INPUTS)
    (store.root / "pretrain").unlink()
    path = finished(store)
    (outside / "losses.json").write_bytes(FILES["losses.json"])
    (path / "losses.json").unlink()
    (path / "losses.json").symlink_to(outside / "losses.json")
    assert store.load("pretrain", INPUTS) is None
    assert (outside / "losses.json").exists()


# --- corruption ----------------------------------------------------------------------------------------------------


def damages() -> list[tuple[str, Callable[[bytes, random.Random], bytes]]]:
    def flip(data: bytes, generator: random.Random) -> bytes:
        at = generator.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]

    def truncate(data: bytes, generator: random.Random) -> bytes:
        return data[: generator.randrange(len(data))]

    def extend(data: bytes, generator: random.Random) -> bytes:
        return data + generator.randbytes(1 + generator.randrange(4))

    return [("flip", flip), ("truncate", truncate), ("extend", extend)]


@pytest.mark.parametrize(("kind", "damage"), damages())
def test_every_corruption_is_noticed(
    tmp_path: Path, kind: str, damage: Callable[[bytes, random.Random], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(kind)
    store = Store(tmp_path)
    path = finished(store)
    good = tmp_path / "good"
    shutil.copytree(path, good)
    for name in sorted(p.name for p in good.iterdir()):
        for _ in range(60):
            data = (good / name).read_bytes()
            (path / name).write_bytes(damage(data, generator))
            assert store.load("pretrain", INPUTS) is None
            assert not path.exists()
            assert capsys.readouterr().err.count("\n") == 1
            shutil.copytree(good, path)
            assert store.load("pretrain", INPUTS) == path


def test_a_missing_a_foreign_and_a_swapped_file_are_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = finished(store)
    (path / "losses.json").unlink()
    assert store.load("pretrain", INPUTS) is None
    (finished(store) / "extra").touch()
    assert store.load("pretrain", INPUTS) is None
    other = finished(store, {**INPUTS, "seed": 1})
    other.rename(path)
    assert store.load("pretrain", INPUTS) is None, "a whole cell of other inputs under this key"


def test_a_corrupted_cell_is_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (finished(store) / "losses.json").write_bytes(b"wrong")
    with store.cell("pretrain", INPUTS) as cell:
        assert cell.path is None
        cell.commit(FILES)
    assert store.load("pretrain", INPUTS) is not None


# --- kills ---------------------------------------------------------------------------------------------------------

SIZE = 1 << 20
WRITER = """
path = Path(sys.argv[1])
print("ready", flush=True)
for version in itertools.cycle(range(256)):
    WRITE
"""
SAFE = WRITER.replace("WRITE", f"atomic_write(path, bytes([version]) * {SIZE})")
NAIVE = WRITER.replace("WRITE", f"path.write_bytes(bytes([version]) * {SIZE})")


def whole(path: Path) -> bool:
    data = path.read_bytes()
    return len(data) == SIZE and data == data[:1] * SIZE


def test_a_killed_writer_leaves_old_or_new_bytes(tmp_path: Path) -> None:
    path, generator = tmp_path / "seed-0.json", random.Random(0)
    atomic_write(path, bytes(SIZE))
    for _ in range(15):
        kill_at_random(SAFE, path, generator)
        assert whole(path)
    atomic_write(path, b"done")
    assert path.read_bytes() == b"done"
    assert strays(tmp_path) == []


def test_a_naive_writer_is_caught_by_the_same_test(tmp_path: Path) -> None:
    path, generator = tmp_path / "seed-0.json", random.Random(0)
    broken = 0
    for _ in range(40):
        path.write_bytes(bytes(SIZE))
        kill_at_random(NAIVE, path, generator)
        broken += not whole(path)
        if broken:
            return
    pytest.fail("40 kills of open().write() broke nothing: the test above proves nothing")


CELLS = """
store = Store(sys.argv[1])
print("ready", flush=True)
for index in itertools.count():
    with store.cell("pretrain", {"index": index}) as cell:
        if cell.path is None:
            atomic_write(cell.work / "checkpoint", bytes(1 << 16))
            cell.commit({"a": bytes([index % 256]) * (1 << 16), "b": cell.work / "checkpoint"})
"""


def test_a_killed_run_leaves_whole_cells_and_the_next_run_no_strays(tmp_path: Path) -> None:
    generator, store = random.Random(1), Store(tmp_path)
    for _ in range(12):
        kill_at_random(CELLS, tmp_path, generator, longest=0.05)
    [(_, count, _)] = store.usage()
    for index in range(count + 1):
        with store.cell("pretrain", {"index": index}) as cell:
            assert (cell.path is None) == (index == count), "what was committed is there, and nothing else"
            path = cell.path or cell.commit({"a": bytes([index % 256]) * (1 << 16), "b": bytes(1 << 16)})
        assert (path / "a").read_bytes() == bytes([index % 256]) * (1 << 16)
    assert strays(tmp_path) == []


# --- several processes ---------------------------------------------------------------------------------------------

HOLDER = """
with Store(sys.argv[1]).cell("pretrain", {"seed": 0}) as cell:
    print("ready", flush=True)
    sys.stdin.readline()
    if cell.path is None:
        cell.commit({"by": b"first"})
"""


def test_the_second_run_waits_says_so_once_and_finds_the_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(HOLDER.replace("sys.stdin.readline()", "time.sleep(1.6)"), tmp_path) as child:
        assert (child.stdout and child.stdout.readline()) == "ready\n"
        with Store(tmp_path).cell("pretrain", {"seed": 0}) as cell:
            assert cell.path is not None
            assert (cell.path / "by").read_bytes() == b"first"
    assert capsys.readouterr().err.count("waiting for another run") == 1


RACER = """
store = Store(sys.argv[1])
print("ready", flush=True)
for index in range(60):
    with store.cell("pretrain", {"index": index}) as cell:
        if cell.path is None:
            with open(Path(sys.argv[1], "computed"), "a") as file:
                file.write(f"{index}\\n")
            cell.commit({"a": b"a"})
"""


def test_two_runs_of_one_folder_compute_nothing_twice(tmp_path: Path) -> None:
    with start(RACER, tmp_path) as one, start(RACER, tmp_path) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    computed = (tmp_path / "computed").read_text().split()
    assert sorted(map(int, computed)) == list(range(60))


def test_prune_takes_the_old_and_the_partial_but_nothing_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = finished(store), finished(store, {"seed": 1})
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    interrupted(store, {"seed": 2})
    with store.cell("pretrain", {"seed": 3}) as held:
        (held.work / "step-500").touch()
        assert store.prune(days=30) == 1
        assert strays(tmp_path) == [held.work.name]
        held.commit(FILES)
    assert not old.exists()
    assert new.exists()
    assert store.load("pretrain", {"seed": 3}) is not None


def test_use_keeps_a_cell_from_being_pruned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = finished(store)
    os.utime(path, (0, 0))
    assert store.load("pretrain", INPUTS) == path
    assert store.prune(days=30) == 0
    assert path.exists()


def test_usage_counts_cells_and_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.usage() == []
    path = finished(store)
    size = sum(p.stat().st_size for p in path.iterdir())
    assert store.usage() == [("pretrain", 1, size)]


# --- a store that can only be read ---------------------------------------------------------------------------------


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder on a mount that cannot be written, which needs root; the test is skipped without."""
    mount = shutil.which("mount")
    commands = [["--bind", folder, folder], ["-o", "remount,bind,ro", folder]]
    if mount is None or subprocess.run([mount, *commands[0]], check=False, capture_output=True).returncode:
        pytest.skip("root alone can mount a folder read-only")
    try:
        if subprocess.run([mount, *commands[1]], check=False, capture_output=True).returncode:
            pytest.skip("root alone can mount a folder read-only")
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_store_on_a_read_only_mount_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "store"
    path = finished(Store(folder))
    (finished(Store(folder), {"seed": 1}) / "losses.json").write_bytes(b"wrong")
    with read_only(folder):
        store = Store(folder)
        assert store.load("pretrain", INPUTS) == path
        assert store.load("pretrain", {"seed": 2}) is None
        assert capsys.readouterr().err == ""
        assert store.load("pretrain", {"seed": 1}) is None
        assert capsys.readouterr().err.endswith("losses.json is corrupted; it cannot be removed\n")
        for inputs in ({"seed": 1}, {"seed": 2}):
            with pytest.raises(ValueError, match="copy the project to where it can be written") as caught:
                finished(store, inputs)
            assert f"the store {folder}: {folder} is on a read-only mount, and a pretrain cell is missing" in str(
                caught.value
            )
    finished(Store(folder), {"seed": 2})
    assert strays(folder) == []


def test_a_place_that_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "results in")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"results in .*/file/below: .*/file is no folder"):
        check_writable(tmp_path / "file" / "below", "results in")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone is no folder"):
        check_writable(tmp_path / "gone", "results in")
    with read_only(tmp_path), pytest.raises(ValueError, match=r"on a read-only mount"):
        check_writable(tmp_path / "new" / "folder", "results in")


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_a_write_past_the_limit_leaves_the_old_and_names_the_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes write(2) fail half way, as a full disk does, wherever the test runs."""
    store = Store(tmp_path)
    finished(store)
    atomic_write(tmp_path / "record.json", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"record\.json") as caught:
            atomic_write(tmp_path / "record.json", bytes(1 << 20))
        assert caught.value.errno == errno.EFBIG
        with store.cell("pretrain", {"seed": 1}) as cell:
            (cell.work / "step-500").write_bytes(b"kept")
            with pytest.raises(OSError, match="large"):
                cell.commit({"small": b"a", "large": bytes(1 << 20)})
            assert cell.path is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "record.json").read_bytes() == b"old"
    assert store.load("pretrain", INPUTS) is not None
    assert store.load("pretrain", {"seed": 1}) is None
    with store.cell("pretrain", {"seed": 1}) as cell:
        assert (cell.work / "step-500").read_bytes() == b"kept"
        cell.commit(FILES)
    assert strays(tmp_path) == []


def test_a_full_disk_leaves_the_old_and_names_the_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a tmpfs can be mounted by root alone; the test above covers a failing write")
    try:
        store = Store(disk)
        finished(store)
        with store.cell("pretrain", {"seed": 1}) as cell, pytest.raises(OSError, match="large") as caught:
            cell.commit({"small": b"a", "large": bytes(1 << 20)})
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match=r"record\.json") as caught:
            atomic_write(disk / "record.json", bytes(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert store.load("pretrain", INPUTS) is not None
        assert store.load("pretrain", {"seed": 1}) is None
        finished(store, {"seed": 1})
        assert strays(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
