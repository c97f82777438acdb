"""The frame of every job: configuration, lock, session, skip what is current, measure, publish, exit code."""

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from jobs import inputs
from pipeline import config as configuration
from pipeline import errors, sources, versions
from pipeline.code import code_version
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, TagmillError, shown
from pipeline.flow import FIT, Stage, upstream
from pipeline.stages import poison
from pipeline.stages.executors import executors_wanted
from pipeline.storage import digest, explained
from pipeline.store import FAILURE, Run, fingerprint, stages_done, write_json

log = logging.getLogger("tagmill")

# the settings that decide what a stage writes; whatever is not named here may change without redoing the stage
SETTINGS = {
    "ingest": ("input", "ingest"),
    "split": ("split", "train.folds", "train.dev"),
    "featurize": ("featurize",),
    "train": ("train",),
    "calibrate": ("calibrate", "evaluate.if_undefined"),  # what the rule samples_f1 takes 0/0 for
    "evaluate": ("evaluate",),
    "register": ("mlflow.experiment", "mlflow.model", "mlflow.alias"),
}
LIMITS = configuration.LIMITS


def _file_mark(path: str) -> str:
    with explained(path, "read"):
        return digest(Path(path))[:16]


def rules_mark(path: str) -> str:
    """Of the rules and of the hierarchy that they name; wrong rules are found here, before anything runs."""
    from pipeline.learners.label_rules import read_rules

    return fingerprint(read_rules(path))


# settings that name a file or another run: the stage that reads it, and the identity of what is there
CONTENTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "train.label_weights": ("train", _file_mark),
    "calibrate.rules": ("calibrate", rules_mark),
    "train.warm_start": ("train", lambda path: Run(path).finished("train")["fingerprint"]),
    "featurize.vocabulary": ("featurize", lambda path: Run(path).finished("featurize")["fingerprint"]),
}


class Job:
    """A run folder with its configuration, and a Spark session that starts when it is first needed."""

    def __init__(self, run: Run, cfg: Config, version: dict | None = None):
        self.run, self.cfg = run, cfg
        self.version = version  # of `versions`: what calibrate left then takes the place of what it would leave now
        self._spark = None
        self._ours = False  # a session that was there before (a notebook's) is used and left running

    @property
    def spark(self):
        if self._spark is None:
            from pipeline.session import active, session

            self._ours = not active()
            if self._ours:
                log.info("spark: starting on %s", self.cfg.spark.master)
            self._spark = session(self.cfg.spark, f"tagmill {self.run.root.name}")
            if self._ours and not self.cfg.spark.master.startswith("local"):
                from pipeline.stages.same_store import check_same_store

                check_same_store(self._spark, self.run.root, self.cfg.spark.wait)
        return self._spark

    def stop(self) -> None:
        if self._spark is not None and self._ours:
            try:
                self._spark.stop()
            except Exception as error:  # the JVM is gone, or a signal cut a call to it short; it ends with this process
                log.debug("spark: did not stop cleanly: %s", error)
        self._spark = None

    def recipes(self, files: Iterable[tuple[str, int, str]] | None) -> dict[str, dict]:
        """What decides the output of every stage; known before any of them has run.

        files: of the input; None takes the documents that the run has ingested.
        """
        found: dict[str, dict] = {}
        for stage in FIT:
            inputs: dict[str, object] = {name: fingerprint(found[name]) for name in upstream(stage)}
            if stage.name == "ingest":
                if files is None:
                    found[stage.name] = self.run.finished(stage.name)["recipe"]
                    continue
                inputs = {"files": sorted(digest for _, _, digest in files)}
            recipe: dict = {
                "stage": stage.name,
                "settings": {**stage_settings(stage.name, self.cfg), **self._contents(stage.name)},
                "inputs": inputs,
                "code": code_version(),
            }
            if stage.name == "ingest" and (convicted := self.convicted(recipe)):
                recipe["quarantine"] = poison.decisive(convicted)
            if stage.name == "calibrate" and self.version:
                recipe = self._of_version(recipe)
            found[stage.name] = self._with_refits(recipe) if stage.name == "train" else recipe
        return found

    def convicted(self, recipe: dict) -> list[dict]:
        """The documents that ingest is to reject."""
        return poison.listed(self.run, poison.mark_of(recipe["inputs"]["files"], recipe["code"]))

    def _of_version(self, recipe: dict) -> dict:
        """The recipe of the version that is put back.  Raises ConfigError where its thresholds are of other models."""
        assert self.version
        earlier = self.version["calibrate"]["recipe"]
        if any(earlier[key] != recipe[key] for key in ("inputs", "code")):
            raise ConfigError(
                f"{self.run.root}: version {self.version['number']} was made from "
                f"{_what_differs(earlier, {**recipe, 'settings': earlier['settings']})}; its thresholds do not fit the "
                "models of now: choose another version, or --set what it was made with"
            )
        return earlier

    def _contents(self, stage: str) -> dict[str, str]:
        """Settings that name a file or a run stand in the recipe with the identity of its content."""
        marks = {}
        for key, (reader, mark) in CONTENTS.items():
            path = configuration.flat(self.cfg)[key]
            if reader != stage or not path or (self.version and stage == "calibrate"):
                continue
            try:
                marks[key] = f"{path}@{mark(path)}"
            except InputError:
                # gone since: what was made from it stays current
                before = (self.run.manifest(stage) or {}).get("recipe", {}).get("settings", {}).get(key, "")
                if not before.startswith(f"{path}@"):
                    raise
                marks[key] = before
        return marks

    def _with_refits(self, recipe: dict) -> dict:
        """The recipe with the labels that were refitted on top of it, where the finished stage is such a one."""
        manifest = self.run.manifest("train")
        refits = manifest["recipe"].get("refits") if manifest else None
        grown = {**recipe, "refits": refits}
        return grown if refits and manifest["recipe"] == grown else recipe  # type: ignore[index]


