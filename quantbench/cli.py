"""quantbench: the verbs and what they call. Nothing heavy is imported before it is needed.

Exit codes: 0 done, 2 bad input (or a place that cannot be written), 3 some cells failed, 4 a run diverged, 5 integrity
(a record, or the folder of a short name, cannot be trusted), 130, 143 or 129 stopped by SIGINT, SIGTERM or SIGHUP.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbench import __version__, catalog, cli_models, shell
from quantbench.face import print_json, print_table, root, whole_number
from quantbench.markup import visible

if TYPE_CHECKING:
    from quantbench.bench import Job
    from quantbench.recipe import Recipe, Track
    from quantbench.store import Store


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; every refusal is one line on stderr and a documented exit code.

    Without arguments it is the program: it takes those of the command line, and answers signals.
    """
    return shell.run(partial(_run, sys.argv[1:])) if argv is None else _run(argv)


def _run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments))
    except (ValueError, OSError) as error:
        print(visible(f"quantbench: {error}" if not _is_placed(error) else str(error)), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"quantbench: {error}: install it, or all that is needed with `make setup`", file=sys.stderr)
        return 2
    except _integrity() as error:
        print(visible(f"quantbench: {error}"), file=sys.stderr)
        return 5


def _is_placed(error: Exception) -> bool:
    from quantbench.strict import StrictError

    return isinstance(error, StrictError)


def _integrity() -> tuple[type[Exception], ...]:
    from quantbench.modelfiles import AlteredError
    from quantbench.results import ResultsError

    return ResultsError, AlteredError


def _store() -> "Store":
    from quantbench.store import Store

    return Store(root() / ".quantbench")


# --- verbs -----------------------------------------------------------------------------------------------------------


def bench(arguments: argparse.Namespace) -> int:
    """Train, measure and quantize recipes beside their baseline, and print the table."""
    store, scratch = _store(), bool(arguments.set)
    if scratch:
        from quantbench.store import digest

        if arguments.results:
            raise ValueError("--results and --set: what is explored goes to a scratch folder of its own; leave one out")
        results = store.root / "scratch" / digest([sorted(arguments.set)])[:12]
    else:
        results = _results(arguments, written=True)
    jobs = _jobs(arguments, [*([] if arguments.alone else ["baseline"]), *arguments.recipe], arguments.set)
    track = jobs[0].track_name
    if arguments.dry_run:
        return _dry_run(jobs, store, results)
    import os

    from quantbench.bench import default_jobs
    from quantbench.sweep import sweep

    # Even the parent works with one thread: it may compute digests, and must not take the workers' cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{len(jobs)} runs on track {track}: {', '.join(map(str, jobs))}", file=sys.stderr, flush=True)
    workers = arguments.jobs or default_jobs()
    _check_places(jobs, results, arguments.accept)
    outcome = sweep(jobs, store, results, workers, arguments.accept, lambda line: print(line, flush=True))
    try:
        if not scratch:
            _render(results)
        if len(outcome.failed) < len(jobs):
            _print_table(results, track)
    finally:  # what was done is told, whatever becomes of the tables
        where = f"{results}" + (" (exploring: never on the leaderboard)" if scratch else "")
        print(
            f"{len(outcome.written)} records written, {len(outcome.identical)} reproduced byte for byte, "
            f"{len(outcome.differs)} differ, {len(outcome.diverged)} diverged, {len(outcome.failed)} failed; in {where}"
        )
    return outcome.exit_code


def _jobs(arguments: argparse.Namespace, recipe_names: list[str], sets: Sequence[str] = ()) -> "list[Job]":
    """Seed by seed, in the order of the names, so that a first comparison is there early."""
    from quantbench.bench import Job, first_seeds

    for declared in (True, False):  # whatever is wrong in any file is told before the first entry is imported
        recipes = _recipes(recipe_names, declared)
        track_name, track = _track(arguments.track, sets, declared)
        seeds = track.seeds if arguments.seeds is None else first_seeds(track, arguments.seeds)
        jobs = [Job(name, recipe, track_name, track, seed) for seed in seeds for name, recipe in recipes.items()]
    return jobs


