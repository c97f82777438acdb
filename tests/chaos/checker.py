"""What must hold of a run folder at any moment, checked without any of the pipeline's code.

    python -m tests.chaos.checker RUN TRUTH.json

TRUTH: {"documents": [doc_id, ...], "labels": [...], "records": n} as the corpus was generated.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

STAGES = ("ingest", "split", "featurize", "train", "calibrate", "evaluate")
MODEL = ("vocabulary", "label_models", "curves", "histograms", "weights", "thresholds", "rules.json", "decision.json")
JUDGED = ("label_counts", "confusions", "metrics.json")
COUNTED = {"ingest": ("documents", "rejects"), "train": ("label_models",), "evaluate": ("test_documents",)}


def manifests(run: Path) -> dict[str, dict]:
    """Finished stages; a manifest that is no JSON is an error of the caller's to tell."""
    paths = {stage: run / stage / "MANIFEST.json" for stage in STAGES}
    return {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.exists()}


def files(run: Path, manifest: dict, table: str) -> list[Path]:
    return [run / manifest["stage"] / manifest["attempt"] / item["file"] for item in manifest["tables"][table]]


def rows(run: Path, manifest: dict, table: str, *columns: str) -> list[dict]:
    parts = (pq.read_table(path, columns=list(columns)) for path in files(run, manifest, table))
    return [row for part in parts for row in part.to_pylist()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def violations(run: Path, truth: dict) -> list[str]:
    """Everything that is wrong with what a reader of the folder would see; empty where nothing is."""
    if not run.exists():
        return []
    found = []
    try:
        known = manifests(run)
    except ValueError as error:
        return [f"a manifest is not whole: {error}"]
    for name in ("run.json", "metrics.json"):
        try:
            json.loads((run / name).read_text())
        except FileNotFoundError:
            pass
        except ValueError:
            found.append(f"{name} is not whole")
    if list(known) != list(STAGES[: len(known)]):
        found.append(f"stages are finished out of order: {list(known)}")
    for stage, manifest in known.items():
        found += [f"{stage}: no {table}" for table in COUNTED.get(stage, ()) if table not in manifest["tables"]]
        for table in manifest["tables"]:
            for path, item in zip(files(run, manifest, table), manifest["tables"][table], strict=True):
                if not path.is_file():
                    found.append(f"{stage}: {path.name} is missing")
                elif path.stat().st_size != item["bytes"] or sha256(path) != item["sha256"]:
                    found.append(f"{stage}: {path.name} has changed")
    if found:
        return found
    if "ingest" in known:
        ids = Counter(row["doc_id"] for row in rows(run, known["ingest"], "documents", "doc_id"))
        rejected = len(rows(run, known["ingest"], "rejects", "reason"))
        lost, more = Counter(truth["documents"]) - ids, ids - Counter(truth["documents"])
        if lost or more:
            found.append(f"{lost.total()} documents lost, {more.total()} twice or foreign")
        if ids.total() + rejected != truth["records"]:
            found.append(f"{ids.total()} accepted + {rejected} rejected, of {truth['records']} records")
    if "train" in known:
        models = Counter(row["label_id"] for row in rows(run, known["train"], "label_models", "label_id"))
        if models != Counter(range(len(truth["labels"]))):
            found.append(f"label_models has {models.total()} rows for {len(truth['labels'])} labels")
    if "evaluate" in known:
        tested = Counter(row["row"] for row in rows(run, known["evaluate"], "test_documents", "row"))
        if tested.total() != len(tested) or tested.total() != known["split"]["documents"]["test"]:
            found.append(f"test_documents has {tested.total()} rows, {len(tested)} of them distinct")
    return found


def leftovers(run: Path) -> list[str]:
    """Files of a finished run that no manifest names: temporary ones, and folders of dead attempts."""
    found = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
    for stage, manifest in manifests(run).items():
        found += [f"{stage}/{p.name}" for p in (run / stage).iterdir() if p.is_dir() and p.name != manifest["attempt"]]
    return found


def prints(run: Path) -> dict[str, list[str]]:
    """SHA-256 of every file of the model and of its metrics."""
    known = manifests(run)
    of_stage = {table: manifest for manifest in known.values() for table in manifest["tables"]}
    return {table: [sha256(path) for path in files(run, of_stage[table], table)] for table in (*MODEL, *JUDGED)}


if __name__ == "__main__":
    wrong = violations(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))
