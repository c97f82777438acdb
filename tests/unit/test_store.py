import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store
from pipeline.errors import (
    ConfigError,
    DataError,
    InputError,
    LockedError,
    PermissionError_,
    StorageError,
    TagmillError,
)
from pipeline.flow import FIT
from pipeline.storage import explained, replacing
from pipeline.store import MANIFEST, Run, fingerprint, write_bytes, write_part
from pipeline.tables import TABLES

ROOT = Path(store.__file__).parents[1]


def labels(n, first=0):
    return pa.table(
        {
            "label_id": pa.array(range(first, first + n), pa.int32()),
            "label": [f"label {k}" for k in range(first, first + n)],
            "support": pa.array(range(n), pa.int64()),
        }
    )


def folds(n):
    return pa.table({"row": pa.array(range(n), pa.int64()), "fold": pa.array([k % 3 for k in range(n)], pa.int32())})


def publish(run, value, stage="split", rows=5, attempt=None):
    """Commit a stage whose content and fingerprint follow `value`."""
    attempt = attempt or run.attempt(stage)
    parts = [write_part(attempt, "folds", folds(rows + value), k) for k in range(2)]
    support = pa.table({name: pa.array([value], f.type) for name, f in fields("label_support")})
    tables = {"folds": parts, "label_support": [write_part(attempt, "label_support", support, 0)]}
    return run.commit(stage, attempt, {"value": value}, tables, {"summary": f"value {value}"})


def test_what_a_killed_worker_left_in_an_attempt_is_gone_when_it_is_published(run):
    """Its task was repeated in the same folder."""
    with run.writing():
        attempt = run.attempt("split")
        (attempt / ".folds-00000.parquet.0123abcd.tmp").write_bytes(b"half")
        publish(run, 1, attempt=attempt)
    assert temporary(run.root) == []
    assert whole(run) == 1


def fields(name):
    return [(f.name, f) for f in TABLES[name].schema]


def whole(run, stage="split"):
    """The value that a reader sees, after every file has been checked."""
    assert run.damage(stage) is None
    for table in ("folds", "label_support"):
        run.files(table, verify=True)
    value = run.finished(stage)["recipe"]["value"]
    assert run.read("label_support")["train"].to_pylist() == [value]
    assert run.read("folds").num_rows == 2 * (5 + value)
    return value


