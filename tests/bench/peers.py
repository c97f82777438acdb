"""Trains one peer library on a matrix of tests.bench.matrices, in the environment of peers.lock, on one thread.

    python tests/bench/peers.py PEER --matrix FOLDER --out FILE.npz

Flat peers, one model a label, all of the same problem: 1/2 |w|^2 + C sum_i loss(y_i w.x_i), no weight cut off, where
the last feature of each x is 1 (the bias, regularised like the others). Written: label_ids and W, one column a label.
A label without positive rows has zero weights where the peer cannot train it.

Tree peers, all labels, the peer's own defaults. Written: top5, the label ids of each test row, best first (-1: none),
and predict_cpu_seconds.

Both: version, cpu_seconds and wall_seconds of the call that trains, with what it must do itself (the clustering of
labels, omikuji's reading of its text file) and without making its input or reading its weights.
"""

import argparse
import contextlib
import os
import resource
import struct
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

# before the libraries below read them
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import scipy.sparse as sp

ITERATIONS = 10_000  # far above what a label needs: the tolerance ends the training


def timed(call):
    """What `call` returns, its CPU seconds (user and system, children too) and its wall seconds."""

    def cpu():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, before = time.perf_counter(), cpu()
    result = call()
    return result, cpu() - before, time.perf_counter() - wall


def rows(folder, prefix=""):
    """Rows and 0/1 labels of `folder`, (n, d) CSR and (n, L) CSC in float32."""

    def load(name):
        return np.load(folder / f"{prefix}{name}.npy", allow_pickle=False)

    indptr, gold_indptr, gold_rows = load("indptr"), load("gold_indptr"), load("gold_rows")
    n, d = indptr.size - 1, int(np.load(folder / "features.npy", allow_pickle=False)[0])
    X = sp.csr_matrix((load("data"), load("indices"), indptr), (n, d))
    Y = sp.csc_matrix((np.ones(gold_rows.size, np.float32), gold_rows, gold_indptr), (n, gold_indptr.size - 1))
    return X, Y


def spread(Y, wanted):
    """Ids of `wanted` labels, evenly spread over those with positives in order of falling support."""
    support = np.diff(Y.indptr)
    order = np.argsort(-support, kind="stable")[: np.count_nonzero(support)]
    return order[np.linspace(0, order.size - 1, min(wanted, order.size)).astype(int)]


def by_row(X):
    """Column ids and values of each row."""
    return zip(np.split(X.indices, X.indptr[1:-1]), np.split(X.data, X.indptr[1:-1]), strict=True)


def with_bias(X, dtype):
    """X and a last column of ones."""
    return sp.hstack([X, np.ones((X.shape[0], 1), dtype)], "csr", dtype)


# Flat peers: (X, Y, loss, C, tolerance or None for the peer's own) to a call that trains, and its result to W.


def sklearn_liblinear(X, Y, loss, C, tolerance):
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    X = with_bias(X, np.float64)
    same = {"dual": True, "C": C, "fit_intercept": False, "max_iter": ITERATIONS, "random_state": 0}
    if tolerance is not None:
        same["tol"] = tolerance
    targets = [Y[:, [j]].toarray().ravel() for j in range(Y.shape[1])]

    def fit(y):
        if not y.any():
            return np.zeros(X.shape[1])
        model = LogisticRegression(solver="liblinear", **same) if loss == "logistic" else LinearSVC(loss=loss, **same)
        return model.fit(X, y).coef_[0]

    return lambda: [fit(y) for y in targets], lambda weights: np.stack(weights, axis=1)


def pecos_ova(X, Y, loss, C, tolerance):
    from pecos.xmc.xlinear.model import XLinearModel

    X = with_bias(X, np.float32)  # its own bias stays where it began under L2R_LR_DUAL (version 1.2.8)
    solver = {"logistic": "L2R_LR_DUAL", "squared_hinge": "L2R_L2LOSS_SVC_DUAL"}[loss]
    own = {"solver_type": solver, "Cp": C, "Cn": C, "threshold": 0.0, "bias": -1, "max_iter": ITERATIONS, "threads": 1}
    if tolerance is not None:
        own["eps"] = tolerance
    return lambda: XLinearModel.train(X, Y, **own), lambda model: model.model.model_chain[0].W.toarray()


