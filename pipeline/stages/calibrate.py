"""Calibrate.

    labels, curves, histograms (and the status of each model)  ->  thresholds, rules.json, decision.json

Everything is read off the stored curves: another rule takes seconds and no training.
"""

import logging

import numpy as np

from pipeline.learners.decide import Evidence, decide, evidence
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.label_rules import check_labels, read_rules
from pipeline.stages.parts import Outcome
from pipeline.storage import Place
from pipeline.store import Run, entry, write_json, write_part

log = logging.getLogger(__name__)


def calibrate(spark, run: Run, attempt: Place, cfg) -> Outcome:
    """One threshold and one probability map a label.  The curves are small, so the driver does it."""
    status = run.read("label_models", ["label_id", "status"]).sort_by("label_id")["status"].to_pylist()
    thresholds, facts = decide(known_of(run, cfg), status, cfg.calibrate)
    cuts = thresholds["threshold"].drop_null().to_numpy()
    facts |= {
        "labels_never_tagged": thresholds["threshold"].null_count,
        "threshold_quartiles": [float(q) for q in np.percentile(cuts, [25, 50, 75])] if cuts.size else [],
    }
    rules = read_rules(cfg.calibrate.rules) if cfg.calibrate.rules else {}
    if rules:
        for warning in check_labels(rules, run.read("labels", ["label"])["label"].to_pylist()):
            log.warning("calibrate: %s", warning)
    write_json(attempt / "rules.json", rules)
    document = DocumentRule.of(cfg.calibrate, cfg.evaluate.if_undefined)
    write_json(attempt / "decision.json", document.model_dump())
    tables = {
        "thresholds": [write_part(attempt, "thresholds", thresholds, 0)],
        "rules.json": [entry(attempt / "rules.json", attempt, 1)],
        "decision.json": [entry(attempt / "decision.json", attempt, 1)],
    }
    return Outcome(tables, facts)


def known_of(run: Run, cfg) -> Evidence:
    """What the stage train left to choose thresholds from."""
    labels = run.read("labels", ["label_id"]).num_rows
    return evidence(run.read("curves"), run.read("histograms"), labels, cfg.calibrate)


def summary(facts: dict, rows: dict) -> str:
    quartiles = ", ".join(f"{q:.2f}" for q in facts["threshold_quartiles"])
    before, after = (facts["calibration"][f"log_loss_{when}"] for when in ("before", "after"))
    known = "" if before is None else f"; log loss {before:.4f} before and {after:.4f} after calibration"
    if known and not facts["calibration_out_of_fold"]:
        known += " (on the rows it was fitted to)"
    return (
        f"{rows['thresholds']:,} thresholds by rule {facts['rule']} (quartiles {quartiles}), "
        f"{facts['labels_never_tagged']:,} labels are never tagged{known}"
    )