def stage_settings(stage: str, cfg: Config) -> dict[str, object]:
    wanted = SETTINGS[stage]
    return {
        key: value
        for key, value in configuration.flat(cfg).items()
        if (key in wanted or key.split(".")[0] in wanted) and key not in LIMITS
    }


# -- a fit, or one stage of it -----------------------------------------------------------------------------------------


def fit(
    run_dir: str,
    input_path: str | None,
    cfg: Config,
    overwrite: bool = False,
    only: tuple[str, ...] | None = None,
    labels: tuple[str, ...] = (),
    version: int | None = None,
) -> Run:
    """Run the fit flow, or some stages of it, in `run_dir`; what is current is skipped.

    The input is looked at only where the stage ingest is among them.  With `labels`, train solves these alone, under
    the train.* settings of this call, and keeps the rows of all others.  With `version`, calibrate puts back what it
    left then, and cfg has the settings of then.

    What calibrate and evaluate have left is kept (`pipeline.versions`) before it is replaced.

    Raises ConfigError where the folder was made with other settings or another input, unless `overwrite`; nothing has
    been written then.
    """
    run = Run(run_dir)
    info = run.info if run.exists else None
    if input_path is None:
        if info is None:
            run.info  # noqa: B018  (raises: not a run folder)
        input_path = info["input"]  # type: ignore[index]
    job = Job(run, cfg, versions.version(run, version) if version is not None else None)
    again = only is not None and _begun_again(run, only)
    read = only is None or "ingest" in only or again
    if read:
        inputs.refuse_table(input_path, run.root)
    # files that are not there are found out before a folder is made; a table needs a session
    plan = inputs.planned(input_path, cfg) if read and not inputs.is_table(input_path) else None
    run.prepare()
    with run.writing():
        try:
            _refuse_settings(job, info, overwrite, labels)
            _forget_damaged_refits(run)
            if read and plan is None:
                plan = inputs.planned(input_path, cfg, job.spark)
            if again:
                _refuse_another_list(run, plan)
            recipes = job.recipes(plan.files if plan else None)
            grow = _growth(job, recipes, labels) if only is None or "train" in only else None
            stages = [stage for stage in FIT if only is None or stage.name in only]
            stages = _up_to(stages[-1]) if again else stages
            checked = stages if grow is None else [s for s in stages if s.name not in from_on("train")]
            redone = _refuse_others(job, checked, recipes, overwrite)
            if "evaluate" in redone:
                versions.keep(run)
            if only != ("register",):  # where a finished run is sent to is no part of it
                with explained(run.root, "write to"):
                    config = info["config"] if info and grow is not None else cfg.model_dump(mode="json")
                    run.create({"config": config, "input": inputs.location(input_path)})
            # asked for by itself, register sends again: it is idempotent, and the server may be another one now
            run.drop(redone if only != ("register",) else only)
            if job.version and not _current(run, "calibrate", recipes["calibrate"]):
                versions.put_back(run, job.version)
            (run.root / FAILURE).unlink(missing_ok=True)
            for _ in range(poison.ROUNDS):
                found = _run_stages(job, stages, recipes, plan, grow)
                if not found:
                    return run
                with _failure_kept(run, found[0]["stage"]):
                    if plan is None:
                        plan = inputs.planned(input_path, cfg, job.spark)
                    _refuse_to_begin_again(run, found, plan, grow)
                    stage, told = found[0]["stage"], poison.told(found)
                    log.warning("%s: quarantined, and begun again at ingest: %s", stage, told)
                    recipes = _without(job, found, plan)
                stages = _up_to(stages[-1])
            with _failure_kept(run, stages[0].name):
                raise errors.DataError(poison.too_often(run, found))
        finally:
            job.stop()


