"""Kill `tagmill fit` again and again, at random moments, and see that nothing is lost, doubled or changed.

    python -m tests.chaos [--kills 100] [--seed N] [--cluster] [--mutation NAME]

Workload: the command itself on a small generated corpus.  Nemesis: seeded choice of victim and moment, half of them
while a file is being published.  Checker: `checker`, which knows nothing of the pipeline.  Every kill is a line of
JSON; the seed is printed first and last.  Exit code 4 where anything was wrong, another one where nothing was killed.

--cluster starts a master with two workers on the loopback, and kills executors, workers and the master too; a dead
worker or master is started again.

--mutation takes a guard of the pipeline away (`mutations`): the loop must then end with exit code 4.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import ClassVar

import psutil

from jobs import cluster
from tests.chaos import checker
from tests.chaos.mutations import MUTATIONS
from tests.site import patched

SETS = ("mlflow.enabled=false", "train.labels_per_block=2", "train.gap=1e-4", "evaluate.bootstrap=100")
VICTIMS = ("driver", "jvm", "worker", "group", "term")
SPARK_VICTIMS = {  # of a cluster: what their command lines hold
    "executor": "CoarseGrainedExecutorBackend",
    "host": "deploy.worker.Worker",
    "master": "deploy.master.Master",
}
ENDS = {
    "driver": {-signal.SIGKILL},
    "group": {-signal.SIGKILL},
    "jvm": {69},
    "term": {143, -signal.SIGTERM},
    "master": {0, 69},
}
PATIENCE = 30  # seconds in which whoever survives a kill must be gone
RESTART = 0.2  # seconds after which a dead master or worker is back


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


def marked(name: str, token: str) -> list[psutil.Process]:
    """Processes that carry a token in their environment, so that no other process is ever a victim."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Local:
    """Where the command runs: driver, executor and workers on this host, all below the command."""

    victims = VICTIMS
    environment: ClassVar[dict[str, str]] = {}
    sets: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()  # of the command line: a program that looks on
    umask = -1  # that of this process
    master = "local[2]"

    def processes(self) -> list[psutil.Process]:
        return []

    def restart(self, victim) -> None:
        pass

    def stop(self) -> None:
        pass


