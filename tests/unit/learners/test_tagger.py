import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.config import FeaturizeConfig
from pipeline.errors import ConfigError, DataError
from pipeline.learners import tagger, vectorizer
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.tagger import Decisions, Tagger, Weights, save, tag_lists
from pipeline.learners.vectorizer import count_documents
from pipeline.stages.featurize import choose_terms
from pipeline.storage import digest
from pipeline.tables import TABLES

FEATURES, LABELS = 30, 9
SETTINGS = {"ngrams": 1, "sublinear": True, "max_tags": 0, "run": "toy"}


def model_rows(seed=0, constant=()):
    """Rows of label_models; labels in `constant` have no weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for label_id in range(LABELS):
        count = 0 if label_id in constant else rng.integers(1, FEATURES)
        kept = np.sort(rng.permutation(FEATURES)[:count]).astype(np.int32)
        rows.append(
            {
                "label_id": label_id,
                "bias": float(np.float32(rng.normal())),
                "indices": kept,
                "weights": rng.normal(size=count).astype(np.float32),
                "C": 1.0,
                "positive_weight": 1.0,
                "epochs": 1,
                "gap": 0.0,
                "solver_gap": 0.0,
                "objective": 0.0,
                "status": "ok" if count else "no_positives",
            }
        )
    return rows


def write_parts(folder, rows, parts):
    """`rows` as files, one for each list of row numbers in `parts`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, numbers in enumerate(parts):
        paths.append(folder / f"part-{k}.parquet")
        pq.write_table(pa.Table.from_pylist([rows[i] for i in numbers], TABLES["label_models"].schema), paths[-1])
    return paths


def built(folder, rows, parts):
    paths = Weights.build(folder, write_parts(folder, rows, parts), FEATURES, LABELS)
    return paths, Weights.load(folder)


def dense_of(weights):
    W = np.zeros((FEATURES, LABELS), np.float32)
    for f in range(FEATURES):
        inside = slice(weights.indptr[f], weights.indptr[f + 1])
        W[f, weights.labels[inside]] = weights.values[inside]
    return W


@pytest.mark.parametrize("constant", [(), (0, 4), (8,), tuple(range(LABELS))])
def test_weights_by_feature_are_the_models(tmp_path, constant):
    rows = model_rows(constant=constant)
    _, weights = built(tmp_path, rows, [range(LABELS)])
    W = dense_of(weights)
    for row in rows:
        want = np.zeros(FEATURES, np.float32)
        want[row["indices"]] = row["weights"]
        assert_array_equal(W[:, row["label_id"]], want)
        assert weights.bias[row["label_id"]] == np.float32(row["bias"])
    assert weights.indptr[-1] == weights.labels.size == sum(len(row["indices"]) for row in rows)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[8, 3, 1], [], [0, 7], [6, 5, 4, 2]]])
def test_the_bytes_do_not_depend_on_the_parts_or_their_order(tmp_path, parts):
    rows = model_rows()
    want, _ = built(tmp_path / "one", rows, [range(LABELS)])
    for name, order in (("forward", parts), ("backward", parts[::-1])):
        found, _ = built(tmp_path / name, rows, order)
        assert [p.name for p in found] == [p.name for p in want]
        assert [p.read_bytes() for p in found] == [p.read_bytes() for p in want]


def test_score_is_the_dense_product(tmp_path):
    _, weights = built(tmp_path, model_rows(), [range(LABELS)])
    rng = np.random.default_rng(1)
    X = (rng.random((20, FEATURES)) * (rng.random((20, FEATURES)) < 0.3)).astype(np.float32)
    row, indices = np.nonzero(X)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=20))])
    S = weights.score(indptr, indices.astype(np.int32), X[row, indices])
    assert_allclose(S, X.astype(np.float64) @ dense_of(weights) + weights.bias, rtol=1e-5, atol=1e-5)


NAMES = ["ant", "bee", "cow", "dog", "elk"]


def decisions(threshold, a=(1.0,) * 5, b=(0.0,) * 5):
    return Decisions(np.array(threshold, np.float64), np.array(a, np.float64), np.array(b, np.float64))


def labels_of(lists):
    return [[tag["label"] for tag in tags] for tags in lists.to_pylist()]


def test_tags_are_sorted_by_probability_then_by_label():
    S = np.array([[1, 3, 2, 3, -9], [0, 0, 0, 0, 0], [-1, -1, -1, -1, -1]], np.float32)
    assert labels_of(tag_lists(S, decisions([0] * 5), NAMES)) == [["bee", "dog", "cow", "ant"], NAMES, []]


