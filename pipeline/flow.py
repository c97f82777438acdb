"""The stages as data: what each reads and writes.  The command line, the schedulers and the tests read it.

Only the standard library is imported, so that a scheduler can load it without Spark.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """One step of a flow: `name` is also the section of its settings and of its folder in the run."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sentence: str


FIT = (
    Stage("ingest", (), ("documents", "labels", "rejects"), "read, check and order the documents"),
    Stage(
        "split",
        ("documents", "labels"),
        ("folds", "label_support", "near_duplicates", "label_relations"),
        "give every document its fold",
    ),
    Stage("featurize", ("documents", "folds"), ("vocabulary", "features"), "turn text into TF-IDF rows"),
    Stage(
        "train",
        ("documents", "folds", "labels", "label_support", "vocabulary", "features"),
        ("label_models", "curves", "histograms", "suspicious", "weights"),
        "one sigmoid model a label, with out-of-fold curves",
    ),
    Stage(
        "calibrate",
        ("labels", "curves", "histograms"),
        ("thresholds", "rules.json", "decision.json"),
        "choose thresholds, fit probabilities",
    ),
    Stage(
        "evaluate",
        (
            "documents",
            "folds",
            "labels",
            "label_support",
            "features",
            "label_models",
            "weights",
            "thresholds",
            "rules.json",
            "near_duplicates",
            "label_relations",
            "suspicious",
            "decision.json",
        ),
        ("label_counts", "test_documents", "confusions", "metrics.json", "report.html"),
        "count true and false tags on the test fold",
    ),
    Stage(
        "register",
        (
            "labels",
            "vocabulary",
            "label_models",
            "weights",
            "thresholds",
            "rules.json",
            "decision.json",
            "label_counts",
            "metrics.json",
        ),
        (),
        "send the run to MLflow",
    ),
)

TAG = (
    FIT[0],
    Stage(
        "tag",
        ("documents", "labels", "vocabulary", "weights", "thresholds", "rules.json", "decision.json"),
        ("tags",),
        "tag the documents with a fitted run",
    ),
)


def upstream(stage: Stage, flow: tuple[Stage, ...] = FIT) -> tuple[str, ...]:
    """Names of the stages whose tables `stage` reads, in the order of the flow."""
    return tuple(other.name for other in flow if set(other.writes) & set(stage.reads))


def stage_of(table: str, flow: tuple[Stage, ...] = FIT) -> str:
    """Name of the stage that writes `table`.  Raises KeyError where none does."""
    for stage in flow:
        if table in stage.writes:
            return stage.name
    raise KeyError(table)