def napkinxc_br(X, Y, loss, C, tolerance):
    from napkinxc.models import BR  # its OVR is multi-class

    own = {"loss": {"logistic": "log", "squared_hinge": "l2"}[loss], "liblinear_c": C, "weights_threshold": 0}
    own |= {"norm": False, "bias": 1.0, "liblinear_max_iter": ITERATIONS, "threads": 1, "seed": 0}
    if tolerance is not None:
        own["liblinear_eps"] = tolerance
    targets = Y.tocsr()

    def train():
        with tempfile.TemporaryDirectory() as folder:
            BR(folder, **own).fit(X, targets)
            return (Path(folder) / "weights.bin").read_bytes()

    return train, lambda saved: napkinxc_weights(saved, X.shape[1], Y.shape[1])


def napkinxc_weights(saved, d, labels):
    """W out of napkinXC's weights.bin, as version 0.7 writes it; its Python interface has no weights."""
    W = np.zeros((d + 1, labels))
    (count,) = struct.unpack_from("<i", saved)  # up to the last label that has rows
    at = struct.calcsize("<i")
    for j in range(min(count, labels)):
        classes, first, _loss = struct.unpack_from("<iii", saved, at)
        at += struct.calcsize("<iii")
        if classes < 2:  # rows of one class only
            continue
        _, _, size, filled, sparse = struct.unpack_from("<QQQQ?", saved, at)
        at += struct.calcsize("<QQQQ?")
        w = np.zeros(max(size, d + 2))
        if sparse:
            stored = np.frombuffer(saved, [("index", "<i4"), ("value", "<f4")], filled, at)
            w[stored["index"]] = stored["value"]
        else:
            stored = np.frombuffer(saved, "<f4", size, at)
            w[:size] = stored
        at += stored.nbytes + 1  # and whether gradients follow: no
        W[:, j] = np.append(w[2 : d + 2], w[1])  # features count from 2, the bias is 1
        if first == 0:
            W[:, j] *= -1
    return W


def libmultilabel(X, Y, loss, C, tolerance):
    from libmultilabel.linear import train_1vsrest

    options = f"-s {7 if loss == 'logistic' else 1} -c {C} -B 1 -m 1"
    if tolerance is not None:
        options += f" -e {tolerance}"
    X, Y = X.astype(np.float64), Y.tocsr().astype(np.int32)

    def train(rows=slice(None)):
        with mock.patch("psutil.cpu_count", return_value=1):  # its number of threads
            return train_1vsrest(Y[rows], X[rows], options=options, verbose=False)

    train(slice(2))  # numba compiles
    return train, lambda model: np.asarray(model.weights)


# Tree peers: (X, Y) to a call that trains, and its result to a function of rows that returns their top5.


def pecos_xrlinear(X, Y):
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    def train():
        embedding = LabelEmbeddingFactory.create(Y, X, method="pifa", threads=1)
        return XLinearModel.train(X, Y, C=Indexer.gen(embedding, threads=1), threads=1)

    def tagger(model):
        with tempfile.TemporaryDirectory() as folder:  # as it is served: several times faster than as it was trained
            model.save(folder)
            model = XLinearModel.load(folder, is_predict_only=True)

        def predict(X_test):
            found = model.predict(X_test, only_topk=5, threads=1)
            return top5([labels[np.argsort(-scores, kind="stable")] for labels, scores in by_row(found)])

        return predict

    return train, tagger


