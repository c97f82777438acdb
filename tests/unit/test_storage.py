"""Runs and inputs in an object store: in memory where one process will do, else behind HTTP on the loopback."""

import errno
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import pickle
import socket
import threading
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from jobs import entry as entry_
from jobs import inputs, status, tag
from pipeline import lease, sources, storage, versions
from pipeline.config import Config
from pipeline.errors import ConfigError, DataError, InputError, PermissionError_, ServiceError, StorageError
from pipeline.learners.tagger import Weights
from pipeline.sources import SourceFormat
from pipeline.stages import same_store, scores
from pipeline.store import MANIFEST, Run, entry, write_json, write_part
from tests.object_store import Proxy, reached_at


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("RENEW", 0.3), ("LEASE", 2.0), ("LOOK", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def memory():
    """URI of a folder of fsspec's memory file system."""
    name = f"/{uuid.uuid4().hex[:8]}"
    yield f"memory:/{name}"
    fs = MemoryFileSystem()
    if fs.exists(name):
        fs.rm(name, recursive=True)


@pytest.fixture(params=["memory", "s3"])
def root(request):
    """A folder of an object store, once in memory and once behind HTTP."""
    return request.getfixturevalue("memory" if request.param == "memory" else "bucket") + "/runs/one"


@pytest.fixture
def proxy(store_port, bucket, monkeypatch):
    """A proxy before the store, which this process now goes through."""
    found = Proxy(store_port)
    for name, value in reached_at(found.port).items():
        monkeypatch.setenv(name, value)
    yield found
    found.stop()


def labels(names):
    return pa.table(
        {
            "label_id": pa.array(range(len(names)), pa.int32()),
            "label": pa.array(list(names)),
            "support": pa.array([1] * len(names), pa.int64()),
        }
    )


def publish(run, names):
    attempt = run.attempt("ingest")
    parts = [write_part(attempt, "labels", labels(names), 0)]
    return run.commit("ingest", attempt, {"names": names}, {"labels": parts}, {"summary": names})


def seen(run):
    """What a reader finds: the labels of the published attempt, every file checked."""
    if run.manifest("ingest") is None:
        return None
    assert run.damage("ingest") is None
    names = "".join(run.read("labels", ["label"], verify=True)["label"].to_pylist())
    assert run.finished("ingest")["recipe"] == {"names": names}
    return names


def test_a_run_is_written_and_read(root):
    run = Run(root)
    assert str(run.root) == root and run.root.name == "one"
    assert not run.exists and run.manifest("ingest") is None and run.holder() is None
    run.prepare()
    with run.writing():
        run.create({"config": {}, "input": "x"})
        publish(run, "old")
        publish(run, "new")
    assert Run(root).info["input"] == "x"
    assert seen(run) == "new"
    folders = {path.name for path in (run.root / "ingest").iterdir()}
    assert folders == {MANIFEST, run.finished("ingest")["attempt"]}
    assert run.finished("ingest")["lease"] == 1
    with run.writing():
        run.drop(["ingest"])
    assert seen(run) is None
    [path] = (run.root / "ingest").glob("*/labels-*.parquet")
    assert pickle.loads(pickle.dumps(path)) == path


def test_a_folder_that_holds_something_else_is_no_run(root):
    storage.place(f"{root}/theirs.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"theirs\.txt and is not a run folder"):
        Run(root).prepare()


def test_a_file_that_changed_is_found(root):
    run = Run(root)
    with run.writing():
        publish(run, "ab")
    [path] = run.files("labels")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert "has changed" in run.damage("ingest")
    with pytest.raises(DataError, match="missing or changed"):
        run.read("labels", verify=True)
    path.unlink()
    assert "is missing" in run.damage("ingest")


@pytest.mark.parametrize("key", ["file", "attempt", "stage"])
@pytest.mark.parametrize("name", ["../../../other", "..", "/etc/passwd", "s3://other/x", "memory://other/x", "a\0b"])
def test_a_manifest_names_nothing_outside_of_the_run(memory, key, name):
    run = Run(f"{memory}/run")
    with run.writing():
        publish(run, "ab")
        manifest = run.finished("ingest")
        (manifest["tables"]["labels"][0] if key == "file" else manifest)[key] = name
        write_json(run.root / "ingest" / MANIFEST, manifest)
    for look in (lambda: run.files("labels"), lambda: run.read("labels"), lambda: run.damage("ingest")):
        with pytest.raises(DataError, match="outside of the run"):
            look()


class Killed(BaseException):
    pass


WRITES = ("pipe_file", "put_file", "rm_file", "rm", "cp_file")


def killed_at(monkeypatch, number):
    """From its `number`-th write on, the store in memory hears no more of this process.  Returns the count so far."""
    count = [0]

    def dying(call):
        def write(self, *args, **kwargs):
            count[0] += 1
            if count[0] >= number:
                raise Killed
            return call(self, *args, **kwargs)

        return write

    for name in WRITES:
        monkeypatch.setattr(MemoryFileSystem, name, dying(getattr(MemoryFileSystem, name)))
    return count


def until_it_lives(monkeypatch, work, check, again):
    """Kill `work` at its first write, at its second, ...; `check` what is there, and that doing it `again` mends it."""
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            count = killed_at(patch, number)
            try:
                work()
                survived = True
            except Killed:
                survived = False
            # the lease is not renewed by the dead
        check()
        again()
        if survived:
            return count[0]
    raise AssertionError("it never ends")


def test_a_crash_between_any_two_writes_leaves_old_or_new(memory, monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 60.0)
    monkeypatch.setattr(lease, "LEASE", 0.02)  # the dead hold it no longer
    run = Run(f"{memory}/run")

    def put(names):
        mine = Run(run.root)
        with mine.writing():
            publish(mine, names)

    def again():
        put("newer")
        assert seen(run) == "newer"
        put("old")

    put("old")
    found = []
    writes = until_it_lives(monkeypatch, lambda: put("new"), lambda: found.append(seen(run)), again)
    assert set(found) == {"old", "new"} and found == sorted(found, reverse=True)
    assert writes >= 8  # probe, lease, part, manifest, what is removed, release


def test_a_version_is_whole_or_not_there(memory, monkeypatch):
    part = storage.place(f"{memory}/versions/0001")

    def keep():
        with storage.appearing(part, "card") as folder:
            for name in ("a", "card", "z"):
                (folder / name).write_text(name)

    def check():
        if (part / "card").is_file():
            assert {path.name for path in part.iterdir()} == {"a", "card", "z"}

    assert until_it_lives(monkeypatch, keep, check, lambda: storage.remove(part)) == 3
    assert not part.exists()


def test_tags_are_whole_or_without_their_manifest(memory, monkeypatch):
    out = storage.place(f"{memory}/tags")
    work = Run(f"{memory}/.tags.tagmill")
    monkeypatch.setattr(work, "fenced", lambda: None)

    def result(names):
        folder = work.root / "result"
        storage.remove(folder)
        items = [write_part(folder, "labels", labels(names), number) for number in range(2)]
        (folder / "_rejects" / "rejects-00000.parquet").write_bytes(b"")
        card = {"fingerprint": names, "tables": {"tags": items}}
        write_json(folder / tag.CARD, card)
        return card

    def check():
        card = tag._card(out)
        assert card is None or tag._whole(out, card)
        if card is None and list(out.iterdir()):
            assert tag._published_in_part(work, "new")["fingerprint"] == "new"

    def again():
        tag._copy_to(work, out, result("old"))
        assert tag._whole(out, tag._card(out))
        assert tag._published_in_part(work, "new") is None
        (out / "tags-00009.parquet").write_bytes(b"of an output with more parts")
        tag._clear(work)
        assert not (work.root / "result").exists()
        card.clear()
        card.update(result("new"))

    card = result("new")
    writes = until_it_lives(monkeypatch, lambda: tag._copy_to(work, out, card), check, again)
    assert writes >= 6
    tag._copy_to(work, out, card)
    assert {path.name for path in out.iterdir()} == {*(i["file"] for i in card["tables"]["tags"]), "_rejects", tag.CARD}


@pytest.mark.parametrize("earlier", [None, "old"])  # the manifest is created, or replaced
def test_a_lost_answer_is_looked_up_and_nothing_is_published_twice(bucket, proxy, earlier):
    run = Run(f"{bucket}/run")
    manifest = f"/{bucket[5:]}/run/ingest/{MANIFEST}"
    if earlier:
        with run.writing():
            publish(run, earlier)
    lost = []

    def lose(method, path):
        if method != "PUT" or not path.startswith(manifest) or lost:
            return False
        lost.append(path)
        return True

    proxy.lose = lose
    proxy.log.clear()
    with run.writing():
        publish(run, "new")
    answers = [answer for method, path, answer in proxy.log if method == "PUT" and path.startswith(manifest)]
    assert lost and answers[0] == 200 and set(answers[1:]) <= {412}
    assert seen(run) == "new"


def test_a_lease_whose_answer_was_lost_is_ones_own(bucket, proxy):
    run, lost = Run(f"{bucket}/run"), []
    proxy.lose = lambda method, path: (
        method == "PUT" and "/.lease/000001" in path and not lost and not lost.append(path)
    )
    with run.writing():
        assert lost and run.lease.number == 1
        run.fenced()
    refused = [answer for method, path, answer in proxy.log if "/.lease/000001" in path and answer == 412]
    assert refused  # the driver tried again, and met its own object


def test_an_answer_that_stays_away_is_told_as_not_known(memory, monkeypatch):
    run = Run(f"{memory}/run")
    down = []

    def silent(call):
        def ask(self, path, *args, **kwargs):
            if down:
                raise TimeoutError("no answer")
            done = call(self, path, *args, **kwargs)
            if path.endswith(MANIFEST) and call.__name__ == "pipe_file":
                down.append(1)
                raise TimeoutError("no answer")
            return done

        return ask

    with monkeypatch.context() as patch:
        for name in ("pipe_file", "cat_file"):
            patch.setattr(MemoryFileSystem, name, silent(getattr(MemoryFileSystem, name)))
        with pytest.raises(ServiceError, match="whether it was written is not known"), run.writing():
            publish(run, "new")
    assert seen(run) == "new"


def test_a_store_without_conditions_is_told_once_and_used_with_care(bucket, proxy, caplog):
    proxy.conditions = False
    run = Run(f"{bucket}/run")
    with run.writing():
        assert run.lease.can == (False, False)
        publish(run, "old")
        publish(run, "new")
    assert [r for r in caplog.records if "If-None-Match" in r.message] == caplog.records
    assert len(caplog.records) == 1
    assert seen(run) == "new"


def test_conditions_of_the_stores(bucket, memory):
    assert storage.conditions(storage.place(f"{bucket}/x")) == (True, True)
    assert storage.conditions(storage.place(f"{memory}/x")) == (True, False)
    assert not list(storage.place(f"{bucket}/x").iterdir())


def test_a_driver_that_looks_and_then_writes_keeps_no_condition(bucket, memory, monkeypatch, caplog):
    assert storage._creates(type(storage.place(bucket).fs))  # its own, by the asynchronous method
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", AbstractFileSystem.pipe_file)
    assert not storage._creates(MemoryFileSystem) and not storage._creates(AsyncFileSystem)
    assert storage.conditions(storage.place(f"{memory}/x")) == (False, False)
    run = Run(f"{memory}/run")
    with run.writing():
        publish(run, "new")
    assert "see to it that one process at a time" in caplog.text and seen(run) == "new"


def test_what_stands_there_is_not_overwritten(bucket):
    path = storage.place(f"{bucket}/x")
    can = storage.conditions(path.parent)
    assert storage.publish(path, b"one", None, can)
    assert not storage.publish(path, b"two", None, can)
    first = storage.version_of(path)
    assert storage.publish(path, b"three", first, can)
    assert not storage.publish(path, b"four", first, can)
    assert path.read_bytes() == b"three"
    path.unlink()
    assert not storage.publish(path, b"five", first, can)


def test_a_service_that_is_down_is_not_taken_for_a_missing_file(bucket, proxy):
    run = Run(f"{bucket}/run")
    proxy.refuse = lambda method, path: True
    for ask in (lambda: run.exists, lambda: run.manifest("ingest"), lambda: list(run.root.iterdir())):
        with pytest.raises(PermissionError_, match=f"{bucket}/run"):
            ask()
    with pytest.raises(PermissionError_, match="credentials"):
        sources.plan(f"{bucket}/in", SourceFormat())
    proxy.stop()
    with pytest.raises(ServiceError, match="check that the service answers"):
        run.manifest("ingest")


def test_a_server_of_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"doc_id": "1", "text": "x", "labels": []}\n' * 3)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_address[1]}"
    [split] = sources.plan(f"{uri}/a.jsonl", SourceFormat()).splits
    assert sum(batch.num_rows for batch in sources.read_split(split, SourceFormat())) == 3
    with pytest.raises(InputError, match="no such file"):
        sources.plan(f"{uri}/b.jsonl", SourceFormat())
    with pytest.raises(ConfigError, match="cannot do it; choose another"), Run(f"{uri}/run").writing():
        pass
    server.shutdown()
    server.server_close()
    with pytest.raises(ServiceError, match="check that the service answers"):
        sources.plan(f"{uri}/a.jsonl", SourceFormat())


def test_without_credentials_permission_is_missing(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage.place(bucket).fs.clear_instance_cache()
    with pytest.raises(PermissionError_, match="expected credentials in the environment"):
        Run(f"{bucket}/run").manifest("ingest")


def test_a_bucket_that_is_not_there_is_missing_input(bucket):
    with pytest.raises(InputError, match="s3://no-such-bucket/run"), Run("s3://no-such-bucket/run").writing():
        pass
    with pytest.raises(InputError, match="s3://no-such-bucket/in"):
        sources.plan("s3://no-such-bucket/in", SourceFormat())


@pytest.mark.parametrize(
    "uri", ["s3://key:hush@bucket/run", "s3://hush@bucket/run", "https://host/x?Signature=hush", "abfs://u:hush@a/x"]
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri):
    with pytest.raises(ConfigError, match="give credentials by the environment") as error:
        storage.place(uri)
    assert "hush" not in str(error.value)


def missing(scheme):
    raise ImportError("no module named x")


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("s3fs", "gcsfs", "adlfs") else there(name)
    )
    with pytest.raises(ConfigError, match=r"needs the package s3fs; install it: pip install 'tagmill\[s3\]'"):
        Run("s3://bucket/run")
    for uri, package in (("gs://bucket/in", "gcsfs"), ("abfs://b@a/in", "adlfs"), ("abfss://b@a/in", "adlfs")):
        with pytest.raises(ConfigError, match=f"pip install '{package}'"):
            inputs.location(uri)
    with pytest.raises(ConfigError, match="chain"):
        Run("zip://x::s3://bucket/run")
    monkeypatch.undo()
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r"no module named x; install what is missing: .*'tagmill\[s3\]'"):
        Run("s3://bucket/run")