def _up_to(stage):
    return list(FIT[: FIT.index(stage) + 1])


def _begun_again(run, only):
    """Whether a stage by itself had to begin again at ingest, and was stopped before it was back at itself."""
    before = FIT[: [stage.name for stage in FIT].index(only[0])]
    return run.exists and (run.root / poison.LIST).exists() and any(run.manifest(s.name) is None for s in before)


def _refuse_another_list(run, plan):
    """Go on without the documents of the list only where it is of this input and this code."""
    if not poison.listed(run, poison.mark_of(_digests(plan), code_version())):
        raise ConfigError(
            f"{run.root}: was being made again without the documents of {poison.LIST}, and input or code are others "
            "now: run `tagmill fit` (or jobs/ingest.py) of this folder"
        )


def _refuse_to_begin_again(run, found, plan, grow):
    """Before anything is dropped: documents are left out of the same input, and not under models that are kept."""
    ingested = run.manifest("ingest")
    if ingested and ingested["recipe"]["inputs"]["files"] != _digests(plan):
        raise ConfigError(
            f"{run.root}: {poison.told(found)} must be left out, and the input is not any more what was ingested: "
            "restore it, or run `tagmill fit --overwrite`"
        )
    if grow is not None:
        raise ConfigError(
            f"{run.root}: {poison.told(found)} must be left out, which changes the models of all labels: "
            "run `tagmill fit` of this folder without --labels first"
        )


def _digests(plan):
    return sorted(digest for _, _, digest in plan.files)


def _run_stages(job, stages, recipes, plan, grow):
    """The verdicts of the first stage that convicts documents, which nothing comes after; none where all are done."""
    for stage in stages:
        with _failure_kept(job.run, stage.name):
            if found := run_stage(job, stage, recipes[stage.name], plan, grow):
                return found
    return []


def _without(job, found, plan):
    """Put documents on the list of the run; the recipes that follow from it."""
    run = job.run
    if run.manifest("evaluate"):
        versions.keep(run)
    _warn_of_refits(run.manifest("train"), poison.told(found))
    # killed in between, the run finds them again; the other way round it would be one of another input
    run.drop(from_on("ingest"))
    poison.grown(run, poison.mark_of(_digests(plan), code_version()), found)
    return job.recipes(plan.files)


