"""Tag new documents with a fitted run or a registered model.

The output folder appears whole or not at all: the work is done in a hidden folder beside it, which takes its name at
the end and is kept when the work is interrupted, so that the same command goes on where it stopped.  In an object store
nothing can be renamed: the objects are copied and the manifest `_MANIFEST.json` is the last; without it the output is
not finished.
"""

import ctypes
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from jobs import inputs
from jobs.entry import Job, code_version, stage_settings
from jobs.meter import Meter
from jobs.progress import watching
from pipeline.config import Config
from pipeline.errors import ConfigError, DataError, InputError, shown
from pipeline.flow import FIT
from pipeline.lease import FOLDER
from pipeline.sources import refuse_changed
from pipeline.stages import ingest as ingesting
from pipeline.stages import poison
from pipeline.stages import tag as tagging
from pipeline.stages.executors import executors_wanted
from pipeline.storage import ObjectPath, copy, digest, explained, place, remove, shipped, sync_folder
from pipeline.store import Run, drop_unfinished, fingerprint, write_json

log = logging.getLogger("tagmill")

PUBLISHING = "publishing.json"  # in the work: the output is being copied
CARD = "_MANIFEST.json"  # an underscore hides it from readers of the Parquet folder, as Spark's and Arrow's do


def tag(
    run_dir: str | None, model: str | None, input_path: str, output: str, cfg: Config, overwrite: bool = False
) -> dict:
    """Tag `input_path` into the folder `output`; returns the manifest that is written beside the tags.

    Raises ConfigError where `output` holds something else, InputError where the run is not finished.
    """
    out = place(output)
    if not out.name:
        raise ConfigError(f"--output {shown(output)}: is a bucket; expected a name in it, which becomes the folder")
    inputs.refuse_table(input_path, out, "--output")
    # gold labels and splits of what is tagged are nobody's business here: they refuse no document
    cfg = cfg.model_copy(update={"input": cfg.input.model_copy(update={"labels": None, "split": None})})
    plan = None if inputs.is_table(input_path) else inputs.planned(input_path, cfg, need_labels=False)
    work = Run(out.parent / f".{out.name}.tagmill")
    with explained(out, "create"):
        out.parent.mkdir(parents=True, exist_ok=True)
        work.root.mkdir(exist_ok=True, mode=0o750)
    with work.writing():
        _recover(out)
        job = Job(work, cfg)
        plan = plan or inputs.planned(input_path, cfg, job.spark, need_labels=False)
        source, settings, identity = _fitted(run_dir, model, cfg, work)
        recipe = {
            "model": identity,
            "files": sorted(digest for _, _, digest in plan.files),
            "settings": {**stage_settings("ingest", cfg), "tag.max_tags": cfg.tag.max_tags},
            "code": code_version(),
        }
        mark = fingerprint(recipe)
        current = _card(out)
        retried = overwrite and current and current.get("quarantine")  # perhaps with more time or memory
        if current and current["fingerprint"] == mark and _whole(out, current) and not retried:
            log.info("tag: up to date (%s)", current["summary"])
            _clear(work)
            return current
        damaged = current is not None and current["fingerprint"] == mark
        begun = _published_in_part(work, mark)
        if out.exists() and (out.is_file() or any(out.iterdir())) and not (overwrite or damaged or begun):
            what = "tags of another input, model or setting" if current else "something else"
            work_is_new = not (work.root / "ingest").exists()
            if work_is_new:
                _clear(work)
            raise ConfigError(f"{out}: holds {what}; choose another --output, or --overwrite to replace it")
        try:
            card = begun or _tag(job, plan, source, settings, recipe)
        finally:
            job.stop()
        with explained(out, "publish"):
            if isinstance(out, ObjectPath):
                _copy_to(work, out, card)
            else:
                _publish(work.root / "result", out)
        _clear(work)
    log.info("tag: %s", card["summary"])
    return card


