"""Scores of the test fold, kept so that evaluating other thresholds needs no scoring.

    RUN/scores/<key>/scores-00000.npy   (test documents of the part, L) float32
    RUN/scores/<key>/scores-00000.sha256

Of a run in an object store they are in the cache of the host that computed them.  The key stands for weights, features
and folds.  They are no table and no manifest names them: what is missing or has changed is computed again, and anyone
may delete them.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np

from pipeline.host import host_folder
from pipeline.learners import judge
from pipeline.learners.tagger import Weights
from pipeline.storage import ObjectPath, digest, remove, replacing
from pipeline.store import Run

log = logging.getLogger(__name__)

FOLDER = "scores"
SOURCES = (("train", "weights"), ("featurize", "features"), ("split", "folds"))


def folder_of(run: Run, documents: int, labels: int, limit: float, cache_dir: str = "") -> Path | None:
    """Folder of the scores of this fit; None where they would take more than `limit` GB.  Drops those of other fits."""
    named = (item for stage, table in SOURCES for item in run.finished(stage)["tables"][table])
    key = hashlib.sha256("".join(item["sha256"] for item in named).encode()).hexdigest()[:16]
    root = run.root
    if isinstance(root, ObjectPath):
        root = host_folder(cache_dir, f"run-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}")
    folder = root / FOLDER / key
    fits = documents * labels * np.dtype(np.float32).itemsize <= limit * 1e9
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder or not fits:
                remove(other)
    if not fits:
        return None
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    return folder


def kept(folder: Path | None, number: int, part: judge.Part, test: int, weights: Weights) -> np.ndarray | None:
    """Scores of the test documents of a part, (rows, L) float32 on disk: found there, or computed.

    None: nothing to keep, or no place for it.
    """
    rows = judge.rows_of_fold(part.folds, test)
    if folder is None or rows.size == 0:
        return None
    path = _path(folder, number)
    shape = rows.size, weights.bias.size
    if not _whole(path, shape):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o750)  # of an object store: this host has none yet
            with replacing(path) as unfinished:
                _write(unfinished, shape, judge.scored(part.features, rows, weights))
            with replacing(path.with_suffix(".sha256")) as unfinished:
                unfinished.write_text(digest(path))
        except OSError as error:  # a full disk costs time here, not the run
            log.warning("evaluate: scores are not kept: %s", error)
            return None
    return again(folder, number)


def again(folder: Path | None, number: int) -> np.ndarray | None:
    """What `kept` left in an earlier task of the same job."""
    if folder is None or not _path(folder, number).is_file():
        return None
    return np.load(_path(folder, number), mmap_mode="r", allow_pickle=False)


def _path(folder, number):
    return folder / f"scores-{number:05d}.npy"


def _write(path, shape, pieces):
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, np.float32).data)


def _whole(path, shape):
    try:
        if path.with_suffix(".sha256").read_text() != digest(path):
            return False
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError):
        return False