@contextlib.contextmanager
def _failure_kept(run, stage):
    """What ends a stage stands in failure.json too, for `tagmill status`."""
    try:
        yield
    except BaseException as error:
        code = signal_behind(error)
        known = translated(error) if isinstance(error, Exception) and code is None else None
        message = "stopped by a signal" if code else one_line(known or error) or type(error).__name__
        code = code or (known.code if known else TagmillError.code)
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with contextlib.suppress(OSError, TagmillError):  # a full disk, a lost lease is the error itself
            run.fenced()
            write_json(run.root / FAILURE, {"stage": stage, "code": code, "message": message, "when": when})
        raise


def _current(run, stage, recipe):
    manifest = run.manifest(stage)
    return bool(manifest) and manifest["fingerprint"] == fingerprint(recipe) and run.damage(stage) is None


def from_on(stage: str) -> list[str]:
    """Names of `stage` and of those after it.

    >>> from_on("calibrate")
    ['calibrate', 'evaluate', 'register']
    """
    names = [s.name for s in FIT]
    return names[names.index(stage) :]


def _forget_damaged_refits(run):
    """A refitted stage train that is not whole any more is made from the run's settings alone, and says so."""
    manifest = run.manifest("train")
    if manifest and manifest["recipe"].get("refits") and (damage := run.damage("train")):
        _warn_of_refits(manifest, damage)
        run.drop(from_on("train"))


def _warn_of_refits(manifest, why):
    """Labels that were solved with settings of their own are solved with those of the run from now on."""
    if manifest and manifest["recipe"].get("refits"):
        labels = sorted({name for refit in manifest["recipe"]["refits"] for name in refit["labels"]})
        log.warning(
            "train: %s; all labels are trained again with the settings of the run: repeat --labels for %s",
            why,
            shown(", ".join(labels), 500),
        )


def _growth(job, recipes, labels):
    """Labels to solve on top of a finished stage train, or alone in a new run; None where there are none.

    The recipes of train and of what builds on it are changed to say so.

    Without --labels, labels that an earlier `--labels` left untrained are solved now.
    """
    manifest = job.run.manifest("train")
    if not labels:
        # what a budget left over in a run of blocks goes on block by block; here there are none to go on with
        waiting = (
            ("not_selected", "out_of_time") if manifest and manifest["recipe"].get("refits") else ("not_selected",)
        )
        statuses = manifest.get("statuses", {}) if manifest else {}
        if not any(statuses.get(status) for status in waiting):
            return None
        if manifest["fingerprint"] != fingerprint(recipes["train"]):
            return None
        models = job.run.read("label_models", ["label_id", "status"]).to_pylist()
        names = job.run.read("labels", ["label"])["label"].to_pylist()
        labels = tuple(names[row["label_id"]] for row in models if row["status"] in waiting)
        log.info("train: %d labels are not trained yet", len(labels))
    base = recipes["train"]
    if manifest is None and any((job.run.root / "train").glob("blocks-*/block-*.json")):
        raise ConfigError(
            f"{job.run.root}: the training of all labels was begun and not finished; "
            "run the same `tagmill fit` without --labels to finish it, or choose another --run"
        )
    if manifest is not None:
        known = {key: value for key, value in manifest["recipe"].items() if key not in ("settings", "refits")}
        if known != {key: value for key, value in base.items() if key not in ("settings", "refits")}:
            raise ConfigError(
                f"{job.run.root}: stage train was made from {_what_differs(manifest['recipe'], base)}; --labels needs "
                "a run that is current: run the `tagmill fit` of this folder first, or choose another --run"
            )
        base = manifest["recipe"]
    settings = stage_settings("train", job.cfg)
    other = {key: value for key, value in settings.items() if manifest and base["settings"].get(key) != value}
    refit = {"labels": sorted(set(labels)), "settings": {**other, **job._contents("train")}}
    recipes["train"] = {**base, "refits": [*base.get("refits", []), refit]}
    for stage in FIT:
        if stage.name in from_on("train")[1:]:
            recipes[stage.name]["inputs"] = {name: fingerprint(recipes[name]) for name in upstream(stage)}
    return refit["labels"]