def _fitted(run_dir, model, cfg, work):
    """Where the fitted tagger is, its settings, and what identifies it."""
    if run_dir is not None:
        run = Run(run_dir)
        fitted, _ = _config_of(run)
        for name in ("ingest", "featurize", "train", "calibrate"):
            run.finished(name)
        _refuse_mixture(run)
        settings = tagger_settings(fitted, cfg)
        return (
            {"run": str(run.root)},
            settings,
            {"run": str(run.root), "thresholds": run.finished("calibrate")["fingerprint"]},
        )
    from pipeline import tracking

    settings = {"max_tags": cfg.tag.max_tags}
    if not isinstance(work.root, ObjectPath):
        folder, facts = tracking.fetch_model(model, cfg.mlflow, work.root / "model")
        return {"bundle": str(folder)}, settings, facts
    with tempfile.TemporaryDirectory(prefix="tagmill-") as local:
        folder, facts = tracking.fetch_model(model, cfg.mlflow, Path(local) / "model")
        return {"bundle": shipped(folder, work.root / "model", cfg.spark.cache_dir)}, settings, facts


def tagger_settings(fitted: Config, cfg: Config) -> dict:
    """How text becomes features and how many tags are said: what `Tagger` needs besides tables."""
    return {"ngrams": fitted.featurize.ngrams, "sublinear": fitted.featurize.sublinear, "max_tags": cfg.tag.max_tags}


def _config_of(run):
    from pipeline.config import load

    return load(base=run.info["config"])


def _refuse_mixture(run):
    """While a fit is being redone, its folder holds tables of two configurations for a moment."""
    for stage in FIT:
        manifest = run.manifest(stage.name)
        for name, mark in (manifest or {"recipe": {"inputs": {}}})["recipe"]["inputs"].items():
            if name != "files" and mark != run.finished(name)["fingerprint"]:
                raise ConfigError(
                    f"{run.root}: {stage.name} was made from another {name}; finish the fit with the same `tagmill fit`"
                )


def _tag(job, plan, source, settings, recipe):
    work, cfg = job.run, job.cfg
    mark = fingerprint(recipe)
    with Meter() as meter:
        input_mark = poison.mark_of(recipe["files"], f"{recipe['code']} {fingerprint(recipe['model'])}")
        convicted = poison.listed(work, input_mark)
        for _ in range(poison.ROUNDS):
            manifest = _ingested(job, plan, recipe, convicted)
            log.info("ingest: %s", ingesting.summary(manifest, manifest["rows"]))
            result = work.root / "result"
            remove(result)
            result.mkdir(mode=0o750)
            guard = poison.Guard.of("tag", result, cfg.spark)
            documents, cache = work.files("documents"), cfg.spark.cache_dir
            tagged = functools.partial(tagging.tag, job.spark, documents, result, source, settings, mark, guard, cache)
            with watching(job.spark.sparkContext, "tag"), executors_wanted(job.spark, cfg.spark.wait):
                outcome, found = poison.judged(result, tagged)
            if outcome is not None:
                break
            log.warning("tag: quarantined, and begun again at ingest: %s", poison.told(found))
            convicted = poison.grown(work, input_mark, found)
        else:
            raise DataError(poison.too_often(work, found))
        rejects = result / "_rejects"
        rejects.mkdir()
        for path in work.files("rejects"):
            copy(path, rejects / path.name)
        sync_folder(rejects)
    rows = {"tags": sum(item["rows"] for item in outcome.tables["tags"])}
    card = {
        "fingerprint": mark,
        "recipe": recipe,
        "tables": outcome.tables,
        "rows": rows,
        "records": manifest["records"],
        "accepted": manifest["accepted"],
        "rejected": manifest["rejected"],
        "quarantine": convicted,
        **outcome.facts,
        **meter.facts(),
        "summary": tagging.summary(outcome.facts, rows),
    }
    if rows["tags"] != manifest["accepted"]:
        raise AssertionError(f"{rows['tags']} documents tagged, {manifest['accepted']} accepted")
    drop_unfinished(result)  # of a worker that was killed
    write_json(result / CARD, card)
    sync_folder(result)
    return card


def _clear(work):
    """Remove the work; of an object store all but the lease, whose number must not be given again."""
    remove(work.root, keep=(FOLDER,) if isinstance(work.root, ObjectPath) else (), strict=True)


