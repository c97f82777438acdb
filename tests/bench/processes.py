"""Every training is timed in a process of its own, on one thread: ours in this environment, a peer in its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import peers

ROOT = Path(__file__).parents[2]
THREADS = ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON")


class Skipped(Exception):
    """A part, a corpus or a peer that cannot run here; the message is one line that says why."""


def peers_python() -> Path:
    """The interpreter of the peers' environment: TAGMILL_PEERS, or .venv-peers of this folder."""
    python = ROOT / (os.environ.get("TAGMILL_PEERS") or ".venv-peers") / "bin" / "python"
    if not python.exists():
        raise Skipped("the peers' environment is missing; `make bench-env` builds it, TAGMILL_PEERS names another")
    return python


def ours(module: str, *arguments: Any) -> dict[str, np.ndarray]:
    """What `python -m tests.bench.MODULE ARGUMENTS --out FILE` wrote."""
    return _written([sys.executable, "-m", f"tests.bench.{module}", *arguments])


def peer(name: str, *arguments: Any) -> dict[str, np.ndarray]:
    """What peers.py wrote for the peer `name`; Skipped with its last words where it failed."""
    try:
        return _written([peers_python(), peers.__file__, name, *arguments])
    except RuntimeError as error:
        raise Skipped(str(error).splitlines()[-1]) from error


def start(command: Sequence[Any], **environment: str) -> subprocess.Popen:
    """A process on one thread, its output kept."""
    one_thread = {f"{name}_NUM_THREADS": "1" for name in THREADS}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | one_thread | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    """What the process printed; RuntimeError with its complaints where it failed."""
    printed, complaints = process.communicate()
    if process.returncode:
        raise RuntimeError(complaints.strip() or f"{process.args[:3]} ended with {process.returncode}")
    return printed


def _written(command):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        output(start([*command, "--out", out]))
        with np.load(out, allow_pickle=False) as saved:
            return dict(saved)