@pytest.mark.parametrize("kind", ["nosuch", "sftp", "hdfs", "zip", "github"])
def test_another_kind_of_storage_is_refused(kind):
    """A file system with folders of its own neither puts a file as a whole nor makes folders by names."""
    for use in (Run, inputs.location):
        with pytest.raises(ConfigError, match=f"the kind {kind} is not supported; expected s3://, gs:// or abfs://"):
            use(f"{kind}://host/run")


def test_a_refusal_is_one_line_and_an_exit_code(bucket, monkeypatch, capsys):
    there = storage.place(f"{bucket}/in.jsonl")
    there.write_bytes(b'{"doc_id": "1", "text": "x", "labels": ["a"]}\n')

    def code(source, run):
        return entry_.guarded(lambda: entry_.fit(run, source, Config()))

    assert code(f"{bucket}/none", f"{bucket}/run") == 66
    assert code(str(there), "s3://no-such-bucket/run") == 66
    assert code("s3://key:hush@bucket/in", f"{bucket}/run") == 78
    assert code(str(there), "s3://key:hush@bucket/run") == 78
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        there.fs.clear_instance_cache()
        assert code(str(there), f"{bucket}/run") == 77
    there.fs.clear_instance_cache()
    with Run(f"{bucket}/run").writing():
        assert code(str(there), f"{bucket}/run") == 75
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("tagmill: ") for line in said] == [True] * 6 and "hush" not in "".join(said)