def _refuse_unknown_labels(run, labels):
    names = run.read("labels", ["label"])["label"].to_pylist()
    unknown = sorted(set(labels) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.3)
        hint = f"; the nearest known one is {shown(near[0])}" if near else ""
        raise ConfigError(
            f"--labels {shown(unknown[0])}: on no document of {run.root}{hint}; `tagmill show RUN --table labels` "
            "lists all, and documents with a new label need a new --run"
        )


def _refuse_settings(job, info, overwrite, labels=()):
    """Stop where run.json has other settings, or where the run is to go on from itself."""
    for key in ("train.warm_start", "featurize.vocabulary"):
        path = configuration.flat(job.cfg)[key]
        if path and Run(path).root.resolve() == job.run.root.resolve():
            raise ConfigError(f"{key} is {shown(path)}, the folder of this run; expected an earlier run")
    if info is not None and labels:
        other = [
            d for d in configuration.differences(info["config"], job.cfg.model_dump(mode="json"))
            if not d.startswith("train.") or d.startswith(("train.folds ", "train.dev ", "train.labels_per_block "))
        ]  # fmt: skip
        if other and stages_done(job.run):
            raise ConfigError(f"{other[0]}: with --labels only settings of train (but for folds and dev) may differ")
        return
    # a run that has finished no stage yet, say because too much was rejected, may be begun again with other settings
    if info is not None and not overwrite and stages_done(job.run):
        other = configuration.differences(info["config"], job.cfg.model_dump(mode="json"))
        if other:
            raise ConfigError(
                f"{job.run.root}: was made with other settings: {'; '.join(other[:5])}"
                + (f" and {len(other) - 5} more" if len(other) > 5 else "")
                + "; choose another --run, or --overwrite to redo what depends on them"
            )


def _refuse_others(job, stages, recipes, overwrite):
    """Stop before anything is written where a finished stage came from another input, setting or version.

    Returns the stages to unpublish, from the first that differs on; none where nothing does.
    """
    for stage in stages:
        manifest = job.run.manifest(stage.name)
        if manifest is None:
            continue
        recipe = recipes[stage.name]
        if manifest["fingerprint"] == fingerprint(recipe):
            continue
        if stage.name == "register":  # sending again costs nothing and replaces nothing
            return ["register"]
        if not overwrite:
            raise ConfigError(
                f"{job.run.root}: stage {stage.name} was made from {_what_differs(manifest['recipe'], recipe)}; "
                "choose another --run, or --overwrite to redo it and what builds on it"
            )
        later = from_on(stage.name)
        log.info("%s: redone from here on (%s)", stage.name, _what_differs(manifest["recipe"], recipe))
        return later
    return []


def _what_differs(before, after):
    parts = []
    for key in after["settings"]:
        old, new = before["settings"].get(key), after["settings"][key]
        if old != new:
            parts.append(f"{key} = {old!r} (now {new!r})")
    if before["inputs"] != after["inputs"]:
        parts.append("other input" if after["stage"] == "ingest" else "other upstream tables")
    if before.get("quarantine") != after.get("quarantine"):
        parts.append("another quarantine.json")
    if before["code"] != after["code"]:
        parts.append(f"another version of the code or of its numeric packages ({before['code']}, now {after['code']})")
    return ", ".join(parts) or "another recipe"


