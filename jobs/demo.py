"""The demo: fit on the docstrings of the installed libraries, tag five of them, say where to look."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from pathlib import Path

from rich.text import Text

from jobs import entry, show
from pipeline import config as configuration
from pipeline import docstrings
from pipeline.errors import ConfigError, shown
from pipeline.storage import explained, is_uri
from pipeline.store import Run

log = logging.getLogger("tagmill")

CONFIG = Path(__file__).parent.parent / "conf" / "demo.yaml"


def demo(run_dir: str, sets: list[str]) -> None:
    """Build the corpus where it is not there yet, fit, print metrics, five tagged documents and what to open."""
    cfg, _ = configuration.load(CONFIG if CONFIG.is_file() else None, sets)
    if is_uri(run_dir):
        raise ConfigError(f"--run {shown(run_dir)}: the demo writes its corpus beside its run; give a folder")
    path = corpus(Path(os.path.abspath(run_dir)))
    # the libraries may have changed since the last demo; its run folder is ours to redo
    run = entry.fit(run_dir, str(path), cfg, overwrite=True)
    show.metrics_table(json.loads(run.files("metrics.json")[0].read_text()))
    examples(run)
    out = show.console()
    out.print(f"\nreport    {run.root / 'report.html'}", highlight=False, soft_wrap=True)
    out.print(f"look at   tagmill show {run.root}", highlight=False, soft_wrap=True)
    out.print(f"tag       tagmill tag --run {run.root} --input FILE --output FOLDER", highlight=False, soft_wrap=True)
    if cfg.mlflow.enabled:
        from pipeline import tracking

        out.print(f"MLflow    {tracking.ui_command(cfg.mlflow)}", highlight=False, soft_wrap=True)


def corpus(run: Path) -> Path:
    """The corpus file beside the run folder; its name changes with the installed libraries."""
    mark = hashlib.sha256(Path(docstrings.__file__).read_bytes() + platform.python_version().encode())
    for name, version in sorted({(d.name, d.version) for d in importlib.metadata.distributions()}):
        mark.update(f"{name} {version}\n".encode())
    path = run.parent / f"{run.name}-docstrings-{mark.hexdigest()[:8]}.parquet"
    if not path.is_file():
        with explained(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("corpus: reading the docstrings of the installed libraries")
            docstrings.write_corpus(path)
    return path


def examples(run: Run) -> None:
    """Five test documents with their gold labels and what was said of them."""
    out = show.console()
    out.print("\nFive test documents: + right, - wrong, . missed", highlight=False)
    for example in run.finished("evaluate")["examples"]:
        gold = set(example["gold"])
        said = [(tag["label"], tag["probability"]) for tag in example["tags"]]
        out.print(Text(f"\n{shown(example['doc_id'], 100)}"), style="bold")
        out.print(Text(f"  {shown(' '.join(example['text'].split()), 240)}"))
        out.print(Text(f"  gold  {', '.join(sorted(shown(g, 40) for g in gold))}"))
        marks = [f"{'+' if label in gold else '-'}{shown(label, 40)} {p:.2f}" for label, p in said]
        marks += [f".{shown(label, 40)}" for label in sorted(gold - {label for label, _ in said})]
        out.print(Text(f"  tags  {', '.join(marks) or 'none'}"))