def test_paths_of_a_disk_stay_paths(tmp_path):
    for text in (tmp_path / "run", str(tmp_path / "run"), f"file://{tmp_path}/run"):
        assert type(storage.place(text)) is type(Path()) and Run(text).root == tmp_path / "run"
    with storage.filling(tmp_path) as folder, storage.on_this_host(tmp_path / "x") as path:
        assert folder == tmp_path and path == tmp_path / "x"
    assert storage.Mapped("", (str(tmp_path / "x"),), ("",)).folder() == tmp_path


def written(folder, write):
    """Input files by their names; `write(name, content)`."""
    lines = "".join(json.dumps({"doc_id": f"d{k}", "text": f"text {k}", "labels": ["a"]}) + "\n" for k in range(50))
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"doc_id": ["p"], "text": ["t"], "labels": [["a"]]}), sink)
    write("a.jsonl", lines.encode())
    write("b.jsonl.gz", gzip.compress(lines.replace(': "d', ': "g').encode(), mtime=0))
    write("deep/c.parquet", sink.getvalue().to_pybytes())
    write("deep/d[1].csv", b"doc_id,text,labels\nx,y,a|b\nbroken\n")
    write("_hidden/e.jsonl", b"")
    write("f.tmp", b"")
    write("readme.md", b"")