def run_stage(
    job: Job, stage: Stage, recipe: dict, plan: sources.Plan | None = None, grow: list[str] | None = None
) -> list[dict]:
    """One stage: skip it where it is current and whole, else compute, measure and publish it.

    Returns the verdicts of documents that it convicted; nothing is published then.
    """
    from jobs.meter import Meter
    from jobs.progress import Repeated, watching

    run = job.run
    for name in upstream(stage):
        if run.finished(name)["fingerprint"] != recipe["inputs"][name]:
            raise ConfigError(f"{run.root}: stage {name} is not current; run it again before {stage.name}")
    mark = fingerprint(recipe)
    manifest = run.manifest(stage.name)
    if manifest and manifest["fingerprint"] == mark:
        damage = run.damage(stage.name)
        late = manifest.get("statuses", {}).get("out_of_time") and not manifest["recipe"].get("refits")
        if damage is None and late:
            damage = f"{manifest['statuses']['out_of_time']:,} labels were not begun within train.budget"
            run.drop(from_on(stage.name))
        if damage is None:
            if stage.name == "evaluate":
                _publish(run)
            log.info("%s: up to date (%s)", stage.name, manifest["summary"])
            return []
        log.warning("%s: %s; computed again", stage.name, damage)
    if stage.name == "register":
        _register(job, recipe)
        return []
    growing = grow is not None and stage.name == "train"
    if growing:
        _refuse_unknown_labels(run, grow)
    # the blocks of train outlive an attempt: a second run solves only what is missing
    folder = f"{'refit' if growing else 'blocks'}-{mark}" if stage.name == "train" else None
    attempt = run.attempt(stage.name, folder)
    module = __import__(f"pipeline.stages.{stage.name}", fromlist=["summary"])
    arguments = {
        "ingest": lambda: (
            job.spark,
            inputs.exported(plan or sources.Plan((), (), ()), job.cfg, job.spark, run),
            attempt,
            job.cfg,
            True,
            job.convicted(recipe),
        ),
        "calibrate": lambda: (None, run, attempt, job.cfg),
        "train": lambda: (
            job.spark,
            run,
            attempt,
            job.cfg,
            _matrix_key(run, recipe),
            *([grow] if growing else []),
        ),
    }.get(stage.name, lambda: (job.spark, run, attempt, job.cfg))()
    context = getattr(arguments[0], "sparkContext", None)
    repeated = Repeated(context)
    with (
        Meter() as meter,
        watching(context, stage.name),
        executors_wanted(arguments[0], job.cfg.spark.wait),
        explained(attempt, "write to"),
    ):
        outcome, found = poison.judged(
            attempt, functools.partial(getattr(module, "refit" if growing else stage.name), *arguments)
        )
        if plan and stage.name == "ingest":
            sources.refuse_changed(plan)
    if outcome is None:
        return found
    rows = {name: sum(item["rows"] for item in items) for name, items in outcome.tables.items()}
    again = repeated.count()
    summary = module.summary(outcome.facts, rows) + (f"; {again} tasks begun again after a loss" if again else "")
    if growing:  # nothing outlives the models that it was made from
        versions.keep(run)
        run.drop(from_on(stage.name)[1:])
    run.commit(
        stage.name,
        attempt,
        recipe,
        outcome.tables,
        {**outcome.facts, **meter.facts(), "tasks_repeated": again, "summary": summary},
    )
    if stage.name == "evaluate":
        _publish(run)
    log.info("%s: %s, %.1f s", stage.name, summary, meter.seconds)
    return []


def _matrix_key(run, recipe):
    """Names the matrix in a host's cache: by content, and by run, so that no run cleans what another one maps."""
    start = recipe.get("refits", [recipe])[-1]["settings"].get("train.warm_start", "")
    place = hashlib.sha256(f"{run.root}\0{start}".encode()).hexdigest()[:8]
    return f"matrix-{recipe['inputs']['featurize']}-{recipe['inputs']['split']}-{place}"


def _publish(run):
    from pipeline.stages.evaluate import publish

    run.fenced()
    publish(run)


