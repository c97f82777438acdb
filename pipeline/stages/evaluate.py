"""Evaluate.

    features[test], label_models (as weights), thresholds, rules.json, decision.json,
    documents (labels)
        ->  label_counts, metrics.json, report.html

Each task returns integers that add; Spark adds them and ratios are taken once, here.  Curves take two passes: the first
learns the scores of the gold pairs, the second counts the negatives between them.
"""

import functools
import json
from pathlib import Path

import numpy as np

from pipeline.config import VOLATILE, flat
from pipeline.errors import DataError
from pipeline.kernels import counts, ranking
from pipeline.kernels.hierarchy import KINDS, hierarchical_metrics
from pipeline.learners import judge
from pipeline.learners.label_rules import compiled, hierarchy_closure
from pipeline.learners.tagger import Decisions, Weights
from pipeline.stages.parts import Outcome, decision_of, rules_of, run_tasks
from pipeline.stages.split import TEST
from pipeline.store import Run, entry, replacing, write_bytes, write_part


def evaluate(spark, run: Run, attempt: Path, cfg) -> Outcome:
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
    shared = spark.sparkContext.broadcast(
        {
            "labels": names,
            "weights": str(run.files("weights")[0].parent),
            "thresholds": run.read("thresholds"),
            "rules": compiled(rules, names) if rules else None,
            "document": decision_of(run),
            "closure": closure,
            "propensity": propensity,
            "if_undefined": float(cfg.evaluate.if_undefined),
        }
    )
    parts = [
        tuple(map(str, paths))
        for paths in zip(*(run.files(t) for t in ("features", "folds", "documents")), strict=True)
    ]
    first = run_tasks(spark, "evaluate: score and count", functools.partial(_judge_part, shared), parts)
    sums = judge.added([s for s, _, _ in first if s])
    gold_labels, gold_scores = (np.concatenate([pair[k] for _, pair, _ in first]) for k in (0, 1))
    cuts = ranking.positive_cuts(gold_labels, gold_scores, len(names))
    pooled = ranking.positive_cuts(gold_labels, gold_scores, len(names), pooled=True)
    curves = spark.sparkContext.broadcast((cuts, pooled))
    second = run_tasks(spark, "evaluate: count negatives", functools.partial(_negatives_of_part, shared, curves), parts)
    curve_sums = judge.added([s for s in second if s])

    n = sums["documents"]
    undefined = float(cfg.evaluate.if_undefined)
    metrics = ranking.metrics({**sums, **curve_sums}, n, len(names), cuts, pooled, if_undefined=undefined)
    if closure is not None:
        hits, said, gold = (sums[f"hierarchical_{name}"] for name in ("hits", "tags", "gold"))
        metrics |= hierarchical_metrics(hits, said, gold, undefined)
    changed = rule_changes(sums, undefined)
    status = run.read("label_models", ["label_id", "status"]).sort_by("label_id")["status"].to_pylist()
    thresholds = run.read("thresholds")
    table = judge.label_table(support, sums, cuts, curve_sums, names, thresholds, status, undefined)
    card = {
        "metrics": metrics,
        "intervals": {},
        "conventions": conventions(cfg) | decision_of(run).conventions(),
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
    examples = [example for _, _, part in first for example in part][:5]
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
    )
    write_bytes(attempt / "report.html", page.encode())
    tables = {
        "label_counts": [write_part(attempt, "label_counts", table, 0)],
        "metrics.json": [entry(attempt / "metrics.json", attempt, 1)],
        "report.html": [entry(attempt / "report.html", attempt, 1)],
    }
    return Outcome(
        tables,
        {"metrics": metrics, "counts": card["counts"], "examples": examples, "reliability": reliability_bins(sums)},
    )


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
def _weights(folder):
    return Weights.load(Path(folder))


EXAMPLES = 5
EXAMPLE_CHARACTERS = 600


def _judge_part(shared, paths):
    s = shared.value
    weights, decisions = _weights(s["weights"]), Decisions.from_table(s["thresholds"], s["rules"], s["document"])
    sums, scored = [], []
    for chunk in judge.chunks(*map(Path, paths), s["labels"], TEST):
        part, pairs = judge.judge(chunk, weights, decisions, s["propensity"], s["if_undefined"], s["closure"])
        sums.append(part)
        scored.append(pairs)
    labels, scores = (
        np.concatenate([np.empty(0, dtype), *(pair[k] for pair in scored)])
        for k, dtype in ((0, np.int64), (1, np.float64))
    )
    return judge.added(sums), (labels, scores), _examples(paths, s, weights, decisions)


def _negatives_of_part(shared, curves, paths):
    s = shared.value
    weights, decisions = _weights(s["weights"]), Decisions.from_table(s["thresholds"], s["rules"], s["document"])
    return judge.added(
        [
            judge.count_negatives(chunk, weights, decisions, *curves.value)
            for chunk in judge.chunks(*map(Path, paths), s["labels"], TEST)
        ]
    )


def _examples(paths, s, weights, decisions):
    """The first test documents of a part with their gold and their tags."""
    return judge.examples(*map(Path, paths), s["labels"], TEST, weights, decisions, EXAMPLES, EXAMPLE_CHARACTERS)
