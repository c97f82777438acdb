import subprocess
import sys
from pathlib import Path

import pytest

from jobs import entry
from pipeline import config
from pipeline.flow import FIT, TAG, Stage, stage_of, upstream
from pipeline.tables import TABLES

ROOT = Path(entry.__file__).parents[1]

# another value for every setting; none is its default
OTHER = {
    "input.doc_id": "id",
    "input.text": ("title", "body"),
    "input.labels": "topics",
    "input.split": None,
    "input.label_separator": ";",
    "input.format": "csv",
    "input.max_document_bytes": 10,
    "input.max_labels_per_document": 10,
    "input.max_label_bytes": 10,
    "ingest.max_rejected": 0.5,
    "ingest.max_labels": 10,
    "ingest.min_label_documents": 3,
    "split.test": 0.3,
    "split.dev": "drop",
    "split.seed": 1,
    "split.near_duplicates": 0.5,
    "featurize.min_df": 5,
    "featurize.max_df": 0.5,
    "featurize.max_features": 10,
    "featurize.ngrams": 2,
    "featurize.sublinear": False,
    "featurize.vocabulary": "runs/before",
    "train.C": 1.0,
    "train.loss": "logistic",
    "train.positive_weight": 2.0,
    "train.label_weights": "weights.csv",
    "train.choose": "f1",
    "train.negatives": 10.0,
    "train.sample": 0.5,
    "train.warm_start": "runs/before",
    "train.budget": 60.0,
    "train.folds": 5,
    "train.dev": 0.2,
    "train.gap": 0.1,
    "train.max_epochs": 3,
    "train.prune": 0.0,
    "train.labels_per_block": 3,
    "train.suspicious": 0,
    "train.max_failed": 3,
    "train.seed": 1,
    "calibrate.rule": "fixed",
    "calibrate.beta": 2.0,
    "calibrate.precision": 0.9,
    "calibrate.recall": 0.9,
    "calibrate.cost_fp": 2.0,
    "calibrate.cost_fn": 2.0,
    "calibrate.at": 0.3,
    "calibrate.budget": 3.0,
    "calibrate.guard": "none",
    "calibrate.peers": 0.0,
    "calibrate.fbr": 0.3,
    "calibrate.shrink": 3.0,
    "calibrate.micro": 0.25,
    "calibrate.k": 3,
    "calibrate.at_least_one": True,
    "calibrate.min_gap": 0.5,
    "calibrate.at_most": 3,
    "calibrate.rules": "rules.yaml",
    "calibrate.calibration": "isotonic",
    "calibrate.pooling": 0.0,
    "calibrate.isotonic_positives": 50,
    "evaluate.bootstrap": 10,
    "evaluate.confidence": 0.9,
    "evaluate.seed": 1,
    "evaluate.keep_scores": 0.5,
    "evaluate.if_undefined": 1,
    "evaluate.propensity_a": 0.6,
    "evaluate.propensity_b": 2.6,
    "tag.max_tags": 3,
    "spark.master": "local[2]",
    "spark.partitions": 3,
    "spark.driver_memory": "3g",
    "spark.wait": 30,
    "spark.cache_dir": "/cache",
    "spark.document_seconds": 5.0,
    "spark.document_gb": 1.0,
    "spark.options": {"spark.executor.memory": "1g"},
    "mlflow.enabled": False,
    "mlflow.tracking_uri": "sqlite:///runs.db",
    "mlflow.experiment": "other",
    "mlflow.model": "other",
    "mlflow.alias": "other",
    "mlflow.move_alias": True,
    "mlflow.required": True,
    "mlflow.timeout": 3,
}

# reviewed: none of these changes what a stage of the fit flow writes
NO_RESULT = {
    # how wide the work runs and where: the same bytes for any number of tasks and executors
    "spark.master",
    "spark.partitions",
    "spark.driver_memory",
    "spark.wait",
    "spark.cache_dir",
    # whom they convict stands in quarantine.json, and that list is part of the recipe of ingest
    "spark.document_seconds",
    "spark.document_gb",
    "spark.options",
    # whether and where a finished run is reported
    "mlflow.enabled",
    "mlflow.tracking_uri",
    "mlflow.move_alias",
    "mlflow.required",
    "mlflow.timeout",
    # read by the job that tags new documents, which has it in its own recipe
    "tag.max_tags",
    # limits: they stop a run, a run that they let pass is the same
    "ingest.max_rejected",
    "ingest.max_labels",
    "train.max_failed",
    "train.budget",
    # disk for time
    "evaluate.keep_scores",
}


