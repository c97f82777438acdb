"""The run folder: tables, manifests, fingerprints, one writer.

    RUN/run.json                               configuration and input of the run
    RUN/.lock                                  held by the one process that writes; in an object store `lease`
    RUN/<stage>/<attempt>/<table>-00000.parquet
    RUN/<stage>/MANIFEST.json                  which files count: written last, atomically
    RUN/failure.json                           why the last command stopped, if it did
    RUN/quarantine.json                        documents that ended a worker (`stages.poison`); ingest rejects them
    RUN/scores/<key>/scores-00000.npy          scores of the test fold; may be deleted (`stages.scores`)
    RUN/versions/0001/                         earlier thresholds with their metrics (`versions`)
    RUN/metrics.json, RUN/report.html          copies for people, published with the manifest of `evaluate`

A stage writes into a folder that is new for the attempt; nothing reads that folder until the manifest names its files
with their sizes and SHA-256.  A killed attempt therefore changes nothing that anyone sees.  Readers follow the manifest
and never list a folder.  A run folder is one of a file system, or a URI of an object store (`storage`).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import lease, storage
from pipeline.errors import ConfigError, DataError, InputError, LockedError, shown
from pipeline.flow import FIT, stage_of
from pipeline.storage import Mapped, ObjectPath, Place, digest, explained, named, replacing, sync_folder
from pipeline.tables import TABLES, conform

FORMAT = 1  # of the run folder; a larger number is refused
MANIFEST = "MANIFEST.json"
FAILURE = "failure.json"  # stage, code, message, when: why the last command stopped; gone with the next one
PROBE = ".probe-"  # folder by which driver and executors find out whether they see the same storage


def write_bytes(path: Place, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Place, value: object) -> None:
    write_bytes(path, as_json(value))


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_part(folder: Place, name: str, table: pa.Table | Iterable[pa.Table], number: int) -> dict:
    """Write one Parquet part of the table `name`, atomically; the entry of its manifest comes back.

    The bytes depend on the rows and on the tables that they come in (a row group each), not on a table's chunks, so
    that it does not matter which of two attempts at a task wins.
    """
    path = folder / f"{name}-{number:05d}.parquet"
    rows = 0
    with replacing(path) as part:
        with pq.ParquetWriter(part, TABLES[name].schema, compression="zstd") as writer:
            for piece in [table] if isinstance(table, pa.Table) else table:
                writer.write_table(conform(piece, name))
                rows += piece.num_rows
        return {**entry(part, part.parent, rows), "file": path.name}


def entry(path: Any, folder: Any, rows: int) -> dict:
    return {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": digest(path), "rows": rows}


def fingerprint(recipe: dict) -> str:
    """Identity of a stage's output: settings, fingerprints of its inputs, version of the code."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """A run folder, by its path or URI.  Reading needs no lock; writing happens inside `with run.writing():`."""

    def __init__(self, root: str | Place):
        self.root = storage.place(root)
        self.lease: lease.Lease | None = None  # while this process writes to an object store

    def __repr__(self) -> str:
        return f"Run({str(self.root)!r})"

    # -- who made it ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict:
        """run.json: format, config, input.  Raises InputError where the folder is not a run."""
        path = self.root / "run.json"
        if not path.is_file():
            raise InputError(f"{self.root}: not a run folder (it has no run.json); make one with `tagmill fit`")
        info = _read_json(path)
        _expect(path, info, format=int)
        if info["format"] > FORMAT:
            raise ConfigError(
                f"{path}: format {info['format']} is newer than this version reads ({FORMAT}); upgrade tagmill"
            )
        _expect(path, info, config=dict, input=str)
        return info

    @property
    def exists(self) -> bool:
        return (self.root / "run.json").is_file()

    def create(self, info: dict) -> None:
        """Write run.json, which makes the folder a run."""
        self.fenced()
        drop_unfinished(self.root)
        write_json(self.root / "run.json", {"format": FORMAT, **info})

    def prepare(self) -> None:
        """Make the folder.  Refuses one that holds something else."""
        with explained(self.root, "create the run folder"):
            if self.root.exists() and not self.root.is_dir():
                raise ConfigError(f"{self.root}: is a file; expected a new or empty folder: choose another --run")
            self.root.mkdir(parents=True, exist_ok=True, mode=0o750)
            # a run that was killed before its run.json stood leaves the lock, a temporary file, a probe: all are ours
            ours = re.compile(rf"\.lock|\.lease|\.run\.json\.[0-9a-f]{{8}}\.tmp|{re.escape(PROBE)}[0-9a-f]{{8}}")
            foreign = [p.name for p in self.root.iterdir() if not ours.fullmatch(p.name)] if not self.exists else []
        if foreign:
            raise ConfigError(
                f"{self.root}: holds {len(foreign)} entries such as {shown(sorted(foreign)[0])} "
                "and is not a run folder; expected a new or empty folder: choose another --run"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock; the kernel frees it when the holder dies.  Raises LockedError naming the holder.

        In an object store it is a lease, which ends some time after its holder.
        """
        if isinstance(self.root, ObjectPath):
            with contextlib.ExitStack() as stack:
                with explained(self.root, "lock"):
                    self.lease = stack.enter_context(lease.held(self.root))
                try:
                    yield
                finally:
                    self.lease = None
            return
        path = self.root / ".lock"
        with explained(path, "lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            for tries_left in reversed(range(5)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if tries_left:  # `holder` may have it, for a moment
                        time.sleep(0.05)
                        continue
                    raise LockedError(
                        f"{self.root}: locked by {shown(_holder(descriptor), 200)}; wait for it or stop it"
                    ) from None
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            with explained(path, "write to"):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
            yield
        finally:
            with explained(path, "close"):
                os.close(descriptor)

    def holder(self) -> str | None:
        """Who holds the folder's lock, as text, or None where nobody does."""
        if isinstance(self.root, ObjectPath):
            return lease.holder(self.root)
        path = self.root / ".lock"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError:
            with explained(path, "read"):
                raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(descriptor)
        finally:
            os.close(descriptor)
        return None

    def fenced(self) -> None:
        """Raises LockedError where another process has taken over the lease of an object store since."""
        if isinstance(self.root, ObjectPath):
            if self.lease is None:
                raise AssertionError(f"{self.root}: written without its lease")
            self.lease.check()

    # -- manifests -----------------------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> dict | None:
        """The manifest of a finished stage, or None."""
        path = self.root / stage / MANIFEST
        if not path.is_file():
            return None
        manifest = _read_json(path)
        _expect(path, manifest, stage=str, attempt=str, fingerprint=str, recipe=dict, tables=dict)
        return manifest

    def finished(self, stage: str) -> dict:
        manifest = self.manifest(stage)
        if manifest is None:
            raise InputError(f"{self.root}: stage {stage} is not finished; run the `tagmill fit` of this folder again")
        return manifest

    def damage(self, stage: str) -> str | None:
        """What is wrong with the files of a finished stage: the first that is missing or has changed."""
        manifest = self.finished(stage)
        for path, item in (found for table in manifest["tables"] for found in self._items(manifest, table)):
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != item["bytes"] or digest(path) != item["sha256"]:
                return f"{path} has changed since it was written"
        return None

    def attempt(self, stage: str, name: str | None = None) -> Any:
        """A folder for an attempt at a stage; a new one where no name is given."""
        folder = self.root / stage / (name or f"attempt-{uuid.uuid4().hex[:12]}")
        with explained(folder, "create"):
            for made in (folder.parent, folder):
                made.mkdir(parents=True, exist_ok=True, mode=0o750)
        return folder

    def commit(self, stage: str, attempt: Place, recipe: dict, tables: dict[str, list[dict]], facts: dict) -> dict:
        """Publish an attempt: write the manifest, then drop what earlier attempts left behind.

        Call it after the last byte of data and never before.
        """
        manifest = {
            "stage": stage,
            "fingerprint": fingerprint(recipe),
            "recipe": recipe,
            "attempt": attempt.name,
            "tables": tables,
            "schemas": {name: {f.name: str(f.type) for f in TABLES[name].schema} for name in tables if name in TABLES},
            "rows": {name: sum(item["rows"] for item in items) for name, items in tables.items()},
            **facts,
        }
        with explained(self.root / stage, "publish"):
            drop_unfinished(attempt)  # of a worker that was killed, and whose task was repeated
            sync_folder(attempt)
            sync_folder(self.root)  # which holds the folder of the stage
            drop_unfinished(self.root / stage)
            if self.lease is None:
                write_json(self.root / stage / MANIFEST, manifest)
                left = _attempts(self.root / stage, attempt)
            else:
                manifest["lease"] = self.lease.number
                left = self._put_manifest(stage, attempt, as_json(manifest))
                self.lease.check()  # who slept after the put removes nothing
            for other in left:
                storage.remove(other)
        return manifest

    def _put_manifest(self, stage, attempt, content):
        """Put a manifest where the one still stands that was there before the lease was looked at.

        The attempts that it leaves behind come back.  They are listed before that look: none is of a later holder.
        """
        assert self.lease is not None
        path = self.root / stage / MANIFEST
        for _ in range(3):  # a holder of before may have got in between, once
            seen = storage.version_of(path)
            left = _attempts(self.root / stage, attempt)
            self.lease.check()
            if storage.publish(path, content, seen, self.lease.can):
                return left
        raise LockedError(f"{path}: another process writes it too; stop it and run the same command again")

    def drop(self, stages: Iterable[str]) -> None:
        """Unpublish stages, last first, so that no manifest outlives one that it builds on."""
        stages = list(stages)
        if stages:
            self.fenced()
        if "evaluate" in stages:
            for copy in ("metrics.json", "report.html"):
                (self.root / copy).unlink(missing_ok=True)
        for stage in reversed(stages):
            (self.root / stage / MANIFEST).unlink(missing_ok=True)

    # -- tables --------------------------------------------------------------------------------------------------------

    def files(self, table: str, verify: bool = False) -> list[Any]:
        """The files of a table, in order.  With `verify`, their SHA-256 is checked first: DataError names the file."""
        paths = []
        for path, item in self._items(self.finished(stage_of(table)), table):
            if verify and (not path.is_file() or digest(path) != item["sha256"]):
                raise DataError(f"{path}: missing or changed since it was written; run the same `tagmill fit` again")
            paths.append(path)
        return paths

    def mapped(self, table: str, cache_dir: str = "", verify: bool = False) -> Mapped:
        """The files of a table to be memory-mapped, here or in a task; with `verify` as in `files`."""
        items = self.finished(stage_of(table))["tables"][table]
        # a copy is checked when it is made
        files = self.files(table, verify and not isinstance(self.root, ObjectPath))
        return Mapped(f"{self.root} {table}", tuple(map(str, files)), tuple(i["sha256"] for i in items), cache_dir)

    def read(self, table: str, columns: list[str] | None = None, verify: bool = False) -> pa.Table:
        """A table as its manifest has it, parts in order."""
        schema = TABLES[table].schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        parts = [_read_parquet(path, columns).cast(schema) for path in self.files(table, verify)]
        return pa.concat_tables([schema.empty_table(), *parts])

    def _items(self, manifest: dict, table: str) -> Iterator[tuple[Any, dict]]:
        """The files that a manifest names for a table, with their entries; none is outside of the run folder."""
        place = f"{self.root}: the manifest of {shown(manifest['stage'])}"
        for name in (manifest["stage"], manifest["attempt"]):
            if name in ("", ".", "..") or "/" in name or "\0" in name:  # each is one folder
                raise DataError(f"{place} names {shown(name, 300)}, outside of the run")
        folder = self.root / manifest["stage"] / manifest["attempt"]
        _expect(place, manifest["tables"], **{table: list})
        for item in manifest["tables"][table]:
            _expect(place, item, file=str, bytes=int, sha256=str, rows=int)
            yield self._inside(folder, item["file"], place), item

    def _inside(self, folder, name, place):
        """The file `name` of a folder of the run.  Raises DataError where it is outside of the run."""
        if isinstance(folder, ObjectPath):
            parts = PurePosixPath(name)
            outside = parts.is_absolute() or ".." in parts.parts or "\0" in name or "://" in name
            path = name if outside else folder / name
        else:
            path = Path(os.path.realpath(str(folder / name).replace("\0", "\\0")))
            outside = not path.is_relative_to(self.root.resolve())
        if outside:
            raise DataError(f"{place} names {shown(path, 300)}, outside of the run")
        return path


def _attempts(folder, but):
    """The attempts in the folder of a stage, but for one."""
    return [path for path in folder.iterdir() if path.is_dir() and path.name != but.name]


def drop_unfinished(folder: Place) -> None:
    """Remove what a killed writer of `folder` left under temporary names; the caller holds the lock."""
    if not isinstance(folder, ObjectPath):  # what is not put is not there
        for part in folder.glob(".*.tmp"):
            part.unlink(missing_ok=True)


def _holder(descriptor):
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "an unknown process"


def stages_done(run: Run) -> list[str]:
    """Names of the finished stages of the fit flow, in its order."""
    return [stage.name for stage in FIT if run.manifest(stage.name) is not None]


def _expect(place, value, **kinds):
    """Refuse a file of ours that someone changed: every key of `kinds` is there, and of its kind."""
    wrong = [k for k, kind in kinds.items() if not isinstance(value, dict) or not isinstance(value.get(k), kind)]
    if wrong:
        expected = ", ".join(f"{shown(key)} ({kinds[key].__name__})" for key in wrong)
        raise DataError(f"{place}: expected {expected}; it was changed by hand or damaged: remove the folder")


def _read_parquet(path, columns):
    try:
        if isinstance(path, ObjectPath):
            return storage.read_table(path, columns)
        with named(path):
            return pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the disk's fault, not the file's
        raise DataError(f"{path}: missing or not readable as Parquet ({shown(error, 200)})") from error


def _read_json(path: Place) -> dict:
    with explained(path, "read"):
        content = path.read_bytes()
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); the file was changed by hand or damaged: remove the folder"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}; expected an object")
    return value