class Cluster(Local):
    """A master and two workers; their executors carry the token of the cluster."""

    victims = (*VICTIMS, *SPARK_VICTIMS)
    sets = ("spark.options.spark.executor.memory=700m", "spark.wait=60")

    def __init__(self, folder: Path):
        self.token, self.folder = uuid.uuid4().hex, folder
        os.environ["CHAOS_CLUSTER"] = self.token
        state = cluster.up(folder)
        del os.environ["CHAOS_CLUSTER"]
        self.master, self.environment = state["master"], {"SPARK_CONF_DIR": state["conf"]}
        self.restarted: list[subprocess.Popen] = []

    def processes(self) -> list[psutil.Process]:
        """Executors and what they started; masters and workers are there for good."""
        daemons = tuple(SPARK_VICTIMS[name] for name in ("host", "master"))
        return [p for p in marked("CHAOS_CLUSTER", self.token) if not any(d in " ".join(p.cmdline()) for d in daemons)]

    def restart(self, victim: dict) -> None:
        """Start a dead master or worker again as it was."""
        time.sleep(RESTART)
        log = (self.folder / "restarted.log").open("ab")
        self.restarted.append(
            subprocess.Popen(
                victim["command"],
                env=victim["environment"],
                cwd=victim["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def stop(self) -> None:
        cluster.down(self.folder)
        for process in marked("CHAOS_CLUSTER", self.token):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in self.restarted:
            daemon.wait()


class Fit:
    """One start of the command; its processes carry a token of their own."""

    def __init__(
        self, folder: Path, run: Path, place: Local | Cluster, mutation: str | None = None, source: Path | None = None
    ):
        self.token = uuid.uuid4().hex
        self.run, self.place = run, place
        environment = {**os.environ, **place.environment, "TAGMILL_HOME": str(folder / "home"), "CHAOS_ID": self.token}
        if mutation:
            environment |= patched(**{"pipeline.store": f"tests.chaos.mutations:{mutation}"})
        command = [
            *place.prefix,
            str(Path(sys.executable).parent / "tagmill"),
            "fit",
            "--input",
            str(source or folder / "documents.jsonl"),
        ]
        sets = (x for s in (*SETS, *place.sets) for x in ("--set", s))
        self.log = (folder / f"{self.token}.log").open("w+")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "--run", str(run), "--master", place.master, *sets],
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            env=environment,
            start_new_session=True,
            umask=place.umask,
        )

    def family(self) -> list[psutil.Process]:
        """All processes that the command started, itself included."""
        return marked("CHAOS_ID", self.token) + self.place.processes()

    def victim(self, kind: str, draw: random.Random) -> psutil.Process | None:
        if kind in SPARK_VICTIMS:
            others = marked("CHAOS_CLUSTER", self.place.token)  # type: ignore[union-attr]
            others = [p for p in others if SPARK_VICTIMS[kind] in " ".join(p.cmdline())]
        else:
            others = [p for p in self.family() if p.pid != self.process.pid]
        if kind == "jvm":
            others = [p for p in others if "java" in p.name() and "CoarseGrained" not in " ".join(p.cmdline())]
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
                was = {"command": victim.cmdline(), "environment": victim.environ(), "cwd": victim.cwd()}
                victim.kill()
                if kind in ("host", "master"):
                    self.place.restart(was)
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
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
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


def undisturbed(folder: Path, place: Local | Cluster, truth: dict) -> tuple[float, dict, list[str]]:
    """Seconds of a run with compiled kernels, the bytes that every other run must have, and what was wrong."""
    wrong: list[str] = []
    for name in ("first", "golden"):  # the first one compiles
        fit = Fit(folder, folder / name, place, None)
        if fit.process.wait(900) != 0:
            return 0.0, {}, [f"the undisturbed run failed: {fit.said()[-2000:]}"]
        span = time.monotonic() - fit.began
        wrong += checker.violations(folder / name, truth) + fit.gone()
    if checker.prints(folder / "first") != checker.prints(folder / "golden"):
        wrong.append("two undisturbed runs differ")
    return span, checker.prints(folder / "golden"), wrong


def loop(folder: Path, kills: int, seed: int, place: Local | Cluster, mutation: str | None = None, tell=print) -> dict:
    """Kill until `kills` processes were hit or something is wrong; what was hit, and all that was wrong."""
    draw = random.Random(seed)
    truth = corpus(folder)
    span, expected, wrong = undisturbed(folder, place, truth)
    hits: Counter[str] = Counter()
    number, dearest = 0, 0.0
    while hits.total() < kills and not wrong:
        number += 1
        run = folder / f"run-{number}"
        starts, spent = 0, 0.0
        while not wrong:  # the same command until it is through
            fit = Fit(folder, run, place, mutation)
            starts += 1
            kind = draw.choice(place.victims) if hits.total() < kills else None
            struck = 0
            if kind:
                wait_for_moment(fit, draw, span if starts == 1 else span / 2)  # a resumed run is shorter
                while fit.process.poll() is None and not struck:  # there may be no such process just now
                    struck = fit.strike(kind, draw)
            hits.update([kind] if struck and kind else [])
            code: int | None = None
            try:
                code = fit.process.wait(4 * span + 60)
            except subprocess.TimeoutExpired:
                wrong.append(f"hangs after {kind}")
            after = time.monotonic() - fit.began
            spent += after
            wrong += [f"left behind: {name}" for name in fit.gone()]
            wrong += checker.violations(run, truth)
            lines = fit.said()
            allowed = {0} | (ENDS.get(kind, set()) if struck and kind else set())
            if code not in allowed or "Traceback" in lines:
                wrong.append(f"exit code {code} after {kind if struck else 'nothing'}: {lines[-1500:]}")
            event = {"run": number, "kill": hits.total(), "victim": kind, "struck": struck, "code": code}
            tell(json.dumps({**event, "s": round(after, 2)}))
            if code == 0:
                break
        if starts > 1:
            dearest = max(dearest, (spent - span) / (starts - 1))
        if not wrong and checker.prints(run) != expected:
            changed = [name for name, prints in checker.prints(run).items() if prints != expected[name]]
            wrong.append(f"run {number} differs from the undisturbed one in {changed}")
        if not wrong:
            wrong += [f"not cleaned up: {name}" for name in checker.leftovers(run)]
    found = {
        "kills": hits.total(),
        "of": dict(hits),
        "runs": number,
        "undisturbed_s": round(span, 1),
        "dearest_kill_s": round(dearest, 1),
        "wrong": wrong,
        "seed": seed,
    }
    tell(json.dumps(found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--cluster", action="store_true", help="on a standalone cluster, with its processes as victims")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = Cluster(Path(folder) / "cluster") if arguments.cluster else Local()
        tell = lambda line: print(line, flush=True)  # noqa: E731
        try:
            found = loop(Path(folder), arguments.kills, arguments.seed, place, arguments.mutation, tell)
        finally:
            place.stop()
    if found["wrong"]:
        return 4 if found["kills"] else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