def omikuji(X, Y):
    from omikuji import Model

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "train.txt"
    with path.open("w") as file:
        print(*X.shape, Y.shape[1], file=file)
        for (labels, _), (features, values) in zip(by_row(Y.tocsr()), by_row(X), strict=True):
            pairs = (f"{j}:{v:.9g}" for j, v in zip(features, values, strict=True))
            print(",".join(map(str, labels)), *pairs, file=file)

    def train():
        with folder, silence():
            return Model.train_on_data(str(path), n_threads=1)

    def tagger(model):
        model.init_prediction_thread_pool(1)

        def predict(X_test):
            pairs = (list(zip(features.tolist(), values.tolist(), strict=True)) for features, values in by_row(X_test))
            return top5([[label for label, _ in model.predict(row, top_k=5)] for row in pairs])

        return predict

    return train, tagger


@contextlib.contextmanager
def silence():
    """Nothing to the terminal from native code: omikuji writes a line for every row and label."""
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for was, fd in zip(kept, (1, 2), strict=True):
            os.dup2(was, fd)
            os.close(was)


def top5(found):
    """Label ids of each row as (n, 5), -1 after the last."""
    out = np.full((len(found), 5), -1, np.int64)
    for row, labels in zip(out, found, strict=True):
        row[: len(labels)] = labels[:5]
    return out


FLAT = {
    "sklearn-liblinear": (sklearn_liblinear, ["scikit-learn"]),
    "pecos-ova": (pecos_ova, ["libpecos"]),
    "napkinxc-ovr": (napkinxc_br, ["napkinxc"]),
    "libmultilabel": (libmultilabel, ["libmultilabel", "liblinear-multicore"]),
}
TREES = {"pecos-xrlinear": (pecos_xrlinear, ["libpecos"]), "omikuji": (omikuji, ["omikuji"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[*FLAT, *TREES])
    parser.add_argument("--matrix", type=Path, required=True, help="folder of .npy made by tests.bench.matrices")
    parser.add_argument("--out", type=Path, required=True, help=".npz to write")
    flat = parser.add_argument_group("flat peers only")
    flat.add_argument("--labels", type=int, default=64, help="how many, spread over the supports (default 64)")
    flat.add_argument("--loss", choices=["logistic", "squared_hinge"], default="logistic")
    flat.add_argument("--C", type=float, default=10.0)
    flat.add_argument("--left-out", type=int, choices=[0, 1, 2], help="train on the rows of the other folds")
    flat.add_argument("--tolerance", type=float, help="of the solver (default: the peer's own)")
    args = parser.parse_args()
    for name in ("labels", "loss", "C", "left_out", "tolerance") if args.peer in TREES else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for the flat peers")

    make, distributions = (FLAT | TREES)[args.peer]
    X, Y = rows(args.matrix)
    out = {}
    try:
        out["version"] = ", ".join(f"{name} {metadata.version(name)}" for name in distributions)
        if args.peer in FLAT:
            out["label_ids"] = spread(Y, args.labels)
            Y = Y[:, out["label_ids"]]
            if args.left_out is not None:
                used = np.load(args.matrix / "fold.npy", allow_pickle=False) != args.left_out
                X, Y = X[used], Y[used]
            train, finish = make(X, Y, args.loss, args.C, args.tolerance)
        else:
            train, finish = make(X, Y)
    except ImportError as error:  # of which PackageNotFoundError is one
        sys.exit(f"peers.py: {args.peer} is not in {sys.prefix}, install tests/bench/peers.lock: {error}")

    model, out["cpu_seconds"], out["wall_seconds"] = timed(train)
    if args.peer in FLAT:
        out["W"] = finish(model).astype(np.float64)
    else:
        predict, (X_test, _) = finish(model), rows(args.matrix, "test_")
        out["top5"], out["predict_cpu_seconds"], _ = timed(lambda: predict(X_test))
    np.savez(args.out, **out)
    print(f"{args.peer} ({out['version']}): {out['cpu_seconds']:.2f} CPU s, {out['wall_seconds']:.2f} wall s")


if __name__ == "__main__":
    main()