def test_the_order_is_that_of_the_probabilities_not_of_the_scores():
    S = np.array([[5, 1, 1, 1, 1]], np.float32)
    found = tag_lists(S, decisions([0] * 5, a=(0.1, 2, 1, 1, 1), b=(0, 0, 0.5, -4, 0)), NAMES)
    assert labels_of(found) == [["bee", "cow", "elk", "ant", "dog"]]


def test_probabilities_that_round_to_1_keep_the_order_of_their_log_odds():
    S = np.array([[50, 60, 900, 40, 70]], np.float32)
    assert labels_of(tag_lists(S, decisions([0] * 5), NAMES)) == [["cow", "elk", "bee", "ant", "dog"]]


def test_a_tag_says_its_score_probability_and_threshold():
    S = np.array([[0.25, -2, -np.inf, 1, 800]], np.float32)
    found = tag_lists(S, decisions([0.25, -3, -4, 2, 9], a=(2, 1, 1, 1, 1), b=(1, 1, 0, 0, 0)), NAMES)
    assert found.type == TABLES["tags"].schema.field("tags").type
    sigmoid = [1 / (1 + np.exp(-z)) for z in (800, 1.5, -1)]
    want = [("elk", 800, sigmoid[0], 9), ("ant", 0.25, sigmoid[1], 0.25), ("bee", -2, sigmoid[2], -3)]
    assert [tuple(tag.values()) for tag in found.to_pylist()[0]] == want


def test_an_infinite_threshold_is_never_reached():
    S = np.full((3, 5), 1e30, np.float32)
    assert labels_of(tag_lists(S, decisions([np.inf, 0, np.inf, np.inf, 0]), NAMES)) == [["bee", "elk"]] * 3


@pytest.mark.parametrize("max_tags", [1, 2, 3, 5, 9])
def test_max_tags_keeps_the_most_probable(max_tags):
    S = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    S[7] = -9
    every = tag_lists(S, decisions([-0.5] * 5), NAMES).to_pylist()
    assert tag_lists(S, decisions([-0.5] * 5), NAMES, max_tags).to_pylist() == [tags[:max_tags] for tags in every]


def test_no_rows_and_no_labels():
    assert tag_lists(np.empty((0, 5), np.float32), decisions([0] * 5), NAMES).to_pylist() == []
    assert tag_lists(np.empty((2, 0), np.float32), Decisions(*np.empty((3, 0))), []).to_pylist() == [[], []]


def test_decisions_go_by_label_id_and_null_is_never():
    table = pa.table(
        {"label_id": [2, 0, 1], "threshold": [0.5, None, -1.0], "a": [3.0, 1.0, 2.0], "b": [6.0, 4.0, 5.0]}
    )
    found = Decisions.from_table(table)
    assert_array_equal(found.threshold, [np.inf, -1, 0.5])
    assert_array_equal([found.a, found.b], [[1, 2, 3], [4, 5, 6]])
    assert_array_equal(found.log_odds(np.array([[1, 1, 2]], np.float32)), [[5, 7, 12]])


TEXTS = ["wine tax and beer tax", "beer and wine", "cheap beer here", "tax on cheap wine", "nothing known: zzz", ""]


@pytest.fixture
def folder(tmp_path):
    """A saved tagger over the words of TEXTS."""
    counted = count_documents(pa.array(TEXTS), 1)
    counted = counted.filter(pa.array([t not in ("nothing", "known", "zzz") for t in counted["term"].to_pylist()]))
    vocabulary = choose_terms(counted, len(TEXTS), FeaturizeConfig(min_df=1))
    assert vocabulary.num_rows <= FEATURES
    labels = pa.table(
        {
            "label_id": pa.array(range(LABELS), pa.int32()),
            "label": [f"label {k}" for k in range(LABELS)],
            "support": [1] * LABELS,
        }
    )
    thresholds = pa.table(
        {
            "label_id": pa.array(range(LABELS), pa.int32()),
            "threshold": [None, *np.linspace(-1, 1, LABELS - 1)],
            "a": np.linspace(0.5, 2, LABELS),
            "b": np.linspace(-1, 1, LABELS),
        }
    )
    weight_files, _ = built(tmp_path / "run", model_rows(2), [[3, 4, 5, 6, 7, 8], [0, 1, 2]])
    saved = tmp_path / "tagger"
    saved.mkdir()
    save(saved, vocabulary, labels, thresholds, weight_files, SETTINGS)
    return saved


def tagged(loaded, texts=TEXTS):
    return loaded.tag(pa.array([f"d{k}" for k in range(len(texts))]), pa.array(texts, pa.string()))


