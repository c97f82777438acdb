"""Evaluate.

    features[test], label_models (as weights), thresholds, rules.json, decision.json, documents (labels), data problems
        ->  label_counts, test_documents, confusions, metrics.json, report.html

Each task returns integers that add; Spark adds them and ratios are taken once, here.  Three passes over the test fold:
the scores of the gold pairs, which cut the curves; the negatives between the cuts; and all that is counted by document.
Only the first computes scores, where there is room to keep them (`scores`).
"""

import functools
import json

import numpy as np
import pyarrow.compute as pc

from pipeline.config import VOLATILE, flat
from pipeline.errors import DataError
from pipeline.kernels import bootstrap, counts, ranking
from pipeline.kernels.hierarchy import KINDS, hierarchical_metrics
from pipeline.learners import confusions, judge
from pipeline.learners.label_rules import compiled, hierarchy_closure
from pipeline.learners.tagger import Decisions, Weights
from pipeline.stages import scores
from pipeline.stages.parts import Outcome, decision_of, rules_of, run_tasks
from pipeline.stages.problems import data_problems
from pipeline.stages.split import TEST
from pipeline.storage import Mapped, Place, read_table, replacing
from pipeline.store import Run, entry, write_bytes, write_part


def evaluate(spark, run: Run, attempt: Place, cfg) -> Outcome:
    """Judge the run on its test fold.  Raises DataError where the test fold is empty."""
    names = run.read("labels", ["label_id", "label"])["label"].to_pylist()
    support = run.read("label_support")
    documents = run.finished("split")["documents"]
    if documents["test"] == 0:
        raise DataError("no document is in the test fold; expected some marked test, or split.test above 0")
    propensity = ranking.inverse_propensity(
        support["train"].to_numpy(), documents["train"], cfg.evaluate.propensity_a, cfg.evaluate.propensity_b
    )
    rules = rules_of(run)
    closure = hierarchy_closure(rules, names) if rules else None
    undefined = float(cfg.evaluate.if_undefined)
    thresholds, decision = run.read("thresholds"), decision_of(run)
    folder = scores.folder_of(run, documents["test"], len(names), cfg.evaluate.keep_scores, cfg.spark.cache_dir)
    shared = spark.sparkContext.broadcast(
        {
            "labels": names,
            "weights": run.mapped("weights", cfg.spark.cache_dir),
            "thresholds": thresholds,
            "rules": compiled(rules, names) if rules else None,
            "document": decision,
            "closure": closure,
            "propensity": propensity,
            "if_undefined": undefined,
            "scores": folder,
            "attempt": attempt,
        }
    )
    files = zip(*(run.files(t) for t in ("features", "folds", "documents")), strict=True)
    parts = [(number, judge.Part(*paths)) for number, paths in enumerate(files)]

    def everywhere(what, function, *more):
        return run_tasks(spark, f"evaluate: {what}", functools.partial(function, shared, *more), parts)

    gold = everywhere("score", _gold_of_part)
    gold_labels, gold_scores = (np.concatenate([pair[k] for pair in gold]) for k in (0, 1))
    cuts = ranking.positive_cuts(gold_labels, gold_scores, len(names))
    pooled = ranking.positive_cuts(gold_labels, gold_scores, len(names), pooled=True)
    negatives = everywhere("count negatives", _negatives_of_part, spark.sparkContext.broadcast((cuts, pooled)))
    curve_sums = judge.added([s for s in negatives if s])
    fold = judge.curves(cuts, pooled, curve_sums, documents["test"])
    judged = everywhere("judge documents", _judge_part, spark.sparkContext.broadcast(fold))
    sums = judge.added([s for s, _, _ in judged if s])

    n = sums["documents"]
    metrics = ranking.metrics({**sums, **curve_sums}, n, len(names), cuts, pooled, if_undefined=undefined)
    if closure is not None:
        hits, said, known = (sums[f"hierarchical_{name}"] for name in ("hits", "tags", "gold"))
        metrics |= hierarchical_metrics(hits, said, known, undefined)
    changed = rule_changes(sums, undefined)
    status = run.read("label_models", ["label_id", "status"]).sort_by("label_id")["status"].to_pylist()
    table = judge.label_table(support, sums, cuts, curve_sums, names, thresholds, status, undefined)
    items = [item for _, item, _ in judged]
    paths = [attempt / item["file"] for item in items]
    card = {
        "metrics": metrics,
        "intervals": intervals(paths, n, len(names), metrics, cfg.evaluate),
        "groups": support_groups(table, undefined),
        "conventions": conventions(cfg) | decision.conventions(),
        "counts": {
            "documents": n,
            "labels": len(names),
            "labels_with_positives": int((table["support"].to_numpy() > 0).sum()),
            "labels_only_in_test": int(
                ((table["support"].to_numpy() > 0) & (table["train_support"].to_numpy() == 0)).sum()
            ),
            "training_documents": documents["train"],
            **{name: int(np.sum(sums[name])) for name in ("tp", "fp", "fn")},
        },
    }
    if changed:
        card["rules"] = changed
    write_bytes(attempt / "metrics.json", (json.dumps(card, indent=1) + "\n").encode())
    instead = confused(paths, names, sums["fp"], sums["fn"], n)
    examples = [example for _, _, part in judged for example in part][:EXAMPLES]
    from pipeline.report import render  # plots are slow to import, and the workers that load this module draw none

    page = render(
        title=run.root.name,
        metrics=card,
        label_counts=table,
        reliability_bins=reliability_bins(sums),
        stages=stage_rows(run),
        settings=settings(cfg),
        examples=examples,
        facts=corpus_facts(run),
        rules=changed,
        confusions=instead,
        problems=data_problems(run),
    )
    write_bytes(attempt / "report.html", page.encode())
    tables = {
        "label_counts": [write_part(attempt, "label_counts", table, 0)],
        "test_documents": items,
        "confusions": [write_part(attempt, "confusions", instead, 0)],
        "metrics.json": [entry(attempt / "metrics.json", attempt, 1)],
        "report.html": [entry(attempt / "report.html", attempt, 1)],
    }
    return Outcome(
        tables,
        {"metrics": metrics, "counts": card["counts"], "examples": examples, "reliability": reliability_bins(sums)},
    )


