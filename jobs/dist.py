"""What executors need, in one archive: `make dist`.

    python -m jobs.dist [--output dist] [--python /usr/bin/python3.11]

Writes the wheel and tagmill-VERSION-cp311-PLATFORM.tar.gz, an environment that Spark unpacks on each executor
(`spark.archives`, see conf/cluster.yaml): Tagmill and the packages that its tasks import, as they are installed here.
The executors' hosts need Spark and the same minor version of Python, at the path that --python names.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import io
import logging
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

from jobs.entry import guarded, logging_to_stderr
from pipeline.errors import ConfigError
from pipeline.host import shown_bytes
from pipeline.storage import replacing

log = logging.getLogger("tagmill")

ROOT = Path(__file__).parents[1]
# what tasks import; the driver's packages (MLflow, Spark's jars, a Java runtime, ...) stay behind
WANTED: tuple[str, ...] = ("numpy", "scipy", "numba", "pandas", "pyarrow", "psutil", "platformdirs", "pydantic")
WANTED += ("pyyaml", "fsspec", "universal-pathlib")
WANTED += tuple(name for name in ("s3fs", "gcsfs", "adlfs") if importlib.util.find_spec(name))  # of object stores
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{VERSION}/site-packages"


def needed(wanted: tuple[str, ...] = WANTED) -> list[importlib.metadata.Distribution]:
    """The installed distributions `wanted` and all that they require here, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(wanted)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return [found[name] for name in sorted(found)]


def installed_files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """(path below site-packages, file) of a distribution, without scripts, bytecode and tests."""
    for file in distribution.files or ():
        parts = PurePosixPath(file).parts
        if ".." in parts or "__pycache__" in parts or "tests" in parts[:-1]:
            continue
        path = Path(str(distribution.locate_file(file)))
        if path.is_file():
            yield str(PurePosixPath(file)), path


def pack(archive: Path, wheel: Path, python: str) -> int:
    """Write the environment archive; its bytes depend on its content alone.  Returns the number of its files.

    python: path of the interpreter on the executors' hosts.
    """
    files = {f"{SITE}/{name}": path.read_bytes() for d in needed() for name, path in installed_files(d)}
    with zipfile.ZipFile(wheel) as content:
        files |= {f"{SITE}/{n}": content.read(n) for n in content.namelist() if not n.endswith("/")}
    home = PurePosixPath(python).parent
    files["pyvenv.cfg"] = f"home = {home}\ninclude-system-site-packages = false\nversion = {VERSION}\n".encode()
    links = {"bin/python": python, "bin/python3": "python", f"bin/python{VERSION}": "python"}
    # no time stamps: the same content is the same archive, which caches of Spark and of people recognise
    with (
        replacing(archive) as part,
        part.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=4, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, target in sorted(links.items()):
            item = tarfile.TarInfo(name)
            item.type, item.linkname, item.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(item)
        for name, data in sorted(files.items()):
            item = tarfile.TarInfo(name)
            item.size, item.mode = len(data), 0o755 if name.endswith(".so") else 0o644
            tar.addfile(item, io.BytesIO(data))
    return len(files)


def build(output: Path, python: str) -> tuple[Path, Path]:
    """The wheel and the environment archive in `output`."""
    if not PurePosixPath(python).is_absolute() or VERSION not in PurePosixPath(python).name:
        raise ConfigError(f"--python is {python}; expected an absolute path of python{VERSION}, as on the executors")
    if not (ROOT / "pyproject.toml").is_file():
        raise ConfigError(f"{ROOT}: no source tree of Tagmill; run `make dist` in a clone")
    output.mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version("tagmill")
    wheel = output / f"tagmill-{version}-py3-none-any.whl"
    wheel.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not wheel.is_file():
        raise ConfigError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    platform = sysconfig.get_platform().replace("-", "_")
    archive = output / f"tagmill-{version}-cp{VERSION.replace('.', '')}-{platform}.tar.gz"
    count = pack(archive, wheel, python)
    log.info("dist: %s, %s", wheel, shown_bytes(wheel.stat().st_size))
    log.info("dist: %s, %s, %d files, for %s", archive, shown_bytes(archive.stat().st_size), count, python)
    return wheel, archive


def base_python() -> str:
    """The interpreter behind this environment."""
    return str(Path(sys.executable).resolve())


def main(argv: list[str] | None = None) -> int:
    """The command line of `make dist`."""
    parser = argparse.ArgumentParser(prog="python -m jobs.dist", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="dist", metavar="DIR")
    parser.add_argument("--python", default="", metavar="PATH", help=f"python{VERSION} on the executors' hosts")
    parser.add_argument("--debug", action="store_true", help="traceback on failure")
    args = parser.parse_args(argv)
    logging_to_stderr(args.debug)
    return guarded(lambda: build(Path(args.output), args.python or base_python()), args.debug)


if __name__ == "__main__":
    raise SystemExit(main())
