"""The shape of the house: who imports whom, what is nowhere in the sources, and that lists agree with folders."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from quantbench import catalog, cli
from quantbench.metrics import Metric

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "quantbench"

# From the face down to the ground. A module imports only what stands lower; modules of one line know nothing of
# each other. An axis is a folder: a contract (`__init__`) and its entries, which may build on one another.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["cli_models"],
    ["face"],
    ["tune", "doctor"],
    ["sweep", "sites", "probe"],
    ["speed"],
    ["bench", "leaderboard"],
    ["hypotheses"],
    ["gallery", "claims", "answer", "tables"],
    ["board", "signatures"],
    ["portrait", "dormant", "ablation", "dynamics"],
    ["watchers", "interventions"],
    ["figures"],
    ["matched"],
    ["relation", "stats", "grid", "numerals", "theory"],
    ["harness"],
    ["results", "pretrain", "evaluate", "packed"],
    ["recipe"],
    ["watch"],
    ["model", "trace", "interface"],
    ["catalog"],
    ["tasks", "mitigations", "quantizers", "metrics"],
    ["pretrained"],
    ["shortnames", "soundness"],
    ["ggufheader"],
    ["modelfiles"],
    ["trial"],
    ["corpora", "tokenbytes"],
    ["wheels"],
    ["attention"],
    ["calibration"],
    ["ops"],
    ["anatomy"],
    ["heads"],
    ["checks"],
    ["store", "strict", "light", "shell", "markup"],
    ["__init__"],
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def name_of(path: Path) -> str:
    """A module's dotted name inside the package; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def imports(tree: ast.Module) -> Iterator[str]:
    """What a module imports when it is loaded or at work; names for annotations alone (TYPE_CHECKING) do not count."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside.removeprefix("quantbench.") in SOURCES else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            (argument,) = node.args
            if isinstance(argument, ast.Constant):  # else it is the catalog, which reaches the axes below it
                yield str(argument.value)


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: itself, or its folder."""
    return module.partition(".")[0]


def inner_imports(name: str) -> set[str]:
    found = {i for i in imports(TREES[name]) if i == "quantbench" or i.startswith("quantbench.")}
    return {i.removeprefix("quantbench").removeprefix(".") or "__init__" for i in found}


def outer_imports(name: str) -> set[str]:
    return {i.partition(".")[0] for i in imports(TREES[name])}


def test_every_module_has_its_layer() -> None:
    assert {part_of(name) for name in SOURCES} == set(LEVEL)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_downwards(name: str) -> None:
    upwards = {
        other
        for other in inner_imports(name)
        if LEVEL[part_of(other)] <= LEVEL[part_of(name)] and part_of(other) != part_of(name)
    }
    assert not upwards, f"{name} imports {sorted(upwards)}"


@pytest.mark.parametrize("axis", catalog.AXES)
def test_an_axis_knows_no_other(axis: str) -> None:
    others = set(catalog.AXES) - {axis}
    for name in SOURCES:
        if part_of(name) == axis:
            assert not {part_of(other) for other in inner_imports(name)} & others, name