def intervals(paths: list[Place], n: int, n_labels: int, point: dict, cfg) -> dict[str, list[float]]:
    """{metric: [low, high]} from the parts of `test_documents`; empty where evaluate.bootstrap is 0.

    Parts are read one at a time; what stays in memory are sums of groups of documents (`bootstrap.units_of`).
    """
    if cfg.bootstrap == 0:
        return {}
    units = bootstrap.units_of_parts(map(document_lists, paths), n, n_labels, float(cfg.if_undefined))
    found = bootstrap.metric_intervals(
        units, n_labels, point, cfg.bootstrap, cfg.confidence, cfg.seed, float(cfg.if_undefined)
    )
    return {name: list(ends) for name, ends in found.items()}


def document_lists(path: Place) -> bootstrap.Documents:
    """Gold, tags and measures of a part of `test_documents`."""
    part = read_table(path, columns=["gold", "tags", "measures"]).combine_chunks()
    gold, tags = (
        (np.concatenate([[0], np.cumsum(pc.list_value_length(part[name]).to_numpy())]), _flat(part[name]))
        for name in ("gold", "tags")
    )
    return bootstrap.Documents(*gold, *tags, _flat(part["measures"]).reshape(-1, len(bootstrap.MEASURES)))


def _flat(column):
    return pc.list_flatten(column).to_numpy()


def support_groups(label_counts, if_undefined: float) -> dict[str, dict]:
    """Micro and macro metrics of head, torso and tail labels, and the training supports that bound each group."""
    columns = {name: label_counts[name].to_numpy() for name in ("tp", "fp", "fn", "support", "train_support")}
    found = {}
    for group, labels in counts.support_groups(columns["train_support"]).items():
        tp, fp, fn, support, train = (values[labels] for values in columns.values())
        found[group] = {
            "labels": labels.size,
            "labels_with_positives": int((support > 0).sum()),
            "train_support": [int(train.min()), int(train.max())] if labels.size else [0, 0],
            "support": int(support.sum()),
            **(counts.label_metrics(tp, fp, fn, if_undefined) if labels.size else {}),
        }
    return found


def confused(paths: list[Place], names: list[str], fp, fn, n: int):
    """The table `confusions`, from the parts of `test_documents`."""
    parts = (read_table(path, columns=["gold", "tags"]) for path in paths)
    pairs = functools.reduce(confusions.added, (confusions.error_pairs(part, len(names)) for part in parts))
    return confusions.table(pairs, names, fp, fn, n)


def rule_changes(sums: dict, if_undefined: float) -> dict:
    """What each kind of rule between labels added and removed, and micro and macro F1 before and after all of them."""
    if "before_rules_tp" not in sums:
        return {}
    before, after = (
        counts.label_metrics(sums[f"{prefix}tp"], sums[f"{prefix}fp"], sums[f"{prefix}fn"], if_undefined)
        for prefix in ("before_rules_", "")
    )
    kept = ("micro_precision", "micro_recall", "micro_f1", "macro_f1", "macro_f1_all")
    return {
        "before": {name: before[name] for name in kept},
        "after": {name: after[name] for name in kept},
        "changes": {
            kind: {what: int(np.sum(sums[f"{kind}_{what}"])) for what in ("added", "removed")} for kind in KINDS
        },
    }


def publish(run: Run) -> None:
    """Copies of metrics.json and report.html at the top of the run folder, for people and their scripts."""
    for name in ("metrics.json", "report.html"):
        with replacing(run.root / name) as part:
            part.write_bytes(run.files(name)[0].read_bytes())


def summary(facts: dict, rows: dict) -> str:
    m, c = facts["metrics"], facts["counts"]
    return (
        f"{c['documents']:,} documents; micro F1 {m['micro_f1']:.4f}, macro F1 {m['macro_f1']:.4f} over "
        f"{c['labels_with_positives']:,} labels with positives ({m['macro_f1_all']:.4f} over all {c['labels']:,}), "
        f"P@1 {m['p_at_1']:.4f}, P@5 {m['p_at_5']:.4f}"
    )


