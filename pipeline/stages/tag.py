"""Tag.

    documents + a fitted tagger  ->  tags (doc_id, tags)

The vectoriser, the weights and the thresholds are those of the fit; there is no second implementation that could drift.
"""

import functools

import pyarrow as pa
import pyarrow.compute

from pipeline.learners.tagger import Tagger, Weights
from pipeline.stages.parts import Outcome, decision_of, rules_of, run_tasks
from pipeline.stages.poison import Guard
from pipeline.storage import Mapped, Place, place, read_table
from pipeline.store import Run, write_part


def tag(
    spark,
    documents: list[Place],
    attempt: Place,
    source: dict,
    settings: dict,
    identity: str,
    guard: Guard,
    cache_dir: str = "",
) -> Outcome:
    """Tag every document.

    Args:
        documents: parts of the table `documents`.
        source: where the fitted tagger is: {"run": folder} or {"bundle": folder of `Tagger.save`, or `Mapped`}.
        settings: of `Tagger`; for a bundle only max_tags is taken, and only where it is set.
        identity: changes with the tagger; workers that live on between jobs keep the last one they loaded.
        guard: writes down which documents crash, hang or exhaust a worker.
        cache_dir: where a host keeps a copy of the weights of a run that is in an object store.
    """
    shared = (source, tuple(sorted(settings.items())), identity, guard, cache_dir)
    done = run_tasks(
        spark,
        "tag: score the documents",
        functools.partial(_tag_part, shared),
        [(str(path), str(attempt), number) for number, path in enumerate(documents)],
    )
    facts = {
        "tags_given": sum(tags for _, tags, _, _ in done),
        "documents_without_tags": sum(none for _, _, none, _ in done),
        "documents_without_features": sum(empty for _, _, _, empty in done),
    }
    return Outcome({"tags": [e for e, _, _, _ in done]}, facts)


def summary(facts: dict, rows: dict) -> str:
    n = rows["tags"]
    return (
        f"{n:,} documents, {facts['tags_given']:,} tags ({facts['tags_given'] / max(n, 1):.2f} a document), "
        f"{facts['documents_without_tags']:,} without a tag, "
        f"{facts['documents_without_features']:,} without a known term"
    )


def tagger_of(run: Run, settings: dict, cache_dir: str = "") -> Tagger:
    """The tagger of a fitted run; every file is checked against its manifest before it is parsed."""
    vocabulary, labels, thresholds = (run.read(name, verify=True) for name in ("vocabulary", "labels", "thresholds"))
    folder = run.mapped("weights", cache_dir, verify=True).folder()
    rules, document = rules_of(run, verify=True), decision_of(run, verify=True)
    weights = Weights.load(folder, vocabulary.num_rows)
    return Tagger.from_tables(vocabulary, labels, thresholds, weights, settings, rules, document)


@functools.lru_cache(maxsize=1)
def _tagger(source, settings, identity, cache_dir):
    kind, folder = source
    if kind == "run":
        return tagger_of(Run(folder), dict(settings), cache_dir)
    tagger = Tagger.load(folder.folder() if isinstance(folder, Mapped) else folder)
    most = dict(settings)["max_tags"] or tagger.settings["max_tags"]
    return tagger._replace(settings={**tagger.settings, "max_tags": most})


def _tag_part(shared, task):
    (source, settings, identity, guard, cache_dir), (path, attempt, number) = shared, task
    tagger = _tagger(next(iter(source.items())), settings, identity, cache_dir)
    totals = [0, 0, 0]

    def rows():
        documents = tagger.batches(read_table(path, columns=["doc_id", "text"]))
        for tags, empty in guard.over(documents, tagger.tag_batch):
            lengths = pa.compute.list_value_length(tags["tags"])
            totals[0] += pa.compute.sum(lengths).as_py() or 0
            totals[1] += pa.compute.sum(pa.compute.equal(lengths, 0)).as_py() or 0
            totals[2] += empty
            yield tags

    return write_part(place(attempt), "tags", rows(), number), *totals