def temporary(folder):
    return [p.name for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare()
    run.create({"config": {}, "input": "somewhere"})
    return run


def in_child(function):
    """Run `function` in a child process; its exit status comes back, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- parts -------------------------------------------------------------------------------------------------------------


def cut(table, size):
    return pa.concat_tables([table.slice(k, size) for k in range(0, table.num_rows, size)])


def test_a_part_has_the_same_bytes_however_its_rows_are_chunked(tmp_path):
    rng = np.random.default_rng(0)
    n = 30_000
    texts = [" ".join(map(str, row)) for row in rng.integers(0, 50, (n, 6)).tolist()]
    documents = pa.table(
        {
            "row": pa.array(range(n), pa.int64()),
            "doc_id": [f"d{k}" for k in range(n)],
            "text": texts,
            "labels": pa.array([text.split()[:2] for text in texts]),
            "split": pa.array([None if k % 3 else "train" for k in range(n)], pa.string()),
        }
    )
    marks = set()
    for k, table in enumerate(
        (
            documents,
            cut(documents, 77),
            cut(documents, 1024),
            pa.concat_tables([documents, documents]).slice(n),
            documents.select(documents.schema.names[::-1]),
            documents.append_column("extra", documents["row"]),
            [documents],
            iter([cut(documents, 999)]),
        )
    ):
        folder = tmp_path / str(k)
        folder.mkdir()
        item = write_part(folder, "documents", table, 3)
        assert item["file"] == "documents-00003.parquet"
        assert item["rows"] == n
        marks.add((item["bytes"], item["sha256"]))
    assert len(marks) == 1


def test_an_entry_describes_the_file(tmp_path):
    item = write_part(tmp_path, "labels", (labels(3), labels(2, 3)), 0)
    path = tmp_path / item["file"]
    assert item["bytes"] == path.stat().st_size
    assert item["sha256"] == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
    found = pq.read_table(path)
    assert found.schema.equals(TABLES["labels"].schema)
    assert found["label_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert item["rows"] == 5


def test_a_part_without_rows_is_a_table(tmp_path):
    item = write_part(tmp_path, "labels", iter(()), 0)
    assert item["rows"] == 0
    assert pq.read_schema(tmp_path / item["file"]).equals(TABLES["labels"].schema)


def test_a_part_that_breaks_the_contract_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_part(tmp_path, "labels", iter([labels(3), labels(3).drop_columns(["support"])]), 0)
    assert list(tmp_path.iterdir()) == []


# -- replacing a file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_content_and_no_temporary_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        assert part.parent == tmp_path  # a rename over another file system is not atomic
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_system_call_that_fails_is_fatal_and_leaves_the_old_content(run, monkeypatch, name, number):
    publish(run, 1)

    def refuse(*args):
        raise OSError(number, os.strerror(number), args[0])

    attempt = run.attempt("split")
    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(TagmillError) as caught:
        run.commit("split", attempt, {"value": 2}, {}, {})
    assert caught.value.code == {errno.EIO: 74, errno.ENOSPC: 74, errno.EACCES: 77}[number]
    monkeypatch.undo()
    assert whole(run) == 1
    assert temporary(run.root) == []


def test_content_is_on_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []

    def seen(name, call):
        def spy(*args):
            place = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            size = os.stat(args[0]).st_size
            calls.append((name, Path(place).name.split(".")[-1], size if name == "fsync" else None))
            return call(*args)

        return spy

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, seen(name, getattr(os, name)))
    write_bytes(tmp_path / "new.json", b"content")
    assert calls[0] == ("fsync", "tmp", 7)
    assert calls[1] == ("replace", "json", None)
    assert calls[2][:2] == ("fsync", tmp_path.name)
    assert len(calls) == 3


# what a process asks of the system while it publishes; a crash is tried before and after each
CALLS = {
    *("open", "write", "close", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "scandir"),
    *("stat", "lstat", "listdir", "truncate", "ftruncate", "pwrite"),
}


def killed_at(point, action):
    """Run `action` in a child that is killed at the given point; False where it ended before."""

    def child():
        left = point

        def watch(frame, event, argument):
            nonlocal left
            if event in ("c_call", "c_return") and argument.__name__ in CALLS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.setprofile(watch)
        action()
        sys.setprofile(None)

    status = in_child(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_kill_at_any_point_of_a_publication_leaves_old_or_new_and_the_next_one_completes(tmp_path):
    golden = Run(tmp_path / "golden")
    publish(golden, 1)
    attempt = golden.attempt("split", "attempt-new")
    item = [write_part(attempt, "folds", folds(7), k) for k in range(2)]
    support = pa.table({name: pa.array([2], f.type) for name, f in fields("label_support")})
    tables = {"folds": item, "label_support": [write_part(attempt, "label_support", support, 0)]}
    seen, point = [], 0
    while True:
        run = Run(tmp_path / "run")
        shutil.copytree(golden.root, run.root)
        new = run.root / "split" / "attempt-new"
        killed = killed_at(point, lambda run=run, new=new: run.commit("split", new, {"value": 2}, tables, {}))
        seen.append(whole(run))
        run.commit("split", new, {"value": 2}, tables, {})
        assert whole(run) == 2
        assert [p.name for p in (run.root / "split").iterdir() if p.is_dir()] == ["attempt-new"]
        shutil.rmtree(run.root)
        if not killed:
            break
        point += 1
    assert point > 30
    assert seen == sorted(seen)  # once new, always new
    assert set(seen) == {1, 2}


def test_a_kill_at_any_point_of_the_start_leaves_a_folder_that_the_next_start_accepts(tmp_path):
    def start(run):
        run.prepare()
        with run.writing():
            run.create({"config": {}, "input": "x"})

    point = 0
    while True:
        run = Run(tmp_path / str(point) / "run")
        killed = killed_at(point, lambda run=run: start(run))
        start(run)
        assert run.info["input"] == "x"
        if not killed:
            break
        point += 1
    assert point > 10


def test_a_half_written_temporary_file_is_never_read(run, monkeypatch):
    publish(run, 1)

    def half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "write_bytes", half)
    assert in_child(lambda: publish(run, 2)) == -signal.SIGKILL
    monkeypatch.undo()
    assert temporary(run.root / "split")
    assert whole(run) == 1
    publish(run, 3)
    assert whole(run) == 3


# -- publishing --------------------------------------------------------------------------------------------------------


def test_commit_drops_earlier_attempts_and_never_the_current_one(run, monkeypatch):
    publish(run, 1)
    leftover = run.attempt("split")
    (leftover / "folds-00000.parquet").write_bytes(b"half")
    publish(run, 2)
    assert whole(run) == 2
    assert [p.name for p in (run.root / "split").iterdir() if p.is_dir()] == [run.finished("split")["attempt"]]
    # the same attempt again, by another spelling of its path
    manifest = run.finished("split")
    monkeypatch.chdir(run.root)
    run.commit("split", Path("split") / manifest["attempt"], {"value": 2}, manifest["tables"], {})
    assert whole(run) == 2


def test_a_manifest_holds_what_identifies_the_stage(run):
    manifest = publish(run, 4)
    assert manifest == run.manifest("split")
    assert manifest["fingerprint"] == fingerprint({"value": 4})
    assert manifest["rows"] == {"folds": 18, "label_support": 1}
    assert manifest["schemas"]["folds"] == {"row": "int64", "fold": "int32"}
    assert manifest["summary"] == "value 4"


def test_a_fingerprint_depends_on_content_and_not_on_order():
    recipe = {"settings": {"a": 1, "b": [1, 2]}, "inputs": {"x": "y"}}
    assert fingerprint(recipe) == fingerprint({"inputs": {"x": "y"}, "settings": {"b": [1, 2], "a": 1}})
    others = [{"settings": {"a": 2, "b": [1, 2]}, "inputs": {"x": "y"}}, {"settings": {"a": 1, "b": [2, 1]}}, {}]
    assert len({fingerprint(r) for r in [recipe, *others]}) == 4


def test_drop_unpublishes_the_last_stage_first(run, monkeypatch):
    names = [stage.name for stage in FIT[:4]]
    for name in names:
        publish(run, 1, stage=name)
    unlink, states = Path.unlink, []

    def watched(path, **kwargs):
        unlink(path, **kwargs)
        states.append([name for name in names if run.manifest(name)])

    monkeypatch.setattr(Path, "unlink", watched)
    run.drop(iter(["split", "featurize", "train"]))
    assert states == [names[:3], names[:2], names[:1]]  # no manifest outlives one that it builds on
    assert store.stages_done(run) == ["ingest"]
    run.drop(["train"])  # once more is no error


# -- reading -----------------------------------------------------------------------------------------------------------


def test_readers_ignore_what_the_manifest_does_not_name(run):
    publish(run, 1)
    stage = run.root / "split"
    current = stage / run.finished("split")["attempt"]
    shutil.copy(current / "folds-00000.parquet", current / "folds-00002.parquet")
    (current / ".folds-00000.parquet.12345678.tmp").write_bytes(b"x")
    (current / "_SUCCESS").touch()
    (stage / "folds-00000.parquet").write_bytes(b"x")
    (stage / f".{MANIFEST}.12345678.tmp").write_text("{")
    (stage / "attempt-dead").mkdir()
    (stage / "attempt-dead" / "folds-00000.parquet").write_bytes(b"x")
    assert whole(run) == 1
    assert [p.name for p in run.files("folds")] == ["folds-00000.parquet", "folds-00001.parquet"]


def test_columns_can_be_chosen(run):
    publish(run, 1)
    assert run.read("folds", ["fold"]).schema.names == ["fold"]
    assert run.read("folds", ["fold", "row"]).schema.names == ["fold", "row"]


def test_an_unfinished_stage_is_missing_input(run):
    assert run.manifest("split") is None
    with pytest.raises(InputError, match="stage split is not finished; run the `tagmill fit`"):
        run.files("folds")
    run.attempt("split")
    assert run.manifest("split") is None


def refused(run, table="folds"):
    with pytest.raises(DataError) as caught:
        run.files(table, verify=True)
    assert caught.value.code == 65
    with pytest.raises(DataError):
        run.read(table, verify=True)
    return str(caught.value)


def test_every_flipped_byte_is_found(run):
    publish(run, 1)
    path = run.files("folds")[1]
    content = path.read_bytes()
    for k in range(len(content)):
        path.write_bytes(content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :])
        assert run.damage("split") == f"{path} has changed since it was written"
        if k % 50 == 0:
            assert str(path) in refused(run)
            with contextlib.suppress(DataError):  # unchecked: another value or a DataError, never a traceback
                run.read("folds")
    path.write_bytes(content)
    assert whole(run) == 1


def test_truncation_at_every_length_is_found(run):
    publish(run, 1)
    path = run.files("folds")[1]
    content = path.read_bytes()
    for k in range(len(content)):
        os.truncate(path, k) if k == 0 else path.write_bytes(content[:k])
        assert run.damage("split") == f"{path} has changed since it was written"
        if k % 50 == 0:
            assert str(path) in refused(run)
            with pytest.raises(DataError, match=f"{path.name}: missing or not readable as Parquet"):
                run.read("folds")
    path.write_bytes(content + b"x")
    assert run.damage("split") is not None


def test_a_missing_file_and_swapped_files_are_found(run):
    publish(run, 1)
    path = run.files("label_support")[0]
    content = path.read_bytes()
    path.unlink()
    assert run.damage("split") == f"{path} is missing"
    assert str(path) in refused(run, "label_support")
    with pytest.raises(DataError, match=path.name):
        run.read("label_support")
    path.mkdir()
    assert run.damage("split") == f"{path} is missing"
    path.rmdir()
    path.write_bytes(run.files("folds")[0].read_bytes())
    assert run.damage("split") == f"{path} has changed since it was written"
    path.write_bytes(content)
    assert whole(run) == 1


# -- manifests that someone changed ------------------------------------------------------------------------------------


def rewritten(run, change, stage="split"):
    path = run.root / stage / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["file", "attempt", "stage"])
@pytest.mark.parametrize("payload", ["../../../../../../../../etc/passwd", "/etc/passwd", "link", "\0/../../../../x"])
def test_a_manifest_names_no_file_outside_of_the_run(run, tmp_path, key, payload):
    publish(run, 1)
    outside = tmp_path / "passwd"
    shutil.copy(run.files("folds")[0], outside)
    folder = run.root / "split" / run.finished("split")["attempt"]
    for place in (folder, folder.parent, run.root):
        (place / "link").symlink_to(tmp_path if key != "file" else outside)

    def change(manifest):
        if key == "file":
            manifest["tables"]["folds"][0]["file"] = payload
        elif payload == "link" and key == "stage":
            manifest.update(stage="link", attempt="deep")
            manifest["tables"]["folds"][0]["file"] = "passwd"
        else:
            manifest[key] = payload
            manifest["tables"]["folds"][0]["file"] = "passwd"

    rewritten(run, change)
    for look in (run.files, run.read, lambda table: run.damage("split")):
        with pytest.raises(DataError, match="outside of the run"):
            look("folds")


@pytest.mark.parametrize("key", ["attempt", "stage"])
@pytest.mark.parametrize("name", ["", ".", "..", "split/other", "../split"])
def test_stage_and_attempt_of_a_manifest_are_one_folder_each(run, key, name):
    publish(run, 1)
    rewritten(run, lambda manifest: manifest.update({key: name}))
    with pytest.raises(DataError, match="outside of the run"):
        run.files("folds")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b"{}", b"\xff", b'{"stage": "split"}', b"[" * 100_000, b'{"tables": []}'],
)
def test_a_manifest_that_is_none_is_a_data_error_that_names_it(run, content):
    publish(run, 1)
    path = run.root / "split" / MANIFEST
    path.write_bytes(content)
    for look in (lambda: run.manifest("split"), lambda: run.files("folds"), lambda: run.damage("split")):
        with pytest.raises(DataError) as caught:
            look()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("fingerprint"),
        lambda m: m.update(recipe=None),
        lambda m: m["tables"].pop("folds"),
        lambda m: m["tables"].update(folds=None),
        lambda m: m["tables"].update(folds=["folds-00000.parquet"]),
        lambda m: m["tables"]["folds"][0].pop("sha256"),
        lambda m: m["tables"]["folds"][0].update(file=3),
        lambda m: m["tables"]["folds"][0].update(bytes="3"),
    ],
)
def test_a_manifest_with_a_part_missing_is_a_data_error(run, change):
    publish(run, 1)
    rewritten(run, change)
    with pytest.raises(DataError, match="changed by hand"):
        run.files("folds")


def test_run_json_of_a_newer_version_is_refused(run):
    (run.root / "run.json").write_text(json.dumps({"format": store.FORMAT + 1, "config": {}, "input": "x"}))
    with pytest.raises(ConfigError, match=f"format {store.FORMAT + 1} is newer.*upgrade tagmill"):
        run.info  # noqa: B018


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "1"}', '{"format": 1}', '{"format": 1, "config": 3}']
)
def test_a_damaged_run_json_is_a_data_error(run, content):
    (run.root / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        run.info  # noqa: B018


def test_a_folder_that_is_no_run_is_missing_input(tmp_path):
    with pytest.raises(InputError, match="not a run folder") as caught:
        Run(tmp_path).info  # noqa: B018
    assert caught.value.code == 66
    assert not Run(tmp_path).exists


# -- one writer --------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pipeline.store import Run
with Run(sys.argv[1]).writing():
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_writer_is_told_who_holds_the_lock_and_a_kill_frees_it(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run.root], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        with pytest.raises(LockedError) as caught, run.writing():
            pytest.fail("two writers")
        assert time.monotonic() - started < 2
        assert caught.value.code == 75
        assert f"process {holder.pid} on {socket.gethostname()} since 2" in str(caught.value)
        assert str(run.root) in str(caught.value)
        # the loser has not touched what the holder wrote about itself
        assert f"process {holder.pid} " in (run.root / ".lock").read_text()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with run.writing():
            assert f"process {os.getpid()} " in (run.root / ".lock").read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_the_lock_is_free_after_the_block_also_after_an_exception(run):
    with pytest.raises(ValueError), run.writing():
        raise ValueError
    with run.writing(), pytest.raises(LockedError), Run(run.root).writing():
        pytest.fail("two writers")
    with run.writing():
        pass


def test_reading_needs_no_lock(run):
    publish(run, 1)
    with run.writing():
        assert whole(Run(run.root)) == 1


def test_the_name_of_a_hostile_holder_is_escaped(run):
    with run.writing():
        (run.root / ".lock").write_bytes(b"\x1b[31mroot\nforged line\xff" + b"x" * 5000)
        with pytest.raises(LockedError) as caught, run.writing():
            pytest.fail("two writers")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500 + len(str(run.root))


def test_a_planted_link_at_the_lock_is_refused(run, tmp_path):
    target = tmp_path / "precious"
    target.write_text("content")
    (run.root / ".lock").symlink_to(target)
    with pytest.raises(PermissionError_, match=r"\.lock.*symbolic link") as caught, run.writing():
        pytest.fail("followed the link")
    assert caught.value.code == 77
    assert target.read_text() == "content"
    (run.root / ".lock").unlink()
    (run.root / ".lock").symlink_to(tmp_path / "nothing")
    with pytest.raises(PermissionError_), run.writing():
        pytest.fail("followed the link")
    assert not (tmp_path / "nothing").exists()


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("here/../there/./run/")
    assert run.root == tmp_path / "there" / "run"
    monkeypatch.chdir("/")
    assert run.root == tmp_path / "there" / "run"
    assert Run(f"file://{tmp_path}/run").root == tmp_path / "run"
    assert Run(Path("/a/b")).root == Path("/a/b")
    run.prepare()
    run.create({"config": {}, "input": "x"})
    publish(run, 1)
    assert all(path.is_absolute() for path in run.files("folds"))
    assert run.attempt("train").is_absolute()


def test_prepare_takes_a_new_an_empty_and_a_run_folder(tmp_path):
    run = Run(tmp_path / "a" / "b")
    run.prepare()
    assert run.root.stat().st_mode & 0o007 == 0  # documents are nobody else's business
    run.prepare()
    with run.writing():
        pass
    run.prepare()  # a run that stopped before its run.json
    run.create({"config": {}, "input": "x"})
    (run.root / "notes.txt").touch()
    run.prepare()  # a run, with somebody's notes in it


def test_prepare_refuses_a_folder_with_foreign_files(tmp_path):
    (tmp_path / "thesis\x1b.tex").write_text("content")
    (tmp_path / ".lock").touch()
    with pytest.raises(
        ConfigError, match=r"holds 1 entries such as thesis\\x1b\.tex and is not a run folder"
    ) as caught:
        Run(tmp_path).prepare()
    assert caught.value.code == 78
    assert str(tmp_path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == [".lock", "thesis\x1b.tex"]


def test_prepare_refuses_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(ConfigError, match="is a file; expected a new or empty folder"):
        Run(path).prepare()
    with pytest.raises(InputError, match="Not a directory"):
        Run(path / "run").prepare()
    assert path.read_text() == "content"


# -- what the operating system refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "family"),
    [
        (errno.EACCES, PermissionError_),
        (errno.EPERM, PermissionError_),
        (errno.EROFS, PermissionError_),
        (errno.ELOOP, PermissionError_),
        (errno.ENOENT, InputError),
        (errno.ENOTDIR, InputError),
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EIO, StorageError),
        (errno.EXDEV, StorageError),
        (errno.EMFILE, StorageError),
    ],
)
def test_refusals_of_the_system_name_the_path_and_the_reason(number, family):
    with pytest.raises(family) as caught, explained("/given", "write to"):
        raise OSError(number, "whatever", "/its/own\x1b")
    assert type(caught.value) is family
    assert str(caught.value).startswith(rf"cannot write to /its/own\x1b: {os.strerror(number)}")
    with pytest.raises(family, match="cannot write to /given: "), explained("/given", "write to"):
        raise OSError(number, "whatever")
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert "free some space and run the same command again" in str(caught.value)


def test_an_error_without_a_number_keeps_its_text_and_others_pass():
    with pytest.raises(StorageError, match="cannot read /x: short read"), explained("/x", "read"):
        raise OSError("short read")
    with pytest.raises(DataError, match="own"), explained("/x", "read"):
        raise DataError("own")
    with pytest.raises(ZeroDivisionError), explained("/x", "read"):
        raise ZeroDivisionError


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_no_permission_is_exit_code_77(run, monkeypatch, number):
    publish(run, 1)
    attempt = run.attempt("split")

    def refuse(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    for name, action in (
        ("mkdir", Run(run.root / "new").prepare),
        ("mkdir", lambda: run.attempt("train")),
        ("open", lambda: run.writing().__enter__()),
        ("replace", lambda: run.commit("split", attempt, {"value": 2}, {}, {})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(PermissionError_, match="give write permission or choose another folder") as caught:
                action()
        assert caught.value.code == 77
        assert str(run.root) in str(caught.value)
    assert whole(run) == 1


MOUNTED = """
import sys, pyarrow as pa
from pipeline.errors import TagmillError
from pipeline.store import Run, explained, write_json, write_part
run = Run(sys.argv[1])
def attempt(action):
    try:
        action()
    except TagmillError as error:
        print(error.code, error)
    except OSError as error:
        print("OSError", error)
if sys.argv[2] == "full":
    run.prepare()
    run.create({"config": {}, "input": "x"})
    folder = run.attempt("split")
    def part(number):
        with explained(folder, "write to"):
            rows = pa.table({"row": pa.array(range(500_000)), "fold": pa.array(range(500_000), pa.int32())})
            write_part(folder, "folds", rows, number)
    attempt(lambda: part(0))
    with open(run.root / "ballast", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError:
            pass
    attempt(lambda: run.commit("split", folder, {}, {}, {}))
    print(sorted(p.name for p in run.root.rglob("*")), run.manifest("split"))
else:
    attempt(run.prepare)
    attempt(lambda: run.attempt("split"))
    attempt(lambda: run.writing().__enter__())
"""


def in_mount(tmp_path, options, *args):
    """Run MOUNTED in a mount namespace of its own: nothing is left mounted, whatever happens."""
    command = f'mount {options} && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, "-c", MOUNTED, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"no own mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare and mount")
def test_a_full_disk_is_exit_code_74_and_leaves_nothing_half(tmp_path):
    part, manifest, rest = in_mount(tmp_path, f"-t tmpfs -o size=1m tmpfs '{tmp_path}'", str(tmp_path / "run"), "full")
    for line in (part, manifest):
        assert line.startswith("74 cannot ")
        assert str(tmp_path / "run" / "split") in line
        assert line.endswith("No space left on device; free some space and run the same command again")
    assert ".tmp" not in rest
    assert "MANIFEST" not in rest
    assert rest.endswith("None")


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare and mount")
def test_a_read_only_folder_is_exit_code_77(tmp_path):
    options = f"-t tmpfs -o ro tmpfs '{tmp_path}'"
    for line in in_mount(tmp_path, options, str(tmp_path / "run"), "read-only")[:2]:
        assert line.startswith("77 cannot create ")
        assert line.endswith("Read-only file system; give write permission or choose another folder")