def test_a_saved_tagger_is_what_was_saved(folder):
    loaded = Tagger.load(folder)
    assert loaded.settings == SETTINGS
    assert loaded.labels == [f"label {k}" for k in range(LABELS)]
    assert_array_equal(loaded.decisions.threshold, [np.inf, *np.linspace(-1, 1, LABELS - 1)])
    assert_array_equal(loaded.weights.bias, [np.float32(row["bias"]) for row in model_rows(2)])
    again = Tagger.load(str(folder))
    assert tagged(loaded).equals(tagged(again))


def test_tags_follow_from_scores_and_thresholds(folder):
    loaded = Tagger.load(folder)
    S, _ = loaded.scores(pa.array(TEXTS))
    found = tagged(loaded)
    assert found.schema == TABLES["tags"].schema
    assert found["doc_id"].to_pylist() == [f"d{k}" for k in range(len(TEXTS))]
    for scores, tags in zip(S, found["tags"].to_pylist(), strict=True):
        want = {loaded.labels[j] for j in range(LABELS) if scores[j] >= loaded.decisions.threshold[j]}
        assert {tag["label"] for tag in tags} == want
    assert any(tags for tags in found["tags"].to_pylist())


def test_a_text_without_known_words_scores_the_bias(folder):
    loaded = Tagger.load(folder)
    S, known = loaded.scores(pa.array(TEXTS))
    assert_array_equal(known == 0, [False, False, False, False, True, True])
    assert_array_equal(S[4:], [loaded.weights.bias] * 2)
    assert (S[:4] != loaded.weights.bias).any(axis=1).all()
    assert sum(unknown for _, unknown in loaded.tag_batches(pa.table({"doc_id": TEXTS, "text": TEXTS}))) == 2


def test_tags_do_not_depend_on_the_batches(folder, monkeypatch):
    loaded = Tagger.load(folder)
    texts = TEXTS * 7
    want = tagged(loaded, texts)
    for rows, size in ((1, 1), (LABELS * 2, 1 << 20), (LABELS * 5, 60)):
        monkeypatch.setattr(tagger, "SCORES_AT_ONCE", rows)
        monkeypatch.setattr(vectorizer, "BATCH_BYTES", size)
        pieces = [tags for tags, _ in loaded.tag_batches(pa.table({"doc_id": want["doc_id"], "text": texts}))]
        assert len(pieces) > 1
        assert pa.concat_tables(pieces).equals(want)


def test_no_documents_give_an_empty_table(folder):
    assert tagged(Tagger.load(folder), []).equals(TABLES["tags"].schema.empty_table())


def test_max_tags_is_a_setting(folder):
    loaded = Tagger.load(folder)
    every = tagged(loaded)["tags"].to_pylist()
    one = tagged(loaded._replace(settings={**SETTINGS, "max_tags": 1}))["tags"].to_pylist()
    assert one == [tags[:1] for tags in every] != every


def test_a_rule_by_document_travels_with_the_tagger(folder, tmp_path):
    tables = [pq.read_table(folder / f"{name}.parquet") for name in ("vocabulary", "labels", "thresholds")]
    (tmp_path / "other").mkdir()
    document = DocumentRule(rule="rcut", k=2)
    save(tmp_path / "other", *tables, sorted(folder.glob("weights-*.npy")), SETTINGS, document=document)
    loaded = Tagger.load(tmp_path / "other")
    assert loaded.decisions.document == document
    assert [len(tags) for tags in tagged(loaded)["tags"].to_pylist()] == [2] * len(TEXTS)
    # a version that knows thresholds only must not read it as if there were nothing else
    assert json.loads((tmp_path / "other" / "tagger.json").read_text())["format"] == 2
    assert json.loads((folder / "tagger.json").read_text())["format"] == 1


def test_a_tagger_of_before_goes_by_thresholds(folder):
    before = tagged(Tagger.load(folder))
    card = json.loads((folder / "tagger.json").read_text())
    for name in ("decision.json", "rules.json"):
        (folder / name).unlink()
        del card["sha256"][name]
    (folder / "tagger.json").write_text(json.dumps(card))
    assert Tagger.load(folder).decisions.document.plain
    assert tagged(Tagger.load(folder)).equals(before)


def test_every_file_of_the_tagger_is_checked(folder):
    names = sorted(p.name for p in folder.iterdir() if p.name != "tagger.json")
    assert len(names) == 9
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(changed) // 2] ^= 1
        for damaged in (bytes(changed), whole[:-1], b""):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=name):
                Tagger.load(folder)
        path.unlink()
        with pytest.raises(DataError, match=name):
            Tagger.load(folder)
        path.write_bytes(whole)
    Tagger.load(folder)


