"""What `tagmill status RUN` tells: what is done, running, failed and left, from the files of the run folder alone."""

import contextlib
import json
import time
from pathlib import Path

from rich.table import Table as Grid
from rich.text import Text

from jobs.show import console
from pipeline import errors
from pipeline.errors import shown
from pipeline.flow import FIT
from pipeline.storage import Place
from pipeline.store import FAILURE, Run

UNFINISHED = 1  # exit code: nobody works on it, and nothing says why
# failures after which nothing has to be mended before the same command is run again
AGAIN = (errors.ServiceError.code, errors.LockedError.code, errors.INTERRUPTED, errors.TERMINATED)


def status(run: Run, as_json: bool) -> int:
    """Print the state of a run.  Returns the exit code that `found` gives."""
    value = found(run)
    if as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        _print(value)
    return value["code"]


def found(run: Run) -> dict:
    """The state of a run.

    Returns: run; state and code, which are complete (0), running (75), failed (the exit code of what failed) or
    unfinished (1: killed, or stages are left that nobody asked for); holder of the lock or None; failure (stage, code,
    message, when) or None; stages, each with stage, state (done, running, failed, interrupted, waiting, off), seconds
    and summary; remaining, the names of those that are to be run; train, see `blocks`, or None.

    Raises InputError where the folder is no run.
    """
    holder = run.holder()
    # a fit that has just begun holds the lock and has not written yet
    info = run.info if run.exists or holder is None else {"config": {}}
    failure = _failure(run)
    stages = []
    for stage in FIT:
        manifest = run.manifest(stage.name)
        item = {"stage": stage.name, "state": "done" if manifest else "waiting", "seconds": None, "summary": None}
        if manifest:
            item |= {"seconds": manifest.get("seconds"), "summary": manifest.get("summary")}
        elif stage.name == "register" and not info["config"].get("mlflow", {}).get("enabled", True):
            item["state"] = "off"
        stages.append(item)
    left = [item for item in stages if item["state"] == "waiting"]
    if left and holder is not None:
        left[0]["state"] = "running"
    elif left and failure and failure["stage"] == left[0]["stage"]:
        left[0] |= {"state": "failed", "summary": failure["message"]}
    elif left and _begun(run, left[0]["stage"]):
        left[0]["state"] = "interrupted"
    remaining = [item["stage"] for item in left]
    state, code = "unfinished", UNFINISHED
    if holder is not None:
        state, code = "running", errors.LockedError.code
    elif remaining in ([], ["register"]):  # a run is complete without MLflow
        state, code = "complete", 0
    elif left[0]["state"] == "failed":
        state, code = "failed", failure["code"]  # type: ignore[index]
    return {
        "run": str(run.root),
        "state": state,
        "code": code,
        "holder": holder,
        "failure": failure if state == "failed" else None,
        "stages": stages,
        "remaining": remaining,
        "train": blocks(run, stages),
    }


def blocks(run: Run, stages: list[dict]) -> dict | None:
    """Blocks of the training that was begun or is done: blocks, done, failed_labels, seconds_left; None without one.

    seconds_left counts the blocks that are left at the pace of those that this attempt has finished; it is None while
    there is none, and where nobody trains.
    """
    state = next(item["state"] for item in stages if item["stage"] == "train")
    if state == "waiting":
        return None
    plans = [path for path in (run.root / "train").glob("*/blocks.json") if path.is_file()]
    if not plans:
        return None
    plan = max(plans, key=_modified)
    markers = list(plan.parent.glob("block-*.json"))
    left = None
    total, now = len(_json(plan) or ()), time.time()
    begun = max([_modified(_lock(run)), _modified(run.root / "featurize" / "MANIFEST.json")])
    fresh = sum(_modified(path) >= begun for path in markers)
    if state == "running" and fresh:
        left = round(max(now - begun, 0.0) / fresh * max(total - len(markers), 0), 1)
    failed = sum(
        count
        for path in markers
        for status, count in ((_json(path) or {}).get("statuses") or {}).items()
        if status.startswith("failed")
    )
    return {"blocks": total, "done": min(len(markers), total), "failed_labels": failed, "seconds_left": left}


def _failure(run):
    value = _json(run.root / FAILURE)
    kinds = {"stage": str, "code": int, "message": str, "when": str}
    if isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return {key: value[key] for key in kinds}
    return None


def _begun(run, stage):
    """Whether an attempt at the stage has left something."""
    folder = run.root / stage
    return folder.is_dir() and any(folder.iterdir())


def _lock(run):
    """The file that was made, or written last, when the lock was taken."""
    return run.root / ".lock" if isinstance(run.root, Path) else run.root / "run.json"


def _modified(path: Place) -> float:
    with contextlib.suppress(OSError):  # a file that was just renamed, or is not there yet
        return path.stat().st_mtime
    return 0.0


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _print(value):
    out = console()
    line = f"{value['run']}: {value['state']}"
    if value["holder"]:
        line += f", {shown(value['holder'], 200)}"
    out.print(Text(line), soft_wrap=True)
    grid = Grid(show_edge=False, pad_edge=False)
    grid.add_column("stage", no_wrap=True)
    grid.add_column("state", no_wrap=True)
    grid.add_column("s", justify="right", no_wrap=True)
    grid.add_column("")
    for item in value["stages"]:
        seconds = "" if item["seconds"] is None else f"{item['seconds']:,.1f}"
        text = shown(item["summary"] or "", 1000)
        train = value["train"]
        if item["stage"] == "train" and train and item["state"] != "done":
            text = f"{train['done']:,} of {train['blocks']:,} blocks" + (f"; {text}" if text else "")
            if train["failed_labels"]:
                text += f", {train['failed_labels']:,} labels failed"
            if train["seconds_left"] is not None:
                text += f", about {train['seconds_left']:,.0f} s left"
        grid.add_row(item["stage"], item["state"], seconds, Text(text))
    out.print(grid)
    if value["state"] in ("failed", "unfinished"):
        failure = value["failure"]
        mend = failure is not None and failure["code"] not in AGAIN
        out.print(Text(f"{'mend that, then ' if mend else ''}run the same `tagmill fit` again to go on"))
