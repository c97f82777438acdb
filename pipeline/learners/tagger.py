"""A fitted tagger: text -> scores -> probabilities -> tags, as arrays.

It is a folder of plain files (JSON, Parquet, .npy), checked by SHA-256 before anything is parsed; nothing in it is
code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.config import FeaturizeConfig, TagConfig
from pipeline.errors import ConfigError, DataError, shown
from pipeline.kernels import calibration, scoring
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.label_rules import LabelRules, apply, compiled, names_of, parsed
from pipeline.learners.vectorizer import Vocabulary, batches, one_array, vectorize
from pipeline.storage import digest, fetch, read_table
from pipeline.tables import TABLES

FORMAT = 2  # 1: thresholds by label only, which is still written where they are all there is
OTHERS = ("rules.json", "decision.json")  # which a model of before may lack
READ = {  # the columns that are read, the id first
    "vocabulary": ("feature_id", "hash", "idf"),
    "labels": ("label_id", "label"),
    "thresholds": ("label_id", "threshold", "a", "b"),
}
KNOTS = ("knot_score", "knot_log_odds")  # of thresholds; a model of before has none
SCORES_AT_ONCE = 8_000_000  # documents x labels held as a dense block


class Weights(NamedTuple):
    """W (d, L) by feature, and the bias: what `kernels.scoring.score_rows` reads."""

    indptr: np.ndarray  # (d + 1,) int64
    labels: np.ndarray  # (nnz,) int32
    values: np.ndarray  # (nnz,) float32
    bias: np.ndarray  # (L,) float32

    @classmethod
    def load(cls, folder: Path, features: int = 0) -> "Weights":
        """Map the four arrays weights-<name>.npy of a folder.

        Raises DataError where they do not fit each other, or are of fewer features than those of the vocabulary:
        kernels go by these numbers without another look.
        """
        self = cls(*(_array(folder / f"weights-{name}.npy") for name in cls._fields))
        if not self._sound(features):
            raise DataError(
                f"{folder}: the arrays weights-*.npy do not fit each other or the vocabulary; fetch the "
                "model, or fit the run, again"
            )
        return self

    def _sound(self, features):
        if [array.dtype for array in self] != [np.int64, np.int32, np.float32, np.float32]:
            return False
        if any(array.ndim != 1 for array in self) or self.indptr.size <= features:
            return False
        if [self.indptr[0], self.indptr[-1], self.labels.size] != [0, self.values.size, self.values.size]:
            return False
        if (self.indptr[1:] < self.indptr[:-1]).any():  # a difference of such numbers may wrap
            return False
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < self.bias.size:
            return False
        # minimum and maximum are NaN where one value is, and need no copy of the array
        return all(np.isfinite([a.min(), a.max()]).all() for a in (self.values, self.bias) if a.size)

    @classmethod
    def build(cls, folder: Path, model_files, features: int, labels: int) -> list[Path]:
        """Turn the rows of `label_models` (by label) into weights by feature, on disk: two passes, no dense matrix."""
        counts = np.zeros(features + 1, np.int64)
        for part in map(read_table, model_files):
            scoring.count_per_feature(_flat(part, "indices"), counts)
        indptr = np.cumsum(counts)
        paths = [folder / f"weights-{name}.npy" for name in cls._fields]
        np.save(paths[0], indptr)
        label_of = np.lib.format.open_memmap(paths[1], "w+", np.int32, (int(indptr[-1]),))
        value_of = np.lib.format.open_memmap(paths[2], "w+", np.float32, (int(indptr[-1]),))
        bias = np.zeros(labels, np.float32)
        # labels ascending within a feature, so that the bytes do not depend on the order of the blocks
        where = [
            (label_id, path, row)
            for path in model_files
            for row, label_id in enumerate(read_table(path, columns=["label_id"])["label_id"].to_pylist())
        ]
        cursor = indptr[:-1].copy()
        loaded: dict = {}
        for label_id, path, row in sorted(where):
            if path not in loaded:
                loaded[path] = _Models(path)
            bias[label_id], indices, weights = loaded[path].row(row)
            scoring.scatter_weights(label_id, indices, weights, cursor, label_of, value_of)
        label_of.flush()
        value_of.flush()
        np.save(paths[3], bias)
        return paths

    def score(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(m, L) float32 scores of CSR rows."""
        S = np.empty((indptr.size - 1, self.bias.size), np.float32)
        scoring.score_rows(indptr, indices, values, *self[:3], self.bias, S)
        return S