def test_every_table_is_written_once_and_before_it_is_read():
    seen = set()
    for stage in FIT:
        assert set(stage.reads) <= seen, stage.name
        assert not set(stage.writes) & seen, stage.name
        assert len(set(stage.writes)) == len(stage.writes), stage.name
        seen |= set(stage.writes)


def test_tagging_reads_what_a_fit_or_an_earlier_stage_wrote():
    seen = {table for stage in FIT for table in stage.writes}
    for stage in TAG:
        assert set(stage.reads) <= seen, stage.name
        seen |= set(stage.writes)
    assert "tags" in seen


def test_every_contract_has_the_one_stage_that_writes_it():
    written = {table for stage in (*FIT, *TAG) for table in stage.writes}
    assert set(TABLES) <= written
    # the others are no Arrow tables: a report, figures, and arrays that are mapped into memory
    assert written - set(TABLES) == {"metrics.json", "report.html", "rules.json", "decision.json", "weights"}


def test_names_are_unique_and_every_stage_has_its_sentence():
    for flow in (FIT, TAG):
        assert len({stage.name for stage in flow}) == len(flow)
        assert all(stage.sentence and "\n" not in stage.sentence for stage in flow)


def test_upstream_names_the_writers_in_the_order_of_the_flow():
    toy = (
        Stage("dig", (), ("ore", "sand"), ""),
        Stage("melt", ("ore",), ("iron",), ""),
        Stage("blow", ("sand",), ("glass",), ""),
        Stage("build", ("iron", "glass", "sand"), ("house",), ""),
    )
    assert upstream(toy[0], toy) == ()
    assert upstream(toy[1], toy) == ("dig",)
    assert upstream(toy[3], toy) == ("dig", "melt", "blow")
    stages = {stage.name: stage for stage in FIT}
    assert upstream(stages["ingest"]) == ()
    assert upstream(stages["split"]) == ("ingest",)
    assert upstream(stages["calibrate"]) == ("ingest", "train")


def test_a_change_reaches_every_later_stage():
    reached = {"ingest"}
    for stage in FIT[1:]:
        assert set(upstream(stage)) & reached, stage.name
        reached.add(stage.name)


def test_stage_of_a_table():
    for stage in FIT:
        for table in stage.writes:
            assert stage_of(table) == stage.name
    assert stage_of("tags", TAG) == "tag"
    with pytest.raises(KeyError):
        stage_of("nonsense")


def test_a_scheduler_needs_nothing_but_the_standard_library():
    program = f"""
import sys

class OnlyStandard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {{*sys.stdlib_module_names, "pipeline"}}:
            raise ImportError(f"{{name}} is not of the standard library")

sys.meta_path.insert(0, OnlyStandard())
sys.path.insert(0, {str(ROOT)!r})
from pipeline.flow import FIT, TAG, stage_of, upstream
print(len(FIT), len(TAG), *(m for m in sys.modules if m.startswith("pipeline")))
"""
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(FIT)), str(len(TAG)), "pipeline", "pipeline.flow"]


@pytest.mark.parametrize("stage", sorted({stage.name for stage in (*FIT, *TAG)}))
def test_every_stage_is_a_job(stage):
    text = (ROOT / "jobs" / f"{stage}.py").read_text()
    compile(text, stage, "exec")
    assert '__name__ == "__main__"' in text
    if stage in {s.name for s in FIT}:
        assert f'stage_main("{stage}")' in text


def test_every_stage_names_the_settings_that_decide_it():
    assert set(entry.SETTINGS) == {stage.name for stage in FIT}
    known = set(config.describe()) | set(config.Config.model_fields)
    named = {name for names in entry.SETTINGS.values() for name in names} | set(entry.LIMITS)
    assert named <= known


def test_the_tables_of_this_file_are_complete():
    flat = config.flat(config.Config())
    assert set(OTHER) == set(flat)
    assert set(flat) >= NO_RESULT
    for key, value in OTHER.items():
        assert value != flat[key], key


@pytest.mark.parametrize("key", sorted(OTHER))
def test_every_setting_changes_a_fingerprint_or_is_reviewed(key):
    before = config.Config()
    section, name = key.split(".")
    after = config.Config.model_validate({section: {name: OTHER[key]}})
    changed = {s for s in entry.SETTINGS if entry.stage_settings(s, before) != entry.stage_settings(s, after)}
    assert bool(changed) is (key not in NO_RESULT), changed
    if section in entry.SETTINGS and key not in NO_RESULT:
        assert section in changed
    if changed and section not in config.VOLATILE:  # what redoes a stage is also refused by name
        assert config.differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