def _published_in_part(work, mark):
    """The card of a result that was being copied when its process was killed; None where there is none."""
    if not isinstance(work.root, ObjectPath) or not (work.root / PUBLISHING).is_file():
        return None
    card = _card(work.root / "result")
    return card if card and card["fingerprint"] == mark else None


def _copy_to(work, out, card):
    """Copy the finished objects to `out`: the old card goes first, the new one comes last."""
    result = work.root / "result"
    names = [item["file"] for item in card["tables"]["tags"]]
    names += [f"_rejects/{path.name}" for path in (result / "_rejects").iterdir()]
    work.fenced()
    write_json(work.root / PUBLISHING, {"fingerprint": card["fingerprint"]})
    (out / CARD).unlink(missing_ok=True)
    for path in [*out.iterdir(), *(out / "_rejects").iterdir()]:
        if path.name != "_rejects" and str(path.relative_to(out)) not in names:
            remove(path, strict=True)  # a reader would take it for tags
    for name in names:
        copy(result / name, out / name)
    work.fenced()
    copy(result / CARD, out / CARD)


def _ingested(job, plan, recipe, convicted):
    """The manifest of the documents without the convicted ones; they are read again where it is of others."""
    work, cfg = job.run, job.cfg
    recipe = {key: recipe[key] for key in ("files", "settings", "code")}
    if convicted:
        recipe["quarantine"] = poison.decisive(convicted)
    manifest = work.manifest("ingest")
    if manifest and manifest["fingerprint"] == fingerprint(recipe) and not work.damage("ingest"):
        return manifest
    attempt = work.attempt("ingest")
    with watching(job.spark.sparkContext, "ingest"), executors_wanted(job.spark, cfg.spark.wait):
        rows = inputs.exported(plan, cfg, job.spark, work, need_labels=False)
        outcome = ingesting.ingest(job.spark, rows, attempt, cfg, False, convicted)
        refuse_changed(plan)
    return work.commit("ingest", attempt, recipe, outcome.tables, outcome.facts)


def _publish(result, out):
    """Give the finished folder its name in one step; an older one takes the place of `result`, or steps aside first."""
    if not out.exists():
        os.rename(result, out)
    elif not _exchanged(result, out):
        aside = out.with_name(f".{out.name}.{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}.old")
        os.rename(out, aside)
        os.rename(result, out)
        _remove(aside)
    sync_folder(out.parent)


def _exchanged(one, other):
    """Swap two names in one step; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(aside):
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


def _recover(out):
    """Put back an older output that a killed replacement had set aside; what it had replaced already is removed."""
    if isinstance(out, ObjectPath):
        return
    for aside in sorted(out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}.old")):
        if out.exists():
            _remove(aside)
        else:
            os.rename(aside, out)


def _whole(out, card):
    """Whether the files of a finished output are those that its card names."""
    return all((out / e["file"]).is_file() and digest(out / e["file"]) == e["sha256"] for e in card["tables"]["tags"])


def _card(out):
    path = out / CARD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON; remove {out} or choose another --output") from error


def main(argv: list[str] | None = None) -> int:
    """The command line of jobs/tag.py."""
    import argparse

    from jobs.entry import guarded, logging_to_stderr, master_setting

    parser = argparse.ArgumentParser(
        prog="jobs/tag.py", description="Tag new documents with a fitted run or a registered model."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="folder of a finished fit")
    which.add_argument("--model", metavar="URI", help="registered model, such as models:/tagmill@champion")
    parser.add_argument("--input", required=True, metavar="PATH")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder that is made")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--master", metavar="URL", help="Spark master")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--debug", action="store_true", help="traceback on failure")
    args = parser.parse_args(argv)
    logging_to_stderr(args.debug)

    def job():
        cfg = tag_config(args.run, args.config, [*args.set, *master_setting(args.master)])
        tag(args.run, args.model, args.input, args.output, cfg, args.overwrite)

    return guarded(job, args.debug)


def tag_config(run_dir: str | None, path: str | None, sets: list[str]) -> Config:
    """Settings of a tag job: those of the fitted run, so that the columns are found again, then file and --set."""
    from pipeline import config as configuration

    base = Run(run_dir).info["config"] if run_dir else None
    return configuration.load(path, sets, base)[0]


if __name__ == "__main__":
    raise SystemExit(main())
