"""Kill `tagmill fit` again and again, at random moments, and see that nothing is lost, doubled or changed.

    python -m tests.chaos [--kills 100] [--seed N] [--master local[2]] [--mutation NAME]

Workload: the command itself on a small generated corpus.  Nemesis: seeded choice of victim and moment, half of them
while a file is being published.  Checker: `checker`, which knows nothing of the pipeline.  Every kill is a line of
JSON; the seed is printed first and last.  Exit code 1 where anything was wrong.

--mutation takes a guard of the pipeline away (`mutations`): the loop must then end with exit code 1.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from tests.chaos import checker
from tests.chaos.mutations import MUTATIONS

SETS = ("mlflow.enabled=false", "train.labels_per_block=2", "train.gap=1e-4", "evaluate.bootstrap=100")
VICTIMS = ("driver", "jvm", "worker", "group", "term")
ENDS = {"driver": -signal.SIGKILL, "group": -signal.SIGKILL, "jvm": 69, "term": 143}
PATIENCE = 30  # seconds in which whoever survives a kill must be gone


def corpus(folder: Path, documents: int = 600, labels: int = 40) -> dict:
    """Documents as JSON Lines, some of them broken, and the truth about them."""
    draw = random.Random(11)
    truth: dict = {"documents": [], "labels": [], "records": documents + 3}
    used = set()
    lines = []
    for i in range(documents):
        on = [j for j in range(labels) if draw.random() < 0.3 / (j + 1) ** 0.7]
        words = [f"word{j}x{draw.randrange(3)}" for j in on for _ in range(2)]
        words += [f"filler{draw.randrange(500)}" for _ in range(20)]
        used.update(on)
        truth["documents"].append(f"d{i}")
        lines.append(json.dumps({"doc_id": f"d{i}", "text": " ".join(words), "labels": [f"label {j}" for j in on]}))
    lines[100:100] = ["{broken", '{"doc_id": "x"}', '{"doc_id": "", "text": "a", "labels": []}']
    truth["labels"] = sorted(f"label {j}" for j in used)
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "truth.json").write_text(json.dumps(truth))
    return truth


class Fit:
    """One start of the command; its processes carry a token of their own, so that no other process is ever a victim."""

    def __init__(
        self, folder: Path, run: Path, master: str, mutation: str | None = None, env=(), words=(), prefix=(), umask=-1
    ):
        self.token = uuid.uuid4().hex
        self.run = run
        environment = {**os.environ, "TAGMILL_HOME": str(folder / "home"), "CHAOS_ID": self.token}
        if mutation:
            environment["CHAOS_MUTATION"] = mutation
            places = [Path(__file__).parent / "site", Path(__file__).parents[2]]  # sitecustomize patches every process
            environment["PYTHONPATH"] = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
        environment |= dict(env)
        command = [*prefix, str(Path(sys.executable).parent / "tagmill"), "fit"]
        command += ["--input", str(folder / "documents.jsonl"), "--run", str(run), "--master", master]
        command += [*(x for s in SETS for x in ("--set", s)), *words]
        self.log = (folder / f"{self.token}.log").open("w+")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.log, env=environment, start_new_session=True, umask=umask
        )

    def family(self) -> list[psutil.Process]:
        """All processes with the token, the driver included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CHAOS_ID") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def victim(self, kind: str, draw: random.Random) -> psutil.Process | None:
        others = [p for p in self.family() if p.pid != self.process.pid]
        if kind == "jvm":
            others = [p for p in others if "java" in p.name()]
        elif kind == "worker":
            others = [p for p in others if "python" in p.name() and "pipeline.daemon" in " ".join(p.cmdline())]
        return draw.choice(others) if others else None

    def strike(self, kind: str, draw: random.Random) -> int:
        """Kill; returns how many processes were hit."""
        try:
            if kind == "driver":
                self.process.kill()
            elif kind == "term":
                self.process.terminate()
            elif kind == "group":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                victim = self.victim(kind, draw)
                if victim is None:
                    return 0
                victim.kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            return 0
        return 1

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def gone(self) -> list[str]:
        """Processes that are still there when they should not be; they are stopped."""
        until = time.monotonic() + PATIENCE
        while (left := self.family()) and time.monotonic() < until:
            time.sleep(0.2)
        names = [f"{p.pid} {' '.join(p.cmdline())[:100]}" for p in left if p.is_running()]
        for process in left:
            process.kill()
        return names


def publishing(run: Path) -> bool:
    """Whether a file is being written under its temporary name."""
    return any(run.glob("*/*/.*.tmp")) or any(run.glob("*/.*.tmp"))


def wait_for_moment(fit: Fit, draw: random.Random, span: float) -> None:
    """A random moment of the run, or the first time after it that a file is being published."""
    at = fit.began + draw.uniform(0, span)
    at_publish = draw.random() < 0.5
    while fit.process.poll() is None:
        if time.monotonic() >= at and (not at_publish or publishing(fit.run)):
            return
        time.sleep(0.0005 if time.monotonic() >= at else 0.02)


def loop(folder: Path, kills: int, seed: int, master: str, mutation: str | None = None, tell=print) -> list[str]:
    """Everything that went wrong in `kills` kills."""
    draw = random.Random(seed)
    truth = corpus(folder)
    golden = Fit(folder, folder / "golden", master, None)
    if golden.process.wait(900) != 0:
        return [f"the undisturbed run failed: {golden.said()[-2000:]}"]
    span = time.monotonic() - golden.began
    expected = checker.prints(folder / "golden")
    wrong = checker.violations(folder / "golden", truth) + golden.gone()
    hit, number = 0, 0
    while hit < kills and not wrong:
        number += 1
        run = folder / f"run-{number}"
        while not wrong:  # the same command until it is through
            fit = Fit(folder, run, master, mutation)
            kind = draw.choice(VICTIMS) if hit < kills else None
            struck = 0
            if kind:
                wait_for_moment(fit, draw, span)
                if fit.process.poll() is None:
                    struck = fit.strike(kind, draw)
                    hit += struck
            try:
                code = fit.process.wait(4 * span + 60)
            except subprocess.TimeoutExpired:
                wrong.append(f"hangs after {kind}")
                code = None
            left = fit.gone()
            wrong += [f"left behind: {name}" for name in left]
            wrong += checker.violations(run, truth)
            lines = fit.said()
            allowed = {0, ENDS.get(kind)} if struck else {0}
            if code not in allowed or "Traceback" in lines:
                wrong.append(f"exit code {code} after {kind if struck else 'nothing'}: {lines[-1500:]}")
            after = round(time.monotonic() - fit.began, 2)
            tell(json.dumps({"run": number, "kill": hit, "victim": kind, "struck": struck, "code": code, "s": after}))
            if code == 0:
                break
        if not wrong and checker.prints(run) != expected:
            changed = [name for name, prints in checker.prints(run).items() if prints != expected[name]]
            wrong.append(f"run {number} differs from the undisturbed one in {changed}")
        if not wrong:
            wrong += [f"not cleaned up: {name}" for name in checker.leftovers(run)]
    tell(json.dumps({"kills": hit, "runs": number, "wrong": wrong, "seed": seed}))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        tell = lambda line: print(line, flush=True)  # noqa: E731
        wrong = loop(Path(folder), arguments.kills, arguments.seed, arguments.master, arguments.mutation, tell)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