def _recipes(given: list[str], declared: bool = False) -> "dict[str, Recipe]":
    """Recipes by name. ValueError where two have one name, under which one's records would replace the other's."""
    from quantbench.recipe import load_recipe

    found: dict[str, Recipe] = {}
    for name, recipe in (load_recipe(each, root(), declared=declared) for each in dict.fromkeys(given)):
        if found.setdefault(name, recipe) != recipe:
            raise ValueError(f"two different recipes are named {name!r}, and records go by that: rename a file")
    return found


def _track(given: str, sets: Sequence[str] = (), declared: bool = False) -> "tuple[str, Track]":
    from quantbench.recipe import load_track

    return load_track(given, root(), sets, declared)


def _results(arguments: argparse.Namespace, read: bool = False, written: bool = False) -> Path:
    """The folder of the results. ValueError where it is to be `read` and was named, but is not there; or `written`."""
    from quantbench.store import check_writable

    results = Path(arguments.results).expanduser() if arguments.results else root() / "results"
    if read and arguments.results and not results.is_dir():
        raise ValueError(f"--results {arguments.results}: no such folder")
    if written:
        check_writable(results, "results in")
    return results


def _dry_run(jobs: "list[Job]", store: "Store", results: Path) -> int:
    from quantbench.bench import experiment

    for job in jobs:
        there = job.track.task.ready(store.root) and experiment(job, store, compute=False) is not None  # type: ignore[attr-defined]
        state = "in the store" if there else "to compute"
        print(f"{job}: lr {job.lr:g}, {job.track.steps} steps, {len(job.quantizers)} quantizers: {state}")
    print(f"records would go to {results}")
    return 0


def _render(results: Path) -> None:
    from quantbench import leaderboard

    leaderboard.write(results, _page(results))


def _check_places(jobs: "list[Job]", results: Path, accept: bool) -> None:
    """ValueError or ResultsError where records could not be written, or tables not be rendered, after the work."""
    from quantbench import leaderboard
    from quantbench.store import check_writable

    for folder in dict.fromkeys(results / job.track_name / job.recipe_name for job in jobs):
        check_writable(folder, "results in")
    if not accept:  # which may replace what is broken
        leaderboard.check(results, _page(results))


def _page(results: Path) -> Path | None:
    """The project's README, which has a block for the table of results/; beside any other folder it is not ours."""
    readme = root() / "README.md"
    return readme if results.resolve() == root() / "results" and readme.is_file() else None


def _print_table(results: Path, track: str) -> None:
    from quantbench import tables

    print_table(tables.table(results, track), f"{track}, ranked by damage")


def sites(arguments: argparse.Namespace) -> int:
    """Tell which site pays: the damage of rounding each place alone, and of rounding all but it."""
    _known_quantizer(arguments.quantizer)
    results, store = _results(arguments, written=True), _store()
    jobs = _jobs(arguments, arguments.recipe)

    from quantbench import sites as paying

    paying.scheme(jobs[0].track, arguments.quantizer)
    measure = partial(paying.experiment, quantizer=arguments.quantizer)
    exit_code = _look_into(jobs, store, results, arguments, measure)
    _print_sites(jobs, results, arguments)
    return exit_code


def _look_into(jobs: "list[Job]", store: "Store", results: Path, arguments: argparse.Namespace, function: Any) -> int:
    """Makes the records that a function gives of trained models, and renders; the exit code."""
    import os

    from quantbench.bench import default_jobs
    from quantbench.sweep import sweep

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _check_places(jobs, results, arguments.accept)
    workers, tell = arguments.jobs or default_jobs(), partial(print, file=sys.stderr)
    outcome = sweep(jobs, store, results, workers, arguments.accept, tell, function)
    _render(results)
    return outcome.exit_code


