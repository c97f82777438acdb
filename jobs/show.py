"""What `tagmill show` prints: metrics, labels, stages, one label, one table, the settings."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pipeline import config as configuration
from pipeline.errors import ConfigError, InputError, shown
from pipeline.flow import FIT
from pipeline.storage import explained, place, replacing
from pipeline.store import Run, stages_done
from pipeline.tables import TABLES
from pipeline.tracking import redacted

GROUPS = (
    (
        "Decisions",
        ("micro_f1", "micro_precision", "micro_recall", "macro_f1", "macro_f1_all", "weighted_f1", "samples_f1"),
    ),
    ("Sets", ("jaccard_samples", "subset_accuracy", "hamming_loss")),
    (
        "Top of the ranking",
        ("p_at_1", "p_at_3", "p_at_5", "r_at_5", "r_at_10", "rp_at_5", "ndcg_at_1", "ndcg_at_3", "ndcg_at_5"),
    ),
    ("Rare labels first", ("psp_at_1", "psp_at_3", "psp_at_5")),
    ("Whole ranking", ("map_at_5", "map_at_10", "lrap", "coverage_error", "ranking_loss")),
    ("Curves", ("average_precision_macro", "average_precision_micro", "roc_auc_macro")),
    ("Probabilities", ("ece", "brier", "log_loss")),
)
LABELS = 20  # rows of the label table on the screen


def console(width: int = 110) -> Console:
    """Plain text of a fixed width where nobody looks at a terminal."""
    return Console(soft_wrap=False) if sys.stdout.isatty() else Console(width=width, color_system=None)


def metrics_table(card: dict) -> None:
    """metrics.json as a table; both denominators of macro F1 are said."""
    counts, metrics, intervals = card["counts"], card["metrics"], card.get("intervals")
    notes = {
        "macro_f1": f"over {counts['labels_with_positives']:,} labels with test positives",
        "macro_f1_all": f"over all {counts['labels']:,} labels",
        "micro_f1": f"tp {counts['tp']:,}, fp {counts['fp']:,}, fn {counts['fn']:,}",
    }
    grid = Grid(title=f"{counts['documents']:,} test documents", title_justify="left", show_edge=False, pad_edge=False)
    grid.add_column("")
    grid.add_column("metric")
    grid.add_column("value", justify="right")
    if intervals:
        grid.add_column("interval", justify="right", no_wrap=True)
    grid.add_column("")
    for group, names in GROUPS:
        for k, name in enumerate(names):
            grid.add_row(
                group if k == 0 else "",
                name,
                f"{metrics[name]:.4f}",
                *([_interval(intervals.get(name))] if intervals else []),
                notes.get(name, ""),
                end_section=name == names[-1],
            )
    console().print(grid)


def _interval(ends):
    return f"{ends[0]:.4f} .. {ends[1]:.4f}" if ends else ""


def overview(run: Run, as_json: bool) -> None:
    """Metrics, the most frequent labels, and where the time went."""
    manifests = {name: run.manifest(name) for name in stages_done(run)}
    info = run.info
    card = json.loads(run.files("metrics.json")[0].read_text()) if "evaluate" in manifests else None
    if as_json:
        keep = ("stage", "seconds", "cpu_seconds", "peak_bytes", "rows", "fingerprint", "summary")
        value = {
            "run": str(run.root),
            "input": info["input"],
            "complete": "evaluate" in manifests,
            "stages": [{key: m.get(key) for key in keep} for m in manifests.values() if m],
            "missing": [stage.name for stage in FIT if stage.name not in manifests],
            "facts": {name: _facts(m) for name, m in manifests.items() if m},
            "config": _without_secrets(info["config"]),
            **(card or {}),
        }
        print(json.dumps(value, indent=1, ensure_ascii=False))
        return
    out = console()
    if card:
        metrics_table(card)
        _label_grid(out, run)
    _stage_grid(out, manifests)
    out.print(f"run      {run.root}", highlight=False)
    out.print(f"input    {info['input']}", highlight=False)
    if card:
        out.print(f"report   {run.root / 'report.html'}", highlight=False)
    missing = [stage.name for stage in FIT if stage.name not in manifests]
    if missing:
        out.print(f"missing  {', '.join(missing)}: run the same `tagmill fit` again", highlight=False)


def _without_secrets(value):
    """Settings as they may be shown: no user and password in addresses, no Spark option that is named like a secret."""
    if isinstance(value, dict):
        hidden = ("secret", "password", "token", "credential", "access.key")
        return {k: "***" if any(w in k.lower() for w in hidden) else _without_secrets(v) for k, v in value.items()}
    return redacted(value) if isinstance(value, str) else value


def _facts(manifest):
    hidden = {"tables", "schemas", "recipe", "attempt", "examples", "block_seconds", "reliability", "metrics", "counts"}
    return {key: value for key, value in manifest.items() if key not in hidden}


def _label_grid(out, run):
    table = run.read("label_counts").sort_by([("train_support", "descending"), ("label_id", "ascending")])
    grid = Grid(
        title=f"\nLabels, most frequent first ({table.num_rows:,} in all)", title_justify="left", show_edge=False
    )
    grid.add_column("label", overflow="ellipsis", max_width=40, no_wrap=True)
    for name in ("train", "test", "tp", "fp", "fn", "precision", "recall", "F1", "threshold"):
        grid.add_column(name, justify="right")
    for row in table.slice(0, LABELS).to_pylist():
        grid.add_row(
            Text(shown(row["label"], 60)),
            *(f"{row[name]:,}" for name in ("train_support", "support", "tp", "fp", "fn")),
            *(_number(row[name]) for name in ("precision", "recall", "f1", "threshold")),
        )
    out.print(grid)
    if table.num_rows > LABELS:
        out.print(f"{table.num_rows - LABELS:,} more: tagmill show {run.root} --table label_counts", highlight=False)


def _stage_grid(out, manifests):
    grid = Grid(title="\nStages", title_justify="left", show_edge=False)
    grid.add_column("stage")
    for name in ("seconds", "CPU s", "peak MB"):
        grid.add_column(name, justify="right")
    grid.add_column("what", overflow="fold")
    for name, manifest in manifests.items():
        grid.add_row(
            name,
            _number(manifest.get("seconds"), 1),
            _number(manifest.get("cpu_seconds"), 1),
            f"{manifest['peak_bytes'] / 1e6:,.0f}" if manifest.get("peak_bytes") else "–",
            Text(manifest.get("summary", "")),
        )
    out.print(grid)


def thresholds(run: Run, cfg: configuration.Config, as_json: bool) -> None:
    """What each rule would give on documents it was not chosen on, from the stored curves."""
    from pipeline.learners.decide import side_by_side
    from pipeline.learners.document_rules import BY_DOCUMENT, DocumentRule
    from pipeline.stages.calibrate import known_of

    known = known_of(run, cfg)
    rules = side_by_side(known, cfg.calibrate)
    if as_json:
        value = {"rules": rules, "cross_fitted": known.maps.out_of_fold, "by_document": BY_DOCUMENT}
        print(json.dumps(value, indent=1))
        return
    support = known.pooled.support()
    documents, tags = int(known.pooled.rows().max(initial=0)), int(support.sum())
    judged = "cross-fitted over folds" if known.maps.out_of_fold else "judged on what they were chosen on"
    out = console()
    grid = Grid(
        title=f"{documents:,} training documents, {tags / max(documents, 1):.2f} gold labels a document; {judged}",
        title_justify="left",
        show_edge=False,
    )
    grid.add_column("calibrate.rule")
    for name in ("micro P", "micro R", "micro F1", "macro F1", "macro F1, all", "tags a document"):
        grid.add_column(name, justify="right")
    keys = ("micro_precision", "micro_recall", "micro_f1", "macro_f1", "macro_f1_all")
    for rule, found in rules.items():
        mark = " *" if rule == cfg.calibrate.rule else ""
        grid.add_row(rule + mark, *(f"{found[k]:.4f}" for k in keys), f"{found['tags']:.2f}")
    out.print(grid)
    out.print(
        f"macro F1 is over {int((support > 0).sum()):,} labels with a positive, and over all {support.size:,}; "
        "* is the rule of the run",
        highlight=False,
    )
    # the curves hold labels, not documents
    also = "" if DocumentRule.of(cfg.calibrate, 0).plain else ", and so do at_least_one and at_most, which are left out"
    out.print(
        f"{' and '.join(BY_DOCUMENT)} need whole documents{also}: try them with `tagmill calibrate`, which evaluates",
        highlight=False,
    )
    out.print(f"choose one: tagmill calibrate --run {run.root} --set calibrate.rule=NAME", highlight=False)


def versions(run: Run, as_json: bool) -> None:
    """What calibrate and evaluate left, now and before."""
    from pipeline.versions import listed

    rows = listed(run)
    if as_json:
        print(json.dumps({"versions": rows}, indent=1, ensure_ascii=False))
        return
    out = console()
    grid = Grid(show_edge=False)
    for name in ("version", "UTC", "rule", "micro F1", "macro F1", "settings that differ from the one before"):
        grid.add_column(name, justify="right" if name.endswith("F1") else "left", overflow="fold")
    for row in rows:
        number = "now" if row["number"] is None else f"{row['number']}{' *' if row['current'] else ''}"
        settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in row["settings"].items())
        scores = (_number(row[name], 4) for name in ("micro_f1", "macro_f1"))
        note = "" if row["same_models"] else " (of other models)"
        grid.add_row(number, row["when"], row["rule"], *scores, Text(shown(settings + note, 500)))
    out.print(grid)
    out.print(f"put one back: tagmill calibrate --run {run.root} --version N; * is in use", highlight=False)


def _number(value, digits=3):
    return "–" if value is None else f"{value:,.{digits}f}"


def label(run: Run, name: str, as_json: bool) -> None:
    """One label: counts, model, threshold, curve, heaviest weights.  Raises InputError with the nearest names."""
    counts = run.read("label_counts")
    names = counts["label"].to_pylist()
    if name not in names:
        import difflib

        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; near: {', '.join(shown(n) for n in near)}" if near else ""
        raise InputError(f"{run.root}: no label {shown(name)} among {len(names)}{hint}")
    label_id = names.index(name)
    here = pa.compute.equal
    row = counts.slice(label_id, 1).to_pylist()[0]
    decision = run.read("thresholds").slice(label_id, 1).to_pylist()[0]
    models = run.read("label_models")
    model = models.filter(here(models["label_id"], label_id)).to_pylist()[0]
    curves = run.read("curves")
    curve = curves.filter(pa.compute.and_(here(curves["label_id"], label_id), here(curves["fold"], -1))).to_pylist()
    terms = run.read("vocabulary", ["term"])["term"]
    weights = np.array(model["weights"])
    order = np.argsort(-weights)
    heaviest = (
        [(terms[model["indices"][k]].as_py(), float(weights[k])) for k in [*order[:15], *order[-5:]]]
        if weights.size
        else []
    )
    points: dict = curve[0] if curve else {"cut": [], "tp": [], "fp": [], "positives": 0}
    if as_json:
        model.pop("indices"), model.pop("weights")
        value = {"counts": row, "threshold": decision, "model": model, "terms": heaviest, "curve": points}
        print(json.dumps(value, indent=1, ensure_ascii=False))
        return
    out = console()
    out.print(Text(f"label {shown(name)}"))
    for title, values in (("test", row), ("decision", decision), ("model", model)):
        skip = ("label", "label_id", "indices", "weights")
        text = ", ".join(
            f"{k} {_number(v, 4) if isinstance(v, float) else v}" for k, v in values.items() if k not in skip
        )
        out.print(Text(f"{title:<9}{text}"), soft_wrap=True)
    out.print(Text("terms    " + ", ".join(f"{shown(t, 30)} {w:+.2f}" for t, w in heaviest)), soft_wrap=True)
    grid = Grid(title="\nOut-of-fold curve: what each cut would give", title_justify="left", show_edge=False)
    for column in ("cut", "tp", "fp", "precision", "recall", "F1"):
        grid.add_column(column, justify="right")
    for k in _spread(len(points["cut"]), 12):
        cut, tp, fp = points["cut"][k], points["tp"][k], points["fp"][k]
        f1 = 2 * tp / (tp + fp + points["positives"])
        grid.add_row(
            f"{cut:.3f}", f"{tp:,}", f"{fp:,}", f"{tp / (tp + fp):.3f}", f"{tp / points['positives']:.3f}", f"{f1:.3f}"
        )
    out.print(grid)


def _spread(size, most):
    return sorted({int(k) for k in np.linspace(0, size - 1, min(size, most))}) if size else []


def table(run: Run, name: str, output: str | None, as_json: bool) -> None:
    """One table in its order (see `tables.Table`): to the screen, as JSON lines, or to a .parquet or .csv file."""
    if name not in TABLES or name == "tags":
        raise ConfigError(f"--table {shown(name)}: expected one of {', '.join(t for t in TABLES if t != 'tags')}")
    rows = run.read(name)
    rows = rows.sort_by(TABLES[name].order).combine_chunks()
    if output:
        _write_table(rows, place(output))
        print(output)
    elif as_json:
        for batch in rows.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                print(json.dumps(row, ensure_ascii=False))
    else:
        out = console()
        grid = Grid(title=f"{name}: {TABLES[name].sentence}", title_justify="left", show_edge=False)
        for column in rows.schema.names:
            grid.add_column(column, overflow="ellipsis", max_width=40, no_wrap=True)
        for row in rows.slice(0, 50).to_pylist():
            grid.add_row(*(Text(shown(_cell(value), 60)) for value in row.values()))
        out.print(grid)
        if rows.num_rows > 50:
            out.print(
                f"{rows.num_rows - 50:,} more rows; all of them: --output FILE.parquet or FILE.csv", highlight=False
            )


def _cell(value):
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(str(v) for v in value[:5])}"
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_table(rows, path):
    with explained(path, "write"), replacing(path) as part:
        if path.suffix == ".parquet":
            pq.write_table(rows, part, compression="zstd")
        elif path.suffix == ".csv":
            for k, field in enumerate(rows.schema):
                if pa.types.is_nested(field.type):
                    text = pa.array([json.dumps(v.as_py(), ensure_ascii=False) for v in rows.column(k)], pa.string())
                    rows = rows.set_column(k, field.name, text)
            pyarrow.csv.write_csv(rows, part)
        else:
            raise ConfigError(f"--output {shown(path.name)}: expected a name that ends in .parquet or .csv")


def settings(config: configuration.Config, origins: dict[str, str], as_json: bool) -> None:
    """Every setting with its value, where it came from and what it means."""
    meanings = configuration.describe()
    values = configuration.flat(config)
    if as_json:
        rows = {k: {"value": v, "from": origins.get(k, "default"), "meaning": meanings[k]} for k, v in values.items()}
        print(json.dumps(rows, indent=1))
        return
    grid = Grid(show_edge=False)
    for column in ("setting", "value", "from", "meaning"):
        grid.add_column(column, overflow="fold")
    section = ""
    for key, value in values.items():
        here = key.split(".")[0]
        if section and here != section:
            grid.add_section()
        section = here
        grid.add_row(key, Text(json.dumps(value)), origins.get(key, "default"), Text(meanings[key]))
    console().print(grid)