def sha256(folder):
    return json.loads((folder / "tagger.json").read_text())["sha256"]


def with_card(folder, **changes):
    card = json.loads((folder / "tagger.json").read_text())
    (folder / "tagger.json").write_text(json.dumps({**card, **changes}))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\x00"])
def test_a_damaged_card_is_refused(folder, content):
    (folder / "tagger.json").write_text(content)
    with pytest.raises(DataError, match=r"tagger\.json"):
        Tagger.load(folder)


def test_a_newer_format_is_refused(folder):
    with_card(folder, format=tagger.FORMAT + 1, sha256={**sha256(folder), "more.npy": "0"})
    with pytest.raises(ConfigError, match="newer"):
        Tagger.load(folder)


def test_a_name_that_leaves_the_folder_is_refused(folder):
    (folder.parent / "outside").write_bytes(b"x")
    with_card(folder, sha256={**sha256(folder), "../outside": digest(folder.parent / "outside")})
    with pytest.raises(DataError, match=r"tagger\.json: not the card of a tagger"):
        Tagger.load(folder)


def test_a_card_that_leaves_a_file_out_is_refused(folder):
    """It would be read without a look at its SHA-256."""
    whole = sha256(folder)
    for name in ("vocabulary.parquet", "weights-bias.npy"):
        with_card(folder, sha256={k: v for k, v in whole.items() if k != name})
        with pytest.raises(DataError, match=r"tagger\.json: not the card .*sha256 of .*" + name[:5]):
            Tagger.load(folder)
    for name in ("rules.json", "decision.json"):
        with_card(folder, sha256={k: v for k, v in whole.items() if k != name})
        with pytest.raises(DataError, match=name):
            Tagger.load(folder)
    (folder / "decision.json").unlink()
    with_card(folder, format=2, sha256={k: v for k, v in whole.items() if k != "decision.json"})
    with pytest.raises(DataError, match=r"tagger\.json: not the card .*decision\.json"):
        Tagger.load(folder)


def replaced(folder, **arrays):
    """Other arrays of weights, under a card that knows them."""
    for name, array in arrays.items():
        np.save(folder / f"weights-{name}.npy", array)
    with_card(folder, sha256={name: digest(folder / name) for name in sha256(folder)})


@pytest.mark.parametrize("change", [
    lambda w: {"labels": np.full_like(w.labels, LABELS)},
    lambda w: {"labels": np.full_like(w.labels, -1)},
    lambda w: {"labels": w.labels[:-1]},
    lambda w: {"labels": w.labels.astype(np.int64)},
    lambda w: {"labels": w.labels.astype(">i4")},
    lambda w: {"indptr": np.array([0, 2**62, -(2**63), -(2**62), *[w.values.size] * (w.indptr.size - 4)])},
    lambda w: {"indptr": w.indptr + 1},
    lambda w: {"indptr": w.indptr[:3]},
    lambda w: {"indptr": np.concatenate([w.indptr[:1], w.indptr[-1:], w.indptr[2:]])},
    lambda w: {"values": w.values[:, None]},
    lambda w: {"values": np.where(np.arange(w.values.size) == 3, np.nan, w.values).astype(np.float32)},
    lambda w: {"bias": np.where(np.arange(LABELS) == 3, np.inf, w.bias).astype(np.float32)},
])  # fmt: skip
def test_arrays_that_kernels_may_not_go_by_are_refused(folder, change):
    replaced(folder)
    whole = Tagger.load(folder).weights
    replaced(folder, **change(whole))
    with pytest.raises(DataError, match=r"weights-\*\.npy do not fit each other"):
        Tagger.load(folder)


def test_weights_of_no_label_have_no_label(tmp_path):
    arrays = {"indptr": [0, 1], "labels": [0], "values": [1], "bias": []}
    for (name, array), kind in zip(arrays.items(), (np.int64, np.int32, np.float32, np.float32), strict=True):
        np.save(tmp_path / f"weights-{name}.npy", np.array(array, kind))
    with pytest.raises(DataError, match="do not fit each other"):
        Weights.load(tmp_path)


def column(change):
    return lambda table, name: table.set_column(table.schema.get_field_index(name), name, change(table[name]))


def first(value):
    """Another value in the first row."""
    return column(lambda c: pa.array([value, *c.to_pylist()[1:]], c.type))


def as_type(kind):
    return column(lambda c: c.cast(kind))