def _print_sites(jobs: "list[Job]", results: Path, arguments: argparse.Namespace) -> None:
    """What is known of these jobs by now: a table, or one JSON object."""
    from quantbench import tables
    from quantbench.results import read_all, read_sites

    track = jobs[0].track_name
    every = [r for r in read_sites(results) if r["track"]["name"] == track]
    if arguments.json:
        asked = {(job.recipe_name, job.seed) for job in jobs}
        mine = [r for r in every if (r["recipe"]["name"], r["seed"]) in asked]
        mine = [r for r in mine if r["quantizer"]["name"] == arguments.quantizer]
        found = {"track": track, "quantizer": arguments.quantizer, "records": mine}
        print_json(found)
        return
    table = [r for r in read_all(results) if r["track"]["name"] == track]
    if runs := tables.paying(every, table).get(arguments.quantizer):
        print_table(tables.sites_table(runs), f"{track}, which site pays under {arguments.quantizer}")


def probe(arguments: argparse.Namespace) -> int:
    """Intervene on trained models: without an attention, an MLP, block 0, or the residual peak alone."""
    results, store = _results(arguments, written=True), _store()
    jobs = _jobs(arguments, arguments.recipe)

    from quantbench import probe as probing

    exit_code = _look_into(jobs, store, results, arguments, probing.experiment)
    _print_probes(jobs, results, arguments.json)
    return exit_code


def _print_probes(jobs: "list[Job]", results: Path, as_json: bool) -> None:
    """What is known of these jobs by now: a table a recipe, or one JSON object."""
    from quantbench import claims
    from quantbench.results import read_probes

    asked = {(job.recipe_name, job.track_name, job.seed) for job in jobs}
    mine = [r for r in read_probes(results) if (r["recipe"]["name"], r["track"]["name"], r["seed"]) in asked]
    if as_json:
        found = {"track": jobs[0].track_name, "records": mine}
        print_json(found)
        return
    for name in dict.fromkeys(job.recipe_name for job in jobs):
        if runs := [r for r in mine if r["recipe"]["name"] == name and r["status"] == "finished"]:
            print_table(
                claims.probe_table(runs), f"{name} on {jobs[0].track_name}: the model, and what each step changes"
            )