def _array(path):
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError:
        raise
    except Exception as error:  # its header goes through Python's own parser: a SyntaxError, a TokenError, ...
        raise DataError(f"{path}: not readable as an array ({shown(error, 200)}); it is damaged") from error


class _Models:
    """Rows of one part of label_models without a Python object a weight."""

    def __init__(self, path):
        table = read_table(path, columns=["bias", "indices", "weights"])
        self.bias = table["bias"].to_numpy()
        self.indices, self.weights = _flat(table, "indices"), _flat(table, "weights")
        lengths = pa.compute.list_value_length(table["indices"]).to_numpy()
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths

    def row(self, k):
        inside = slice(self.starts[k], self.ends[k])
        return self.bias[k], self.indices[inside], self.weights[inside]


class Decisions(NamedTuple):
    """Thresholds and probability maps by label, from the table `thresholds`, and what comes after them."""

    threshold: np.ndarray  # (L,) float64, +inf: never
    a: np.ndarray  # (L,) float64
    b: np.ndarray  # (L,) float64
    knots: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()  # label, scores, log-odds: of labels with such a map
    rules: LabelRules | None = None  # between labels, last
    document: DocumentRule = DocumentRule()  # by document, before them

    @classmethod
    def from_table(
        cls, thresholds: pa.Table, rules: LabelRules | None = None, document: DocumentRule | None = None
    ) -> "Decisions":
        thresholds = thresholds.sort_by("label_id")
        cut = thresholds["threshold"].fill_null(float("inf"))
        knots: tuple = ()
        if "knot_score" in thresholds.column_names:  # a model of before has lines only
            knots = tuple(
                (int(label), *(thresholds[f"knot_{name}"][label].values.to_numpy() for name in ("score", "log_odds")))
                for label in np.flatnonzero(pa.compute.list_value_length(thresholds["knot_score"]).to_numpy())
            )
        a, b = thresholds["a"].to_numpy(), thresholds["b"].to_numpy()
        return cls(cut.to_numpy(), a, b, knots, rules, document or DocumentRule())

    def log_odds(self, S: np.ndarray) -> np.ndarray:
        """Calibrated log-odds, (m, L) float64: what labels are ranked by, and the sigmoid of which is probability."""
        Z = S * self.a + self.b
        for label, score, log_odds in self.knots:
            Z[:, label] = calibration.log_odds_at(S[:, label], score, log_odds)
        return Z

    def tagged(self, S: np.ndarray, Z: np.ndarray) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """(m, L) bool, and by kind of rule the documents of each label (added, removed); Z are the log-odds of S."""
        chosen = self.before_rules(S, Z)
        return (chosen, {}) if self.rules is None else apply(self.rules, chosen, Z)

    def before_rules(self, S: np.ndarray, Z: np.ndarray) -> np.ndarray:
        """(m, L) bool: what thresholds and the rule by document say, without the rules between labels."""
        above = self.threshold <= S
        if self.document.plain:
            return above
        may = np.isfinite(self.threshold)
        if self.rules is not None and self.rules.old.size:
            # one label has one place in its document's ranking, whether or not Z is merged already
            old, same = self.rules.old, self.rules.same[self.rules.old]
            Z = Z.copy()
            np.maximum.at(Z.T, same, Z[:, old].T)
            np.logical_or.at(above.T, same, above[:, old].T)
            np.logical_or.at(may, same, may[old])
            Z[:, old], above[:, old], may[old] = -np.inf, False, False
        return self.document.apply(above, Z, may)

    def log_odds_of(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The same of single pairs, (m,) float64: labels `ids` with `scores`."""
        z = scores * self.a[ids] + self.b[ids]
        for label, score, log_odds in self.knots:
            mine = ids == label
            if mine.any():
                z[mine] = calibration.log_odds_at(scores[mine], score, log_odds)
        return z


class Tagger(NamedTuple):
    """Everything that is needed to tag a text."""

    vocabulary: Vocabulary
    weights: Weights
    decisions: Decisions
    labels: list[str]
    settings: dict  # featurize.*, tag.* and the identity of the run

    @classmethod
    def load(cls, folder: str | Path) -> "Tagger":
        """From a folder written by `save`.

        Raises DataError for a changed file, and for one that is no part of a model, ConfigError for a newer format.
        """
        folder = Path(folder)
        settings, digests = _card(folder / "tagger.json")
        for name in sorted(digests.keys() | {name for name in OTHERS if (folder / name).exists()}):
            if not (folder / name).is_file() or digest(folder / name) != digests.get(name):
                raise DataError(
                    f"{folder / name}: missing or changed since the model was written; fetch the model again"
                )
        rules, decision = (folder / name for name in OTHERS)
        try:
            vocabulary, labels, thresholds = (pq.read_table(folder / f"{name}.parquet") for name in READ)
            return cls.from_tables(
                vocabulary,
                labels,
                thresholds,
                Weights.load(folder, vocabulary.num_rows),
                settings,
                parsed(rules.read_bytes(), rules) if rules.name in digests else {},
                DocumentRule.parsed(decision.read_bytes(), decision) if decision.name in digests else None,
            )
        except (ValueError, ArithmeticError, pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the file's
            raise DataError(f"{folder}: not a model ({shown(error, 200)}); fetch the model again") from error

    @classmethod
    def from_tables(
        cls,
        vocabulary,
        labels,
        thresholds,
        weights: Weights,
        settings: dict,
        rules: dict | None = None,
        document: DocumentRule | None = None,
    ) -> "Tagger":
        vocabulary, labels, thresholds = map(_by_id, READ, (vocabulary, labels, thresholds))
        names = labels["label"].to_pylist()
        if not len(names) == weights.bias.size == thresholds.num_rows:
            raise DataError(
                f"the model has {weights.bias.size} labels, the label table {len(names)}, "
                f"thresholds {thresholds.num_rows}; they belong to different runs"
            )
        decisions = Decisions.from_table(thresholds, compiled(rules, names) if rules else None, document)
        names = names_of(rules, names) if rules else names
        return cls(Vocabulary.from_table(vocabulary), weights, decisions, names, settings)

    def scores(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(m, L) float32 scores and (m,) the number of known terms of each text."""
        indptr, indices, values = vectorize(texts, self.vocabulary, self.settings["ngrams"], self.settings["sublinear"])
        return self.weights.score(indptr, indices, values), np.diff(indptr)

    def tag(self, doc_ids: pa.Array, texts: pa.Array) -> pa.Table:
        """Rows of the table `tags`; a text without any known term is scored by the bias alone."""
        pieces = list(self.tag_batches(pa.table({"doc_id": doc_ids, "text": texts})))
        return pa.concat_tables([TABLES["tags"].schema.empty_table(), *(tags for tags, _ in pieces)])

    def tag_batches(self, documents: pa.Table) -> Iterator[tuple[pa.Table, int]]:
        """Tags of slices of `documents` (doc_id, text), and how many of them had no known term."""
        return map(self.tag_batch, self.batches(documents))

    def batches(self, documents: pa.Table) -> Iterator[pa.Table]:
        """Slices of `documents` that are scored at once."""
        rows = max(1, SCORES_AT_ONCE // max(1, len(self.labels)))
        for batch in batches(documents):
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows).combine_chunks()

    def tag_batch(self, batch: pa.Table) -> tuple[pa.Table, int]:
        """Tags of one of them, and how many documents had no known term."""
        S, known = self.scores(one_array(batch["text"]))
        lists = tag_lists(S, self.decisions, self.labels, self.settings["max_tags"])
        return pa.table([batch["doc_id"], lists], schema=TABLES["tags"].schema), int((known == 0).sum())


def _card(path):
    """The settings that tagger.json holds, and the SHA-256 by name of file."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version, settings, digests = card["format"], card["settings"], card["sha256"]
        if not isinstance(version, int):
            raise ValueError(f"format is {version!r}")
        if version > FORMAT:
            raise ConfigError(f"{path}: format {version} is newer than this version reads ({FORMAT}); upgrade tagmill")
        needed = {f"{name}.parquet" for name in READ} | {f"weights-{name}.npy" for name in Weights._fields}
        if version > 1:  # it does not tag by thresholds alone, whatever is gone
            needed.add("decision.json")
        if not needed <= digests.keys() <= needed | set(OTHERS):
            raise ValueError(f"expected the sha256 of {', '.join(sorted(needed))}")
        featurize = FeaturizeConfig(ngrams=settings["ngrams"], sublinear=settings["sublinear"])
        most = TagConfig(max_tags=settings["max_tags"]).max_tags
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not the card of a tagger ({shown(error, 200)}); fetch the model again") from error
    return {**settings, "ngrams": featurize.ngrams, "sublinear": featurize.sublinear, "max_tags": most}, digests


def _by_id(name: str, table: pa.Table) -> pa.Table:
    """A table in the order of its ids, which count its rows.

    Raises DataError where it is not what kernels and tags may go by: another type, a null, NaN, a name twice.
    """
    schema, first = TABLES[name].schema, READ[name][0]

    def expect(true, what):
        if not true:
            raise DataError(f"table {name}: {what}; it is damaged, or of another version: fit or fetch the model again")

    knots = [column for column in KNOTS if column in table.column_names]
    expect(len(knots) != 1, f"no column to go with {knots}")
    for column in (*READ[name], *knots):
        expect(table.column_names.count(column) == 1, f"{table.column_names.count(column)} columns {column}")
        expect(table[column].type == schema.field(column).type, f"{column} is {table[column].type}")
        expect(column == "threshold" or not table[column].null_count, f"{column} has nulls")
        if pa.types.is_floating(table[column].type):
            values = table[column].drop_null().to_numpy()
            good = ~np.isnan(values) if column == "threshold" else np.isfinite(values)
            expect(good.all(), f"{column} holds numbers that are none")
    table = table.sort_by(first)
    expect(np.array_equal(table[first].to_numpy(), np.arange(table.num_rows)), f"{first} does not count its rows")
    for column in ("hash", "label"):
        if column in READ[name]:
            expect(len(pa.compute.unique(table[column])) == table.num_rows, f"a {column} stands twice")
    if knots:
        _check_knots(table, expect)
    return table


def _check_knots(table, expect):
    score, log_odds = (_flat(table, column) for column in KNOTS)
    lengths = [pa.compute.list_value_length(table[column]).to_numpy() for column in KNOTS]
    expect(np.array_equal(*lengths), "knots of different numbers")
    expect(np.isfinite(score).all() and np.isfinite(log_odds).all(), "knots hold numbers that are none")
    ends = np.cumsum(lengths[0])
    inside = np.ones(max(0, score.size - 1), np.bool_)  # whether a knot and the next are of one label
    inside[ends[(ends > 0) & (ends < score.size)] - 1] = False
    expect((np.diff(score)[inside] >= 0).all(), "knots do not ascend")


def tag_lists(S: np.ndarray, decisions: Decisions, labels: list[str], max_tags: int = 0) -> pa.Array:
    """Tags of scored rows: list of struct(label, score, probability, threshold), most probable first, then by label."""
    if decisions.rules is None and decisions.document.plain:
        indptr, ids = scoring.tags_of_rows(S, decisions.threshold)
    else:
        rows, ids = np.nonzero(decisions.tagged(S, decisions.log_odds(S))[0])
        indptr = np.searchsorted(rows, np.arange(S.shape[0] + 1))
    row = np.repeat(np.arange(S.shape[0]), np.diff(indptr))
    score = S[row, ids].astype(np.float64)
    log_odds = decisions.log_odds_of(ids, score)
    order = np.lexsort((ids, -log_odds, row))
    if max_tags:
        order = order[np.arange(order.size) - indptr[row] < max_tags]
        indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(indptr), max_tags))])
    ids, score, log_odds = ids[order], score[order], log_odds[order]
    with np.errstate(over="ignore"):
        probability = 1.0 / (1.0 + np.exp(-log_odds))
    fields = TABLES["tags"].schema.field("tags").type.value_type
    names = pa.DictionaryArray.from_arrays(ids, pa.array(labels, pa.string())).cast(pa.string())
    columns = [names, pa.array(score), pa.array(probability), pa.array(decisions.threshold[ids])]
    structs = pa.StructArray.from_arrays(columns, fields=list(fields))
    return pa.ListArray.from_arrays(pa.array(indptr.astype(np.int32)), structs).cast(
        TABLES["tags"].schema.field("tags").type
    )


def save(
    folder: Path,
    vocabulary: pa.Table,
    labels: pa.Table,
    thresholds: pa.Table,
    weight_files,
    settings: dict,
    rules: dict | None = None,
    document: DocumentRule | None = None,
) -> None:
    """Write a tagger folder for `Tagger.load`."""
    document = document or DocumentRule()
    for name, table in (("vocabulary", vocabulary), ("labels", labels), ("thresholds", thresholds)):
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    for path in weight_files:
        fetch(path, folder / path.name)
    for name, value in (("rules.json", rules or {}), ("decision.json", document.model_dump())):
        (folder / name).write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    # an earlier version would tag by thresholds alone, without a word
    version = 1 if document.plain else FORMAT
    card = {"format": version, "settings": settings, "sha256": {p.name: digest(p) for p in sorted(folder.iterdir())}}
    (folder / "tagger.json").write_text(json.dumps(card, indent=1, sort_keys=True), encoding="utf-8")


def _flat(table, column):
    return pa.compute.list_flatten(table[column]).combine_chunks().to_numpy()