@pytest.mark.parametrize(("table", "name", "change", "says"), [
    ("vocabulary", "feature_id", first(-1), "feature_id does not count its rows"),
    ("vocabulary", "feature_id", first(3), "feature_id does not count its rows"),
    ("vocabulary", "feature_id", as_type(pa.int64()), "feature_id is int64"),
    ("vocabulary", "hash", column(lambda c: pa.array([c[1].as_py(), *c.to_pylist()[1:]])), "a hash stands twice"),
    ("vocabulary", "idf", first(float("nan")), "idf holds numbers that are none"),
    ("vocabulary", "idf", first(None), "idf has nulls"),
    ("vocabulary", "idf", as_type(pa.string()), "idf is string"),
    ("labels", "support", lambda t, _: t.select(["label", "support"]), "0 columns label_id"),
    ("labels", "label_id", first(7), "label_id does not count its rows"),
    ("labels", "label", first("label 3"), "a label stands twice"),
    ("labels", "label", first(None), "label has nulls"),
    ("labels", "label", as_type(pa.binary()), "label is binary"),
    ("thresholds", "label_id", first(9), "label_id does not count its rows"),
    ("thresholds", "threshold", first(float("nan")), "threshold holds numbers that are none"),
    ("thresholds", "a", first(float("inf")), "a holds numbers that are none"),
    ("thresholds", "b", first(None), "b has nulls"),
])  # fmt: skip
def test_tables_that_no_tags_may_come_of_are_refused(folder, table, name, change, says):
    path = folder / f"{table}.parquet"
    pq.write_table(change(pq.read_table(path), name), path)
    replaced(folder)
    with pytest.raises(DataError, match=f"table {table}: {says}; it is damaged"):
        Tagger.load(folder)


@pytest.mark.parametrize(("score", "log_odds", "says"), [
    ([[0.0, 1.0], []], [[0.0], []], "knots of different numbers"),
    ([[0.0, 1.0], [2.0]], [[0.0], [1.0, 2.0]], "knots of different numbers"),
    ([[1.0, 0.0], []], [[0.0, 1.0], []], "knots do not ascend"),
    ([[0.0, float("nan")], []], [[0.0, 1.0], []], "knots hold numbers that are none"),
    ([[0.0, 1.0], [0.5, 2.0]], [[0.0, 1.0], [0.0, 1.0]], None),  # each label has its own
])  # fmt: skip
def test_knots_are_checked(folder, score, log_odds, says):
    path = folder / "thresholds.parquet"
    table = pq.read_table(path)
    for name, values in (("knot_score", score), ("knot_log_odds", log_odds)):
        table = table.append_column(name, pa.array(values + [[]] * (LABELS - 2), pa.list_(pa.float64())))
    pq.write_table(table, path)
    replaced(folder)
    if says is None:
        Tagger.load(folder)
        return
    with pytest.raises(DataError, match=f"table thresholds: {says}"):
        Tagger.load(folder)


@pytest.mark.parametrize("content", ["null", "0", "[]", '{"exclude": "label 1"}', '{"implies": {}}', "{", "\x00"])
def test_rules_that_are_none_are_refused(folder, content):
    (folder / "rules.json").write_text(content)
    replaced(folder)
    with pytest.raises(DataError, match=r"rules\.json: .*expected the rules that calibrate writes"):
        Tagger.load(folder)


def test_settings_of_a_card_are_taken_as_they_are_checked(folder):
    for sublinear, ngrams in (("false", 1.0), (False, 1)):
        with_card(folder, settings={**SETTINGS, "sublinear": sublinear, "ngrams": ngrams})
        settings = Tagger.load(folder).settings
        assert (settings["sublinear"], settings["ngrams"]) == (False, 1)
        assert type(settings["ngrams"]) is int
    for wrong in ({"ngrams": 9}, {"max_tags": 10**30}, {"max_tags": None}, {"sublinear": "perhaps"}):
        with_card(folder, settings={**SETTINGS, **wrong})
        with pytest.raises(DataError, match=r"tagger\.json: not the card"):
            Tagger.load(folder)


def test_tables_of_different_runs_are_refused(folder):
    tables = [pq.read_table(folder / f"{name}.parquet") for name in ("vocabulary", "labels", "thresholds")]
    weights = Weights.load(folder)
    Tagger.from_tables(*tables, weights, SETTINGS)
    for at in (1, 2):
        shorter = [t.slice(0, t.num_rows - 1) if k == at else t for k, t in enumerate(tables)]
        with pytest.raises(DataError, match="different runs"):
            Tagger.from_tables(*shorter, weights, SETTINGS)
