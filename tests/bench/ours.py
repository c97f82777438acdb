"""Trains tagmill on a matrix of tests.bench.matrices, as peers.py does with the peers.

    python -m tests.bench.ours flat|folds|tree --matrix FOLDER --out FILE.npz

flat     final models of labels spread over the supports, by groups of sixteen in order of falling support
folds    the same through ovr.fit_block: final models, three out-of-fold models, their scores, curves and histograms
tree     all labels that have positives; written: top5 as by peers.py, from raw scores

No weight is dropped.  Written besides: label_ids and W (flat, folds), gaps (certified relative gap of each label),
cpu_seconds and wall_seconds of what trains, and ready_seconds that it took before to have the kernels compiled, or read
from numba's cache, and to try them on the first group.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config import TrainConfig
from pipeline.kernels import lockstep
from pipeline.kernels.simd import LANES
from pipeline.learners.ovr import Extras, candidates, fit_block, group_lanes, warm_up
from pipeline.learners.placement import label_groups
from tests.bench.matrices import FOLDS, read
from tests.bench.peers import rows, spread, timed, top5


class Trainer:
    """Solves groups of labels on all rows and adds up the seconds."""

    def __init__(self, found, cfg):
        self.X, self.gold, self.cfg = found.X, found.gold, cfg
        self.everywhere = np.ones(found.X.size, bool)
        self.extras = Extras.plain(found.gold.indptr.size - 1)
        self.cpu = self.wall = 0.0

    def solve(self, group):
        solution, cpu, wall = timed(lambda: self._solve(group))
        self.cpu, self.wall = self.cpu + cpu, self.wall + wall
        return solution

    def _solve(self, group):
        cfg = self.cfg
        problem = group_lanes(group, self.gold, cfg, self.extras, candidates(cfg)[0], self.everywhere)
        return lockstep.solve(self.X, problem, cfg.gap, cfg.max_epochs, cfg.seed)

    def seconds(self):
        return {"cpu_seconds": self.cpu, "wall_seconds": self.wall}


def flat(found, label_ids, cfg):
    ready = _ready(lambda: Trainer(found, cfg).solve(label_ids[:LANES].tolist()), cfg)
    trainer = Trainer(found, cfg)
    W, gaps = np.empty((found.X.features + 1, label_ids.size), np.float32), np.empty(label_ids.size)
    for first in range(0, label_ids.size, LANES):
        group = label_ids[first : first + LANES].tolist()
        solution = trainer.solve(group)
        place = slice(first, first + len(group))
        W[:, place] = solution.W.reshape(-1, LANES)[:, : len(group)]
        gaps[place] = solution.gaps[: len(group)]
    return {"W": W, "gaps": gaps, **trainer.seconds(), **ready}


def folds(found, label_ids, cfg):
    ready = _ready(lambda: fit_block(label_ids[:LANES].tolist(), found.X, found.gold, cfg), cfg)
    tables, cpu, wall = timed(lambda: fit_block(label_ids.tolist(), found.X, found.gold, cfg))
    models = {model["label_id"]: model for model in tables["label_models"].to_pylist()}
    W = np.zeros((found.X.features + 1, label_ids.size), np.float32)
    for j, label_id in enumerate(label_ids.tolist()):
        W[models[label_id]["indices"], j] = models[label_id]["weights"]
        W[-1, j] = models[label_id]["bias"]
    gaps = np.array([models[label_id]["solver_gap"] for label_id in label_ids.tolist()])
    return {"W": W, "gaps": gaps, "cpu_seconds": cpu, "wall_seconds": wall, **ready}


def tree(found, cfg):
    support, test = np.diff(found.gold.indptr), found.X_test
    all_groups = label_groups(support, cfg.labels_per_block, np.flatnonzero(support))
    ready = _ready(lambda: Trainer(found, cfg).solve(all_groups[-1]), cfg)
    trainer = Trainer(found, cfg)
    S = np.full((test.size, support.size), -np.inf, np.float32)
    Z, everything, gaps = np.empty(test.size * LANES, np.float32), np.arange(test.size, dtype=np.int32), []
    for group in all_groups:
        solution = trainer.solve(group)
        gaps.append(solution.gaps[: len(group)])
        lockstep.margins(test.indptr, test.indices, test.data, everything, solution.W, Z)
        S[:, group] = Z.reshape(-1, LANES)[:, : len(group)]
    best = np.argpartition(-S, 5, axis=1)[:, :5]
    order = np.argsort(-np.take_along_axis(S, best, 1), axis=1, kind="stable")
    tags = top5(np.take_along_axis(best, order, 1))
    return {"top5": tags, "gaps": np.concatenate(gaps), **trainer.seconds(), **ready}


def _ready(first_group, cfg):
    """Have all that `first_group` needs compiled."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as locks:
        warm_up(Path(locks), cfg)
    first_group()  # on arrays of other types than those of warm_up, for some kernels
    return {"ready_seconds": time.perf_counter() - began}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["flat", "folds", "tree"])
    parser.add_argument("--matrix", type=Path, required=True, help="folder of .npy made by tests.bench.matrices")
    parser.add_argument("--out", type=Path, required=True, help=".npz to write")
    parser.add_argument("--labels", type=int, default=64, help="how many, spread over the supports (default 64)")
    parser.add_argument("--loss", choices=["logistic", "squared_hinge"], default="logistic")
    parser.add_argument("--C", type=float, default=10.0)
    parser.add_argument("--gap", type=float, default=0.001)
    args = parser.parse_args()

    cfg = TrainConfig(C=args.C, loss=args.loss, gap=args.gap, folds=FOLDS, prune=0)
    found = read(args.matrix)
    if args.work == "tree":
        out = tree(found, cfg)
    else:
        label_ids = spread(rows(args.matrix)[1], args.labels)
        out = {"flat": flat, "folds": folds}[args.work](found, label_ids, cfg) | {"label_ids": label_ids}
    np.savez(args.out, **out)
    print(f"{out['cpu_seconds']:.2f} CPU s, {out['wall_seconds']:.2f} wall s")


if __name__ == "__main__":
    main()
