"""Earlier versions of what calibrate and evaluate left, kept in the run folder.

    RUN/versions/0001/version.json      the manifest of calibrate, and what evaluate made of it
    RUN/versions/0001/...               thresholds-00000.parquet, rules.json, decision.json, metrics.json

A version is kept when it is about to be replaced: written beside and renamed, so it is whole or not there.  Its files
are few and small; reports, features and models are not among them.
"""

import json
import logging
import time
from pathlib import Path

from pipeline.config import Config, flat
from pipeline.errors import DataError, InputError, shown
from pipeline.storage import ObjectPath, appearing, digest, explained, fetch
from pipeline.store import MANIFEST, Run, write_bytes, write_json

log = logging.getLogger(__name__)

FOLDER, CARD = "versions", "version.json"
# what a manifest says of its own accord; the rest are facts of the stage
OWN = ("stage", "fingerprint", "recipe", "attempt", "tables", "schemas", "rows")


def keep(run: Run) -> int | None:
    """Keep what calibrate and evaluate have published; call it, with the lock held, before they are replaced.

    Returns its number; the same where it is kept already, None where there is nothing whole to keep.
    """
    state = _published(run)
    if state is None:
        return None
    versions = kept(run)
    for version in versions:
        if _marks(version) == _marks(state):
            return version["number"]
    try:
        paths = [path for table in state["calibrate"]["tables"] for path in run.files(table, verify=True)]
        if state["evaluate"]:
            paths += run.files("metrics.json", verify=True)
    except DataError as error:
        log.warning("versions: %s; this version is not kept", error)
        return None
    number = 1 + max((version["number"] for version in versions), default=0)
    run.fenced()
    folder = run.root / FOLDER / f"{number:04d}"
    with explained(folder.parent, "write to"), appearing(folder, CARD) as part:
        for path in paths:
            fetch(path, part / path.name)
        write_json(part / CARD, {"number": number, **state})
    log.info("versions: kept as number %d", number)
    return number


def kept(run: Run) -> list[dict]:
    """The cards of the kept versions, by number: number, when, calibrate (manifest), evaluate (or None)."""
    folder = run.root / FOLDER
    # what a killed process was writing has no number yet, or in an object store no card
    cards = [path / CARD for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    found = (_card(path) for path in cards if not isinstance(path, ObjectPath) or path.is_file())
    return sorted(found, key=lambda card: card["number"])


def version(run: Run, number: int) -> dict:
    """The card of one version.  Raises InputError where there is none of that number."""
    versions = {card["number"]: card for card in kept(run)}
    if number not in versions:
        known = ", ".join(map(str, versions)) or "none"
        raise InputError(f"{run.root}: no version {number}; kept are: {known} (`tagmill show {run.root} --versions`)")
    return versions[number]


def settings(card: dict) -> dict[str, dict]:
    """{section: {setting: value}} of calibrate and evaluate that a version was made with."""
    found = {**card["calibrate"]["recipe"]["settings"], **(card["evaluate"] or {}).get("settings", {})}
    nested: dict[str, dict] = {}
    for key, value in found.items():
        section, name = key.split(".", 1)
        # a setting that names a file stands in the recipe with the identity of its content
        nested.setdefault(section, {})[name] = value.rpartition("@")[0] if key == "calibrate.rules" and value else value
    return nested


def put_back(run: Run, card: dict) -> None:
    """Publish the files of a version as the output of calibrate, byte for byte; evaluate has to run after it.

    Raises DataError, before anything is published, where a file is missing or has changed.
    """
    manifest = card["calibrate"]
    attempt = run.attempt("calibrate")
    folder = run.root / FOLDER / f"{card['number']:04d}"
    for item in (item for items in manifest["tables"].values() for item in items):
        path = folder / item["file"]
        if Path(item["file"]).name != item["file"] or not path.is_file() or digest(path) != item["sha256"]:
            raise DataError(f"{path}: missing or changed since it was kept; choose another version")
        with explained(attempt, "write to"):
            write_bytes(attempt / item["file"], path.read_bytes())
    facts = {key: value for key, value in manifest.items() if key not in OWN}
    run.commit("calibrate", attempt, manifest["recipe"], manifest["tables"], facts)


def listed(run: Run) -> list[dict]:
    """One row a version, the earliest first: number (None: the present one, not kept yet), when (UTC), current, rule,
    settings (those that differ from the row before, in the first row from the defaults), micro_f1, macro_f1 (None: not
    evaluated) and same_models: whether its thresholds belong to the models that the run has now.
    """
    present = _published(run)
    cards = kept(run)
    marks = [_marks(card) for card in cards]
    if present and _marks(present) not in marks:
        cards.append({"number": None, **present})
    inputs = present["calibrate"]["recipe"]["inputs"] if present else None
    before = {key: value for key, value in flat(Config()).items() if key.startswith(("calibrate.", "evaluate."))}
    rows = []
    for card in cards:
        now = {f"{section}.{name}": value for section, found in settings(card).items() for name, value in found.items()}
        metrics = _metrics(run, card)
        rows.append(
            {
                "number": card["number"],
                "when": card["when"],
                "current": present is not None and _marks(card) == _marks(present),
                "rule": now.get("calibrate.rule"),
                "settings": {key: value for key, value in now.items() if before.get(key) != value},
                "micro_f1": metrics.get("micro_f1"),
                "macro_f1": metrics.get("macro_f1"),
                "same_models": inputs in (None, card["calibrate"]["recipe"]["inputs"]),
            }
        )
        before = now
    return rows


def _published(run):
    """What is there now, as a card without a number; None where calibrate is not finished."""
    calibrated, evaluated = run.manifest("calibrate"), run.manifest("evaluate")
    if calibrated is None:
        return None
    if evaluated and evaluated["recipe"]["inputs"].get("calibrate") != calibrated["fingerprint"]:
        evaluated = None  # of other thresholds: a refit is half done
    seconds = (run.root / "calibrate" / MANIFEST).stat().st_mtime
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)),
        "calibrate": calibrated,
        "evaluate": evaluated
        and {
            "fingerprint": evaluated["fingerprint"],
            "settings": evaluated["recipe"]["settings"],
            "metrics": evaluated["tables"]["metrics.json"],
        },
    }


def _marks(card):
    return [card["calibrate"]["fingerprint"], (card["evaluate"] or {}).get("fingerprint")]


def _card(path):
    try:
        with explained(path, "read"):
            content = path.read_bytes()
        card = json.loads(content)
        card["number"], card["when"], card["calibrate"]["recipe"]["settings"], card["calibrate"]["recipe"]["inputs"]
        card["calibrate"]["tables"], card["calibrate"]["fingerprint"], card["evaluate"]
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: {shown(str(error), 100)}; not the card of a version: remove its folder") from error
    return card


def _metrics(run, card):
    if not card["evaluate"]:
        return {}
    number = card["number"]
    kept_one = run.root / FOLDER / f"{number:04d}" / "metrics.json" if number is not None else None
    path = kept_one or run.files("metrics.json")[0]
    with explained(path, "read"):
        return json.loads(path.read_text(encoding="utf-8"))["metrics"]