def _register(job, recipe):
    """Send the finished run to MLflow.  Tracking is advisory: a dead server costs a line, not the run."""
    from pipeline import tracking

    if not job.cfg.mlflow.enabled:
        log.info("register: mlflow.enabled is false, nothing sent")
        return
    try:
        sent = tracking.send(job.run, job.cfg)
    except TagmillError as error:
        if job.cfg.mlflow.required:
            raise
        log.warning(
            "register: deferred: %s; the run is complete, send it later with: tagmill register %s", error, job.run.root
        )
        return
    attempt = job.run.attempt("register")
    write_json(attempt / "sent.json", sent)
    summary = f"MLflow run {sent['run_id']}, model {sent['model_uri']}"
    job.run.commit("register", attempt, recipe, {}, {**sent, "seconds": sent["seconds"], "summary": summary})
    log.info("register: %s, %.1f s", summary, sent["seconds"])


# -- exit codes --------------------------------------------------------------------------------------------------------


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


def guarded(function: Callable[[], object], debug: bool = False) -> int:
    """Run a command; errors become one line on stderr and an exit code."""

    def terminate(number, frame):
        raise Terminated

    before = children()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks for it
            signal.signal(number, terminate)
    try:
        with _no_signal_lost():
            function()
        print(end="", flush=True)  # the reader of a short output may have left, and nothing was written before
    except (Exception, Terminated, KeyboardInterrupt) as error:
        return _ended(error, before, debug)
    return 0


def _ended(error: BaseException, before: set[psutil.Process], debug: bool) -> int:
    """Say on stderr why the command ended; its exit code."""
    if code := signal_behind(error):
        _stop(children() - before)
        if debug and not isinstance(error, Terminated | KeyboardInterrupt):
            traceback.print_exception(error)
        how = "interrupted" if code == errors.INTERRUPTED else "stopped by a signal"
        print(f"tagmill: {how}; run the same command again to go on", file=sys.stderr)
        return code
    if isinstance(error, BrokenPipeError) and _reader_left():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    known = translated(error)
    if debug:
        traceback.print_exc()
    if known is None:
        return _our_bug(error)
    print(f"tagmill: {one_line(known)}", file=sys.stderr)
    return known.code


def signal_behind(error: BaseException) -> int | None:
    """The exit code of the signal that an error comes from: a library that cleans up after it may raise another one."""
    found = [error]
    for met in found:
        if isinstance(met, Terminated | KeyboardInterrupt):
            return errors.TERMINATED if isinstance(met, Terminated) else errors.INTERRUPTED
        found += [other for other in (met.__cause__, met.__context__) if other is not None and other not in found]
    return None


@contextlib.contextmanager
def _no_signal_lost():
    """What a handler raises in a destructor or a callback of the collector is dropped by Python: raise it again."""
    before, waiting = sys.unraisablehook, []

    def again(dropped):
        kind = dropped.exc_type
        if kind not in (Terminated, KeyboardInterrupt):
            return before(dropped)

        def late(number, frame):
            raise kind

        # raised here it would be dropped as well
        waiting.append(kind)
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        if waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)


def children() -> set[psutil.Process]:
    """Processes below this one."""
    return set(psutil.Process().children(recursive=True))


def _stop(processes):
    """A JVM that was only starting is known to nobody yet: whatever a command began ends with it."""
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                stop(process)
        _, processes = psutil.wait_procs(processes, timeout=5)


def one_line(error: BaseException) -> str:
    """The message, also where it quotes data: no newline, no control character."""
    return shown(" ".join(str(error).split()), 4000)


