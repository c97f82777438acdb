"""What a part found: a Markdown table under the machine, the versions and the command that made it, or JSON."""

import json
import os
import platform
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("tagmill", "numpy", "scipy", "numba", "llvmlite", "pyarrow")
CODE_GENERATION = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")  # settings of numba that change the machine code

Format = Callable[[Any], str]


def number(digits: int, sign: bool = False, percent: bool = False) -> Format:
    """A number with so many digits after the point; a dash where there is none."""
    form = f"{'+' if sign else ''},.{digits}{'%' if percent else 'f'}"
    return lambda value: "–" if value is None else format(value, form)


def times(digits: int = 1) -> Format:
    return lambda value: "–" if value is None else f"{value:,.{digits}f} x"


class Report(NamedTuple):
    """The result of one part."""

    part: str
    title: str
    columns: dict[str, Format]
    rows: list[dict[str, Any]]  # by column; further keys are for JSON alone
    notes: list[str]
    versions: list[str]  # of the peers

    def markdown(self, command: str) -> str:
        lines = [
            f"### {self.part}: {self.title}",
            "",
            f"{machine()}  ",
            f"{', '.join([*own_versions(), *self.versions])}  ",
            f"`{command}`",
            "",
            f"| {' | '.join(self.columns)} |",
            f"|{'---|' * len(self.columns)}",
        ]
        for row in self.rows:
            lines.append(f"| {' | '.join(form(row.get(name)) for name, form in self.columns.items())} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def append(self, path: Path, command: str) -> None:
        """Add the result to the JSON list in `path`."""
        kept = json.loads(path.read_text()) if path.exists() else []
        found = {"part": self.part, "title": self.title, "machine": machine(), "command": command}
        kept.append(
            found | {"versions": [*own_versions(), *self.versions], "rows": self.rows, "notes": self.notes},
        )
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(kept, indent=1, default=lambda value: value.tolist()) + "\n")
        part.replace(path)


def machine() -> str:
    """Model of the processor, cores, and the widest vectors it knows."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    cores = len(os.sched_getaffinity(0))
    return f"{facts.get('model name', platform.machine())}, {cores} core{'s' * (cores > 1)}, {vectors}"


def own_versions() -> list[str]:
    return [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in OURS)]


def command_line(arguments: list[str]) -> str:
    """The command as it was given, with what changes numba's machine code and without the file that is written."""
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument.startswith("--out")):
            kept.append(argument)
        skip = argument == "--out"
    settings = [f"{name}={os.environ[name]}" for name in CODE_GENERATION if name in os.environ]
    return shlex.join([*settings, "python", "-m", "tests.bench", *kept])
