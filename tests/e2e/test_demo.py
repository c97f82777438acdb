"""The demo and the notebook, as a stranger runs them; the second run does nothing anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return root, {**os.environ, "TAGMILL_HOME": str(root / "home"), "TAGMILL_RUNS": str(root)}


def demo(root, env):
    done = subprocess.run(
        [BIN / "tagmill", "demo", "--run", root / "demo"],
        capture_output=True,
        text=True,
        env=env,
        cwd=root,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_demo(place):
    root, env = place
    done = demo(root, env)
    card = json.loads((root / "demo" / "metrics.json").read_text())
    assert card["counts"]["documents"] + card["counts"]["training_documents"] > 20_000
    assert card["counts"]["labels"] > 200
    assert card["metrics"]["micro_f1"] > 0.7
    assert card["metrics"]["macro_f1"] > 0.5
    for words in ("micro_f1", "Five test documents", "gold ", "tags ", "report.html", "mlflow", "ui"):
        assert words in done.stdout
    assert done.stdout.count("  gold  ") == 5
    again = demo(root, env)
    assert again.stderr.count("up to date") == 7
    assert "spark" not in again.stderr
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_notebook(place, tmp_path):
    """Executed after the demo, so that the fit in it is current."""
    import nbformat
    from nbclient import NotebookClient

    root, env = place
    demo(root, env)
    notebook = nbformat.read(ROOT / "notebooks" / "first_run.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    before = dict(os.environ)
    os.environ.update(env)
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    text = json.dumps(notebook)
    assert "image/png" in text
    assert "Draw samples from a multivariate normal" in text
    last = "".join(out.get("text", "") for out in notebook.cells[-1]["outputs"])
    assert "function" in last or "method" in last