def conventions(cfg) -> dict[str, str]:
    """What the numbers depend on, in words."""
    return {
        "undefined": f"0/0 in precision, recall, F1 and Jaccard counts {cfg.evaluate.if_undefined}",
        "macro_f1": "mean over labels with at least one gold positive in the test fold",
        "macro_f1_all": "mean over every label of the label table",
        "ties": "a cut lies strictly between two distinct scores; a label is tagged where score >= cut",
        "ranking": "by calibrated log-odds, then label id; ties in nDCG, LRAP, coverage, ranking loss as scikit-learn",
        "k_above_labels": "P@k divides by k even where there are fewer labels",
        "documents_without_gold": "kept: they count as all-negative, and 0 in P@k, R@k, RP@k, nDCG@k and MAP@k",
        "labels_only_in_test": "kept, never tagged, counted in macro_f1",
        "average_precision_macro": "over labels with a positive; roc_auc_macro: with a positive and a negative",
        "psp": f"propensities of Jain et al. 2016, A {cfg.evaluate.propensity_a}, B {cfg.evaluate.propensity_b}; "
        "divided by the best possible ranking",
        **(
            {
                "intervals": f"{100 * cfg.evaluate.confidence:g} % intervals, basic bootstrap, documents resampled "
                f"{cfg.evaluate.bootstrap:,} times"
            }
            if cfg.evaluate.bootstrap
            else {}
        ),
        "probabilities": "ece (15 equal-width bins), brier and log_loss are means over all document-label pairs",
    }


def reliability_bins(sums: dict) -> list[dict]:
    """Mean probability and share of positives per bin of predicted probability."""
    return [
        {"probability": int(total) / 2**40 / int(pairs), "positives": int(gold) / int(pairs), "pairs": int(pairs)}
        for pairs, gold, total in zip(sums["bin_pairs"], sums["bin_positives"], sums["bin_probability"], strict=True)
        if pairs
    ]


def stage_rows(run: Run) -> list[dict]:
    """Seconds, cores, memory and rows of the stages that are finished."""
    keep = ("stage", "seconds", "cpu_seconds", "peak_bytes", "rows", "summary")
    manifests = [run.manifest(name) for name in ("ingest", "split", "featurize", "train", "calibrate")]
    return [{key: m.get(key) for key in keep} for m in manifests if m]


def settings(cfg) -> dict[str, object]:
    """The settings that decide a result; where work ran and was reported (and may hold credentials) is left out."""
    return {key: value for key, value in flat(cfg).items() if key.split(".")[0] not in VOLATILE}


def corpus_facts(run: Run) -> dict:
    ingest, split, featurize, train = (run.manifest(name) or {} for name in ("ingest", "split", "featurize", "train"))
    return {
        "documents": ingest.get("accepted"),
        "training documents": split.get("documents", {}).get("train"),
        "test documents": split.get("documents", {}).get("test"),
        "split": split.get("source"),
        "rejects": ingest.get("rejected"),
        "terms": featurize.get("terms"),
        "non-zeros": featurize.get("nonzeros"),
        "label models": train.get("statuses"),
    }


@functools.lru_cache(maxsize=1)
def _weights(mapped: Mapped):
    return Weights.load(mapped.folder())


EXAMPLES = 5
EXAMPLE_CHARACTERS = 600


def _loaded(shared):
    """Weights and decisions, in a task."""
    s = shared.value
    return s, _weights(s["weights"]), Decisions.from_table(s["thresholds"], s["rules"], s["document"])


def _gold_of_part(shared, numbered):
    s, weights, decisions = _loaded(shared)
    number, part = numbered
    kept = scores.kept(s["scores"], number, part, TEST, weights)
    found = [judge.gold_scores(chunk, decisions) for chunk in judge.chunks(part, s["labels"], TEST, weights, kept)]
    return tuple(
        np.concatenate([np.empty(0, dtype), *(pair[k] for pair in found)])
        for k, dtype in ((0, np.int64), (1, np.float64))
    )


def _chunks_again(s, weights, numbered):
    number, part = numbered
    return judge.chunks(part, s["labels"], TEST, weights, scores.again(s["scores"], number))


def _negatives_of_part(shared, cuts, numbered):
    s, weights, decisions = _loaded(shared)
    found = (judge.count_negatives(c, decisions, *cuts.value) for c in _chunks_again(s, weights, numbered))
    return judge.added(list(found))


def _judge_part(shared, fold, numbered):
    s, weights, decisions = _loaded(shared)
    sums: list[dict] = []

    def rows():
        for chunk in _chunks_again(s, weights, numbered):
            part, table = judge.judge(chunk, decisions, fold.value, s["propensity"], s["if_undefined"], s["closure"])
            sums.append(part)
            yield table

    number, part = numbered
    item = write_part(s["attempt"], "test_documents", rows(), number)
    kept = scores.again(s["scores"], number)
    shown = judge.examples(part, s["labels"], TEST, weights, kept, decisions, EXAMPLES, EXAMPLE_CHARACTERS)
    return judge.added(sums), item, shown