def _reader_left():
    """Nobody reads our standard output any more (`tagmill show | head`); a pipe of another kind is a failure."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def translated(error: BaseException) -> TagmillError | None:
    """Our error behind an exception: itself, the operating system's, or one that a Spark worker reported as text."""
    if isinstance(error, TagmillError):
        return error
    if isinstance(error, (ConnectionRefusedError, ConnectionResetError)) or _jvm_is_gone(error):
        return errors.ServiceError("Spark's JVM is gone (killed, out of memory); run the same command again to go on")
    if isinstance(error, OSError):
        try:
            with explained(error.filename or "a file", "use"):
                raise error
        except TagmillError as known:
            return known
    text = str(error)
    match = re.search(r"pipeline\.errors\.(\w+): (.+)", text)
    family = getattr(errors, match[1], None) if match else None
    if match and isinstance(family, type):
        return family(match[2].strip())
    # Arrow's reason has colons of its own, and a rename names two paths
    system = r"\w+Error: \[Errno (\d+)\] ([^\n]+?)(?:: '([^'\n]+)'(?: -> '[^'\n]+')?)?\s*$"
    match = re.search(system, text, re.MULTILINE)
    if match:
        return translated(OSError(int(match[1]), match[2], match[3]))
    if "SparkContext was shut down" in text or "Answer from Java side is empty" in text:
        return translated(ConnectionResetError())
    match = re.search(r"java\.io\.IOException: (No space left on device)", text)
    if match:
        return errors.StorageError(
            f"{match[1]} in Spark's folder for temporary files; free some space or set spark.local.dir"
        )
    return None


def _jvm_is_gone(error):
    """Whether Py4J could not reach the JVM; of a call that it lost on the way it says its name and nothing else."""
    kind = type(error).__name__
    lost = kind == "Py4JError" and re.fullmatch(r"An error occurred while calling \S+", str(error).strip())
    return kind == "Py4JNetworkError" or bool(lost)


def _our_bug(error):
    with tempfile.NamedTemporaryFile(
        "w", prefix="tagmill-", suffix=".traceback", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        traceback.print_exception(error, file=file)
    first = one_line(error)[:200] or type(error).__name__
    print(
        f"tagmill: unexpected {type(error).__name__}: {first}; the traceback is in {file.name}, please report it",
        file=sys.stderr,
    )
    return errors.TagmillError.code


def logging_to_stderr(debug: bool = False) -> None:
    """Lines of Tagmill's own log on stderr; libraries speak up at warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    # nothing of py4j, some of which comes from the root logger: it raises what matters, and the last line tells it
    handler.addFilter(lambda record: debug or Path(record.pathname).parent.name != "py4j")
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("tagmill", "pipeline"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    for name in ("mlflow", "alembic", "numba"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _OneLine(logging.Formatter):
    """One line an event: a newline in data cannot forge a line."""

    def format(self, record):
        return shown(super().format(record), 2000)


# -- one stage as a job ------------------------------------------------------------------------------------------------


def stage_main(stage: str, argv: list[str] | None = None) -> int:
    """The command line of jobs/<stage>.py."""
    import argparse

    parser = argparse.ArgumentParser(prog=f"jobs/{stage}.py", description=f"Stage {stage} of a Tagmill run.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder")
    if stage == "ingest":
        parser.add_argument("--input", metavar="PATH", help="documents; needed for a new run")
    parser.add_argument("--config", metavar="FILE", help="YAML with settings that differ from the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="one setting; may be repeated")
    parser.add_argument("--master", metavar="URL", help="Spark master")
    parser.add_argument("--overwrite", action="store_true", help="redo the stage where settings or input differ")
    parser.add_argument("--debug", action="store_true", help="traceback on failure")
    args = parser.parse_args(argv)
    logging_to_stderr(args.debug)

    def job():
        run = Run(args.run)
        base = run.info["config"] if run.exists else None
        cfg, _ = configuration.load(args.config, [*args.set, *master_setting(args.master)], base)
        fit(args.run, getattr(args, "input", None), cfg, args.overwrite, only=(stage,))

    return guarded(job, args.debug)


def master_setting(master: str | None) -> list[str]:
    """--master as a setting; under spark-submit the master that it was given."""
    given = master or os.environ.get("SPARK_MASTER_URL")
    if not given and "PYSPARK_GATEWAY_PORT" in os.environ:
        from pyspark import SparkConf, SparkContext

        SparkContext._ensure_initialized()
        given = SparkConf().get("spark.master")
    return [f"spark.master={json.dumps(given)}"] if given else []
