import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.learners.tagger import Tagger, Weights, save
from pipeline.learners.vectorizer import count_documents
from pipeline.serving import TaggerModel, signature
from pipeline.stages.featurize import choose_terms
from pipeline.tables import TABLES

LABELS = ["<b>", "a/b", "plain", "🦜"]
TEXTS = ["red fox", "blue whale", "a red whale", ""]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tagger with random weights that says a few labels of every text."""
    folder = tmp_path_factory.mktemp("serving")
    rng, size = np.random.default_rng(3), len(LABELS)
    ids = np.arange(size, dtype=np.int32)
    chosen = SimpleNamespace(max_df=1.0, max_features=100)
    vocabulary = choose_terms(count_documents(pa.array(TEXTS), 1), len(TEXTS), chosen)
    d = vocabulary.num_rows
    models = pa.table(
        {
            "label_id": ids,
            "bias": rng.normal(size=size).astype(np.float32),
            "indices": pa.array([np.arange(d, dtype=np.int32)] * size),
            "weights": pa.array(list(rng.normal(size=(size, d)).astype(np.float32))),
        }
    )
    pa.parquet.write_table(models, folder / "models.parquet")
    thresholds = {
        "label_id": ids,
        "threshold": [-1.0] * size,
        "a": rng.uniform(0.5, 2, size),
        "b": rng.normal(size=size),
        **{f"knot_{name}": [[]] * size for name in ("score", "log_odds")},
        "calibration": ["platt"] * size,
        **{f"{m}_{when}": [None] * size for m in ("brier", "log_loss", "ece") for when in ("before", "after")},
        "objective": ["f1"] * size,
        "expected_f1": [None] * size,
        "spread": [None] * size,
        "support": range(size),
    }
    target = folder / "tagger"
    target.mkdir()
    save(
        target,
        vocabulary,
        pa.table({"label_id": ids, "label": LABELS, "support": range(size)}, schema=TABLES["labels"].schema),
        pa.table(thresholds, schema=TABLES["thresholds"].schema),
        Weights.build(folder, [folder / "models.parquet"], d, size),
        {"ngrams": 1, "sublinear": True, "max_tags": 0},
    )
    return target


@pytest.fixture(scope="module")
def model(bundle):
    model = TaggerModel()
    model.load_context(SimpleNamespace(artifacts={"tagger": str(bundle)}))
    return model


def expected(bundle):
    return Tagger.load(bundle).tag(pa.array(list("0123")), pa.array(TEXTS))["tags"].to_pylist()


def test_the_model_says_what_the_tagger_says(bundle, model):
    said = model.predict(None, pd.DataFrame({"text": TEXTS}))
    tags = expected(bundle)
    assert max(map(len, tags)) > 2
    assert said["doc_id"].tolist() == ["0", "1", "2", "3"]
    for column, field in {"tags": "label", "probabilities": "probability", "scores": "score"}.items():
        assert said[column].tolist() == [[tag[field] for tag in row] for row in tags]
    assert all(row == sorted(row, reverse=True) for row in said["probabilities"])


def test_doc_ids_come_back_and_no_text_is_an_empty_text(model):
    frame = pd.DataFrame({"doc_id": ["x", "y"], "text": [None, ""]}, index=[7, 9])
    said = model.predict(None, frame)
    assert said["doc_id"].tolist() == ["x", "y"]
    assert said["scores"][0] == said["scores"][1]


def test_max_tags_limits_and_0_does_not(bundle, model):
    frame = pd.DataFrame({"text": TEXTS})
    most = [len(row) for row in expected(bundle)]
    assert model.predict(None, frame, {"max_tags": 1})["tags"].map(len).tolist() == [min(n, 1) for n in most]
    assert model.predict(None, frame, {"max_tags": 0})["tags"].map(len).tolist() == most
    with pytest.raises(DataError, match="max_tags is -1"):
        model.predict(None, frame, {"max_tags": -1})


def test_no_rows_give_no_rows(model):
    said = model.predict(None, pd.DataFrame({"text": pd.Series([], dtype=object)}))
    assert said.columns.tolist() == ["doc_id", "tags", "probabilities", "scores"]
    assert len(said) == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (pd.DataFrame({"words": ["a"]}), "holds words; expected a frame with a column `text`"),
        (["a"], "holds list; expected"),
        (pd.DataFrame({"text": [1, 2]}), "not text"),
        (pd.DataFrame({"text": ["\ud800"]}), "not text"),
    ],
)
def test_what_is_no_text_is_told(model, given, told):
    with pytest.raises(DataError, match=told):
        model.predict(None, given)


# as on a machine without Tagmill and without Spark: the package can only come from the model's own folder
ELSEWHERE = """
import json, sys
root, model, texts = json.loads(sys.argv[1])
sys.path[:] = [path for path in sys.path if path != root]
sys.modules["pyspark"] = None
import mlflow, pandas
loaded = mlflow.pyfunc.load_model(model)
said = loaded.predict(pandas.DataFrame({"text": texts}), params={"max_tags": 2})
import pipeline.learners.tagger as used
print(json.dumps([used.__file__, said["tags"].tolist(), said["probabilities"].tolist()]))
try:
    loaded.predict(pandas.DataFrame({"words": texts}))
except mlflow.MlflowException as error:
    print(error)
"""


def test_the_logged_model_runs_where_tagmill_is_not_installed(bundle, tmp_path):
    import mlflow

    import pipeline.serving

    package = Path(pipeline.serving.__file__).parent
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=pipeline.serving.__file__,
        artifacts={"tagger": str(bundle)},
        code_paths=[str(package)],
        signature=signature(0),
        input_example=pd.DataFrame({"text": TEXTS}),
        pip_requirements=["pandas"],
    )
    argument = json.dumps([str(package.parent), str(tmp_path / "model"), TEXTS])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, argument],
        cwd=tmp_path,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},  # the copied kernels have no compiled code yet
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, refusal = done.stdout.split("\n", 1)
    file, tags, probabilities = json.loads(first)
    assert Path(file) == tmp_path / "model" / "code" / "pipeline" / "learners" / "tagger.py"
    assert tags == [[tag["label"] for tag in row[:2]] for row in expected(bundle)]
    assert probabilities == [[tag["probability"] for tag in row[:2]] for row in expected(bundle)]
    assert "Model is missing inputs ['text']" in refusal