def claims_(arguments: argparse.Namespace) -> int:
    """Hold the source paper's claims against the records: published, measured, verdict."""
    from quantbench import claims

    track = arguments.track and arguments.track.removesuffix(".yaml").rpartition("/")[2]  # a path names a track, too
    found = claims.examine(_results(arguments, read=True), track)
    if arguments.json:
        print_json(claims.plain(found))
    for track, rows in {} if arguments.json else found.items():
        print_table(claims.table(rows), f"claims of arXiv:2410.13835 on {track}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Save a recipe's model, quantized and packed, in a folder; it is trained first where the store lacks it."""
    import os

    from quantbench.bench import Job
    from quantbench.store import check_writable

    _known_quantizer(arguments.quantizer)
    if (package := catalog.package(arguments.quantizer)) in ("bitsandbytes", "torchao"):
        raise ValueError(f"--quantizer {arguments.quantizer}: {package} saves its models by its own means")
    check_writable(Path(arguments.to), "--to")
    for declared in (True, False):
        ((name, recipe),) = _recipes([arguments.recipe], declared).items()
        track_name, track = _track(arguments.track, declared=declared)
        if track.pretrained:
            raise ValueError(f"the model of track {track_name} is there already; what is exported here is trained here")
        job = Job(name, recipe, track_name, track, track.seeds[0] if arguments.seed is None else arguments.seed)
        quantizer = _quantizer(arguments.quantizer, track, declared)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from quantbench.bench import export as exported

    torch.set_num_threads(1)  # as in `bench`: a checkpoint's last bits depend on it
    from quantbench.speed import BY_COPY, advice

    if line := advice([job], _store(), 1, BY_COPY):
        print(f"quantbench: {line}", file=sys.stderr, flush=True)
    report = exported(job, _store(), quantizer, Path(arguments.to), _say)
    if report is None:
        print(f"{job}: diverged; nothing to export", file=sys.stderr)
        return 4
    print(
        f"{job}, {arguments.quantizer}: {report['bits-per-weight']:.2f} bits per weight of the blocks, "
        f"{report['bytes']:,} bytes in {arguments.to}"
    )
    return 0


def _known_quantizer(name: str) -> None:
    from quantbench.strict import nearest, quote

    known = catalog.names("quantizers")
    if name not in known:
        raise ValueError(f"--quantizer {quote(name)}: there is none{nearest(name, known)}")


def _quantizer(name: str, track: "Track", declared: bool) -> Any:
    """The track's quantizer of that name, else the catalog's; ValueError where it cannot work on the track's model."""
    quantizer: Any = track.quantizers.get(name)
    if quantizer is None:
        kind = catalog.declared if declared else catalog.load
        quantizer = kind("quantizers", name)(**catalog.preset("quantizers", name))
    quantizer.check([track.model.width, track.model.mlp_width])
    return quantizer


def _say(stage: str, done: int, of: int, detail: str) -> None:
    if done == 0 or done % max(1, of // 10) == 0:
        print(f"{stage} {done}/{of} {detail}".rstrip(), file=sys.stderr, flush=True)


def tune(arguments: argparse.Namespace) -> int:
    """Find a recipe's learning rate by full-precision loss alone, on a seed outside the track's."""
    from quantbench import tune as tuning
    from quantbench.bench import default_jobs

    results, stopped = _results(arguments, written=True), 0
    for declared in (True, False):
        recipes = _recipes(arguments.recipe, declared)
        track_name, track = _track(arguments.track, declared=declared)
        center = _recipes(["baseline"], declared)["baseline"].lr.get(track_name, track.lr)
        for name, recipe in recipes.items():
            tuning.check(name, recipe, track_name, track)
    for name, recipe in recipes.items():
        workers = arguments.jobs or default_jobs()
        record = tuning.tune(
            name, recipe, center, track_name, track, _store(), workers, lambda line: print(line, flush=True)
        )
        path = tuning.write(results, record)
        if record["best"] is None:
            stopped = 4
        print(
            f"{name}: best lr {record['best']}; state it as `lr: {{{track_name}: {record['best']}}}`; sweep in {path}"
        )
    return stopped


def list_(arguments: argparse.Namespace) -> int:
    """List recipes, tracks and the entries of the catalog."""
    import json

    from quantbench.recipe import available

    found = {"recipes": available(root() / "recipes"), "tracks": available(root() / "recipes" / "tracks")}
    found |= {axis: catalog.names(axis) for axis in ("mitigations", "quantizers", "metrics", "tasks")}
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for kind, names in found.items():
            print(f"{kind}:\n  " + "\n  ".join(names))
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Show a recipe, resolved on a track, and what differs from the baseline."""
    import json

    from quantbench.bench import Job
    from quantbench.strict import dump

    ((name, recipe),) = _recipes([arguments.recipe], declared=True).items()
    track_name, track = _track(arguments.track, declared=True)
    (other,) = _recipes(["baseline"], declared=True).values()
    mine, baseline = (Job(n, r, track_name, track, 0).resolved for n, r in ((name, recipe), ("baseline", other)))
    print(f"{name}: {recipe.title}\n{recipe.why}" + (f"\n{recipe.paper}" if recipe.paper else ""))
    print("\ndiffers from the baseline in:")
    differences = {key: value for key, value in mine.items() if value != baseline[key]}
    print(json.dumps(differences, indent=2) if differences else "nothing: it is the baseline")
    print(f"\nresolved on {track_name}:")
    print(json.dumps({"recipe": mine, "track": dump(track)}, indent=2))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check recipe and track files without running them."""
    from quantbench.recipe import load_recipe, load_track

    faults = 0
    for file in arguments.file:
        try:
            path = file if file.endswith(".yaml") else f"{file}.yaml"
            load = load_track if _is_track(Path(path)) else load_recipe
            load(path, root(), declared=True)
            print(f"{file}: fine")
        except ValueError as error:
            faults += 1
            print(error, file=sys.stderr)
    return 2 if faults else 0


def _is_track(path: Path) -> bool:
    """Whether a file is to be read as a track: by its folder, or, elsewhere, because it states a task."""
    if path.resolve().parent.name in ("tracks", "recipes"):
        return path.resolve().parent.name == "tracks"
    try:
        return b"\ntask:" in b"\n" + path.read_bytes()
    except OSError:
        return False  # which is told as it is read


def leaderboard_(arguments: argparse.Namespace) -> int:
    """Render the tables and figures of the results again."""
    _render(_results(arguments, read=True, written=True))
    return 0


def relation(arguments: argparse.Namespace) -> int:
    """How the residual peak relates to quantization error, per track and quantizer."""
    from quantbench.relation import relate
    from quantbench.results import read_all

    found = relate(read_all(_results(arguments, read=True)))
    if arguments.json:
        print_json(found)
        return 0
    for track, quantizers in found.items():
        for quantizer, predictors in quantizers.items():
            for predictor, figures in predictors.items():
                rho, n = figures["rho"], figures["n"]
                shown = "undefined" if rho is None else f"{rho['estimate']:.2f}"
                print(f"{track}: log KL under {quantizer} on log {predictor}: Spearman rho {shown}, n {n}")
    return 0


def hypotheses_(arguments: argparse.Namespace) -> int:
    """Hold the predictions that were written before the runs against the records."""
    from quantbench import claims, hypotheses
    from quantbench.board import board
    from quantbench.relation import relate
    from quantbench.results import read_all

    results = _results(arguments)
    records = read_all(results)
    related, claimed, found = relate(records), claims.examine(results), {}
    for track in sorted({r["track"]["name"] for r in records} if arguments.track is None else {arguments.track}):
        mine = [r for r in records if r["track"]["name"] == track]
        if mine and (written := hypotheses.read(results, track)):
            facts = hypotheses.Facts(board(mine), related[track], claimed)
            found[track] = hypotheses.judged(written, facts)
    if arguments.json:
        print_json(hypotheses.plain_form(found))
    for track, verdicts in {} if arguments.json else found.items():
        print_table(hypotheses.table(verdicts), f"predictions of {track}: {hypotheses.score(verdicts)}")
    return 0


def carry(arguments: argparse.Namespace) -> int:
    """Write a track's text into one file, for a machine that has no network or other packages."""
    name, track = [_track(arguments.track, declared=declared) for declared in (True, False)][1]
    kept = _store()
    try:
        path = track.task.carry(kept.root)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"track {name}: {error}") from None
    data = track.task.open(kept.root)  # type: ignore[attr-defined]
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, data {data.digest[:12]}")
    print(f"copy it to {'.quantbench' / path.relative_to(kept.root)} of the clone on the other machine")
    return 0


def store(arguments: argparse.Namespace) -> int:
    """What the store of finished work holds, and on how much disk."""
    kept = _store()
    if arguments.prune:
        print(f"{kept.prune()} cells removed, and all partial work")
    for stage, cells, size in kept.usage():
        print(f"{stage:<12}{cells:>6} cells {size / 1e6:>10.1f} MB")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Say what this machine has and lacks, which paths were measured fastest, and how long the first command takes."""
    import json

    from quantbench import doctor as doctoring

    if arguments.again:
        from quantbench.ops.measured import forget

        forget()
    found: dict[str, Any] = {}
    for section, what in doctoring.examine(root()):
        found[section] = what
        for line in [] if arguments.json else doctoring.lines(section, what):
            print(line, flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False))
    return 0 if found["ready"]["ready"] else 2


# --- arguments -------------------------------------------------------------------------------------------------------

JOBS = whole_number(1, 1024)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantbench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"quantbench {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(verb=function)
        return added

    runs = verb("bench", bench)
    runs.add_argument(
        "recipe", nargs="+", metavar="RECIPE", help="names of recipes (see `quantbench list`), or YAML files"
    )
    runs.add_argument("--track", default="text", help="what is held equal (default: text)")
    runs.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of the track (default: all)")
    runs.add_argument("--jobs", type=JOBS, metavar="N", help="runs at a time, one thread each (default: one per core)")
    runs.add_argument("--results", metavar="DIR", help="where records and tables go (default: results/)")
    runs.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="explore another key of the track: goes to a scratch folder, never onto the leaderboard",
    )  # fmt: skip
    runs.add_argument("--alone", action="store_true", help="without the baseline: its records are there already")
    runs.add_argument("--dry-run", action="store_true", help="say what would run, and what is there already")
    runs.add_argument("--accept", action="store_true", help="replace committed records that this run contradicts")
    pays, probes = verb("sites", sites), verb("probe", probe)
    pays.add_argument("--quantizer", default="w8a8-static", help="one that rounds to nearest (default: w8a8-static)")
    for looks, track in ((pays, "text"), (probes, "bb-3layer")):
        looks.add_argument("recipe", nargs="+", metavar="RECIPE")
        looks.add_argument("--track", default=track)
        looks.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of the track (default: all)")
        looks.add_argument("--jobs", type=JOBS, metavar="N", help="runs at a time (default: one per core)")
        looks.add_argument("--results", metavar="DIR", help="where records and tables go (default: results/)")
        looks.add_argument("--accept", action="store_true", help="replace committed records that this run contradicts")
        looks.add_argument("--json", action="store_true", help="one JSON object: the records of these runs")
    claimed = verb("claims", claims_)
    claimed.add_argument("--track", help="of this one alone (default: every track with records that can answer)")
    claimed.add_argument("--results", metavar="DIR")
    claimed.add_argument("--json", action="store_true", help="one JSON object: track -> its rows")
    exports = verb("export", export)
    exports.add_argument("recipe", metavar="RECIPE")
    exports.add_argument("--quantizer", required=True, metavar="NAME", help="as `quantbench list` names them")
    exports.add_argument("--track", default="text")
    exports.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), metavar="N", help="of the run (default: the track's first)"
    )
    exports.add_argument("--to", required=True, metavar="FOLDER", help="where the model goes")
    tunes = verb("tune", tune)
    tunes.add_argument("recipe", nargs="+", metavar="RECIPE")
    tunes.add_argument("--track", default="text")
    tunes.add_argument("--jobs", type=JOBS, metavar="N", help="runs at a time (default: one per core)")
    tunes.add_argument("--results", metavar="DIR", help="where the sweep is recorded (default: results/)")
    verb("list", list_).add_argument("--json", action="store_true", help="one JSON object of lists of names")
    shows = verb("show", show)
    shows.add_argument("recipe", metavar="RECIPE")
    shows.add_argument("--track", default="text")
    verb("check", check).add_argument("file", nargs="+", metavar="FILE", help="recipe or track files")
    verb("leaderboard", leaderboard_).add_argument("--results", metavar="DIR")
    predicts = verb("hypotheses", hypotheses_)
    predicts.add_argument("--track", metavar="TRACK", help="one track alone (default: all)")
    predicts.add_argument("--results", metavar="DIR")
    predicts.add_argument("--json", action="store_true", help="one JSON object")
    relates = verb("relation", relation)
    relates.add_argument("--results", metavar="DIR")
    relates.add_argument("--json", action="store_true", help="one JSON object")
    cli_models.add(verb)
    examines = verb("doctor", doctor)
    examines.add_argument("--json", action="store_true", help="one JSON object")
    examines.add_argument("--again", action="store_true", help="forget what was measured before, and measure anew")
    verb("carry", carry).add_argument("track", metavar="TRACK", help="whose task reads text, such as text-gpu")
    verb("store", store).add_argument(
        "--prune", action="store_true", help="drop partial work and cells unused for 30 days"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