@pytest.mark.parametrize("axis", catalog.AXES)
def test_no_name_of_a_contract_is_that_of_an_entrys_file(axis: str) -> None:
    """Else loading the entry replaces the name: the package's attribute becomes the module."""
    contract = TREES[axis]
    defined = {node.name for node in contract.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {
        node.id for node in ast.walk(contract) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    defined |= {a.asname or a.name for n in ast.walk(contract) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert not defined & {path.stem for path in (PACKAGE / axis).glob("*.py")}


@pytest.mark.parametrize(
    ("library", "where"),
    [
        ("yaml", {"strict"}),
        ("rich", {"face", "sweep"}),
        ("bitsandbytes", {"quantizers.bnb"}),
        ("hqq", {"quantizers.hqq"}),
        ("torchao", {"quantizers.ao"}),
        ("lm_eval", {"harness"}),
        ("matplotlib", {"figures"}),
    ],
)
def test_a_library_has_one_home(library: str, where: set[str]) -> None:
    assert {name for name in SOURCES if library in outer_imports(name)} == where


def test_the_light_modules_load_nothing_heavy() -> None:
    names = "cli, catalog, strict, recipe, store, results, leaderboard, relation, stats, figures, bench, claims, theory"
    code = f"from quantbench import {names}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "scipy", "transformers", "matplotlib", "tokenizers", "lm_eval", "bitsandbytes", "rich"}
    assert not heavy & set(loaded)


# --- what is nowhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_that_is_read_can_run_code(name: str) -> None:
    assert not outer_imports(name) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load"), (
                called
            )
            passed = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "trust_remote_code" not in passed
            assert "shell" not in passed
            if called in ("np.load", "numpy.load"):
                assert passed.get("allow_pickle") == "False"
            else:
                assert passed.get("allow_pickle", "False") == "False"
    assert "trust_remote_code" not in SOURCES[name].read_text()


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    private = re.compile(r"(?<![\w.*~/-])/(?:home|root|Users|work|mnt)/\w")
    folders = ("quantbench", "tests", "recipes", "results", ".ci")
    texts = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    texts += [path for path in ROOT.iterdir() if path.is_file()]
    assert len(texts) > 50
    for path in texts:
        try:
            found = private.search(path.read_text())
        except UnicodeDecodeError:
            continue
        assert not found, f"{path.relative_to(ROOT)}: {found}"


# --- what says what it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", [name for name, path in SOURCES.items() if path.parent == PACKAGE])
def test_every_public_function_and_class_says_what_it_is(name: str) -> None:
    defined = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]


# --- lists and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", catalog.AXES)
def test_every_file_of_an_axis_is_in_the_catalog(axis: str) -> None:
    files = {path.stem for path in (PACKAGE / axis).glob("*.py")} - {"__init__"}
    assert {catalog.load(axis, name).__module__.rpartition(".")[2] for name in catalog.names(axis)} == files


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis in catalog.AXES for name in catalog.names(axis)])
def test_every_line_of_the_catalog_is_an_entry(axis: str, name: str) -> None:
    kind = catalog.load(axis, name)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    if axis == "metrics":  # observes one model, so it changes; it has no parameters in YAML
        assert issubclass(kind, Metric)
        assert kind().title
    else:
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert catalog.entry_name(axis, kind(**catalog.preset(axis, name))) == name


def test_no_line_of_the_catalog_is_another_ones() -> None:
    for axis in catalog.AXES:
        made = [str(catalog.load(axis, n)(**catalog.preset(axis, n))) for n in catalog.names(axis) if axis != "metrics"]
        assert len(set(made)) == len(made)


def test_the_tree_of_the_readme_is_the_folder() -> None:
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    tree = next((block for block in blocks if block.startswith("quantbench/\n")), None)
    if tree is None:
        pytest.skip("README.md has no tree of quantbench/ yet")
    listed = re.findall(r"^  (\S+) +\S", tree, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(listed) == files | folders
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, re.MULTILINE))


def test_the_readme_names_every_recipe_once() -> None:
    (table,) = re.findall(
        r"^\| what it changes \| recipes \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL | re.M
    )
    named = re.findall(r"`([a-z0-9-]+)`", table)
    assert sorted(named) == sorted({path.stem for path in (ROOT / "recipes").glob("*.yaml")} - {"baseline"})


def test_the_tables_of_speed_are_what_the_measurements_render() -> None:
    from tests.perf.table import render

    folder = ROOT / "results" / "perf"
    assert (folder / "README.md").read_text() == render(folder), "run `make perf`"


def test_the_verbs_and_their_flags_are_those_that_people_know() -> None:
    """A flag that goes away breaks somebody's script: change this list on purpose."""
    (verbs,) = [action for action in cli._parser()._actions if isinstance(action.choices, dict)]
    flags = {
        verb: sorted(
            flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")
        )
        for verb, parser in verbs.choices.items()  # type: ignore[union-attr]
    }
    model = ["--dtype", "--figures", "--json", "--length", "--record"]
    known = {
        "bench": ["--accept", "--alone", "--dry-run", "--jobs", "--results", "--seeds", "--set", "--track"],
        "sites": ["--accept", "--jobs", "--json", "--quantizer", "--results", "--seeds", "--track"],
        "probe": ["--accept", "--jobs", "--json", "--results", "--seeds", "--track"],
        "claims": ["--json", "--results", "--track"],
        "hypotheses": ["--json", "--results", "--track"],
        "export": ["--quantizer", "--seed", "--to", "--track"],
        "tune": ["--jobs", "--results", "--track"],
        "list": ["--json"],
        "show": ["--track"],
        "check": [],
        "leaderboard": ["--results"],
        "relation": ["--json", "--results"],
        "models": ["--accept-licence"],
        "data": [],
        "measure": [*model, "--revision", "--text", "--windows"],
        "heads": ["--domains", *model, "--revision", "--texts", "--top"],
        "ablate": ["--layers", *model, "--revision", "--text", "--windows"],
        "dynamics": [*model, "--revisions", "--text", "--windows"],
        "doctor": ["--again", "--json"],
        "carry": [],
        "store": ["--prune"],
    }
    assert flags == {verb: sorted(mine) for verb, mine in known.items()}