@pytest.mark.parametrize("name", ["", "/", "/*", "/**/*.parquet", "/a.jsonl", "/deep/d[1].csv", "/[ab].*"])
def test_input_is_read_from_a_store_as_from_a_disk(root, tmp_path, name):
    def on_disk(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    written(tmp_path, on_disk)
    written(root, lambda name, content: storage.place(f"{root}/{name}").write_bytes(content))
    fmt = SourceFormat()
    here, there = (sources.plan(f"{folder}{name}", fmt, target_bytes=1000) for folder in (tmp_path, root))
    base = {str(tmp_path): "", root: ""}

    def named(items):
        return [tuple(base_less(x) if isinstance(x, str) else x for x in item) for item in items]

    def base_less(text):
        for prefix in base:
            text = text.replace(prefix, "").replace("memory:///", "memory://")
        return text.replace(root, "")

    assert sorted(named(there.files)) == sorted(named(here.files)) and here.files
    rows = [pa.Table.from_batches([b for s in p.splits for b in sources.read_split(s, fmt)]) for p in (here, there)]
    rows = [t.drop_columns("file").sort_by([("doc_id", "ascending"), ("position", "ascending")]) for t in rows]
    assert rows[0].equals(rows[1])
    if name in ("", "/"):
        assert {reason for _, reason in there.ignored} == {"hidden", "left by another program", "unknown kind of file"}


def test_input_that_is_not_there(root):
    for name in ("none.jsonl", "none/*.jsonl", ""):
        with pytest.raises(InputError, match="no such file or folder"):
            sources.plan(f"{root}/{name}", SourceFormat())


def test_an_object_that_was_cut_is_noticed(memory):
    path = storage.place(f"{memory}/a.jsonl")
    path.write_bytes(b'{"doc_id": "1", "text": "x", "labels": []}\n' * 3)
    [split] = sources.plan(str(path), SourceFormat()).splits
    path.write_bytes(b'{"doc_id": "1", "text": "x", "labels": []}\n')
    with pytest.raises(InputError, match="cut while in use"):
        list(sources.read_split(split, SourceFormat()))


def test_a_copy_is_on_the_disk_before_it_counts(memory, tmp_path, monkeypatch):
    path = storage.place(f"{memory}/weights-bias.npy")
    path.write_bytes(b"new")
    mapped = storage.Mapped("run", (str(path),), (hashlib.sha256(b"new").hexdigest(),), str(tmp_path))
    calls, rename = [], os.rename
    monkeypatch.setattr(storage, "sync_file", lambda path: calls.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    assert (mapped.folder() / path.name).read_bytes() == b"new"
    assert calls == [path.name, "rename"]


def test_what_a_store_refuses_says_what_to_do():
    refused = storage.refusal(OSError(errno.EIO, "odd"), storage.place("memory://b/x"), "write")
    assert type(refused) is StorageError
    assert str(refused).startswith("cannot write memory://") and "run the same command again" in str(refused)


def test_mapped_files_are_copied_once_and_checked(root, tmp_path):
    folder = storage.place(f"{root}/train/attempt-1")
    with storage.filling(folder) as part:
        for name in Weights._fields:
            np.save(part / f"weights-{name}.npy", np.arange(3))
        items = [entry(path, part, 1) for path in sorted(part.iterdir())]
    paths = tuple(str(folder / item["file"]) for item in items)
    mapped = storage.Mapped("run weights", paths, tuple(item["sha256"] for item in items), str(tmp_path))
    there = mapped.folder()
    assert np.array_equal(np.load(there / "weights-values.npy"), np.arange(3))
    storage.remove(folder)
    assert mapped.folder() == there  # nothing is fetched again
    assert not folder.exists()
    (folder / "weights-bias.npy").write_bytes(b"new")
    for mark, outcome in (("0" * 64, "missing or changed"), (hashlib.sha256(b"new").hexdigest(), None)):
        other = storage.Mapped("run weights", (str(folder / "weights-bias.npy"),), (mark,), str(tmp_path))
        if outcome:
            with pytest.raises(DataError, match=outcome):
                other.folder()
        else:
            assert (other.folder() / "weights-bias.npy").read_bytes() == b"new"
    assert not there.exists()  # one copy an owner
    kept = other.folder()
    other.forget()
    assert not kept.exists()


def test_a_model_is_shipped_to_the_hosts(memory, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("tagger.json", "weights-bias.npy"):
        (tmp_path / "model" / name).write_text(name)
    mapped = storage.shipped(tmp_path / "model", storage.place(f"{memory}/model"), str(tmp_path / "cache"))
    there = pickle.loads(pickle.dumps(mapped)).folder()
    assert {path.name: path.read_text() for path in there.iterdir()} == {
        n: n for n in ("tagger.json", "weights-bias.npy")
    }


def test_what_cannot_be_removed_is_told_or_an_error(memory, monkeypatch, caplog):
    path = storage.place(f"{memory}/a/b")
    path.write_bytes(b"")

    def refuse(self, *_, **__):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm", refuse)
        storage.remove(path.parent)
        assert "cannot remove" in caplog.text
        with pytest.raises(PermissionError_):
            storage.remove(path.parent, strict=True)
    storage.remove(storage.place(f"{memory}/none"), strict=True, keep=("x",))


def test_scores_stay_in_the_cache_of_the_host(memory, tmp_path, monkeypatch):
    run = Run(f"{memory}/run")
    monkeypatch.setattr(run, "finished", lambda stage: {"tables": {t: [{"sha256": t}] for _, t in scores.SOURCES}})
    folder = scores.folder_of(run, 2, 2, 1.0, str(tmp_path))
    assert folder.is_relative_to(tmp_path) and folder.is_dir()
    assert scores.folder_of(run, 2, 2, 0.0, str(tmp_path)) is None and not folder.exists()


def test_the_kept_versions_of_a_run_in_a_store(memory, monkeypatch):
    run = Run(f"{memory}/run")
    settings = {"calibrate.rule": "f_beta"}

    def calibrated(value):
        attempt = run.attempt("calibrate")
        write_json(attempt / "rules.json", {"value": value})
        recipe = {"settings": {**settings, "calibrate.k": value}, "inputs": {"train": "m"}, "code": "c"}
        run.commit("calibrate", attempt, recipe, {"rules.json": [entry(attempt / "rules.json", attempt, 1)]}, {})

    with run.writing():
        calibrated(1)
        assert versions.keep(run) == 1
        calibrated(2)
        (run.root / "versions" / "0007" / "rules.json").write_bytes(b"of a process that was killed")
        assert [card["number"] for card in versions.kept(run)] == [1]
        versions.put_back(run, versions.version(run, 1))
    assert json.loads(run.files("rules.json", verify=True)[0].read_text()) == {"value": 1}


def test_a_spark_table_needs_a_file_system(memory):
    plan = sources.Plan((), (("table:t", 0, "mark"),), ())
    with pytest.raises(ConfigError, match="file system that all hosts share"):
        inputs.exported(plan, Config(), None, Run(f"{memory}/run"))
    with pytest.raises(ConfigError, match="choose --run on a file system"):
        entry_.fit(f"{memory}/run", "table:t", Config())
    with pytest.raises(ConfigError, match="choose --output on a file system"):
        tag.tag(f"{memory}/run", None, "table:t", f"{memory}/tags", Config())
    assert not storage.place(memory).exists()  # nothing was written


def test_the_state_of_a_run_in_a_store(memory):
    run = Run(f"{memory}/run")
    with run.writing():
        run.create({"config": {}, "input": "x"})
        publish(run, "ab")
        found = status.found(run)
        assert (found["state"], found["code"]) == ("running", 75) and str(run.lease.holder) == found["holder"]
    assert status.found(run)["state"] == "unfinished"


class Spark:
    """As much of a session as the look at the storage needs."""

    class sparkContext:
        defaultParallelism = 1
        master = "local[1]"


def test_driver_and_executors_find_each_other_in_a_store(root, monkeypatch):
    monkeypatch.setattr(same_store, "run_tasks", lambda spark, what, function, tasks: [function(t) for t in tasks])
    path = storage.place(root)
    (path / ".probe-0000" / "driver").write_bytes(b"of a driver that was killed")
    assert same_store.check_same_store(Spark, path, 60) == [socket.gethostname()]
    assert not list(path.iterdir())
    monkeypatch.setattr(same_store, "place", lambda text: storage.place(text.replace("/runs/", "/other/")))
    with pytest.raises(ConfigError, match="cannot read what the driver wrote"):
        same_store.check_same_store(Spark, path, 60)
