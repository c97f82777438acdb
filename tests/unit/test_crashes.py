"""A crash before any system call of a publication, an error in any: old or new, and one line that says where."""

import functools
import os
import shutil

import pytest

from jobs import tag as tagging
from pipeline import versions
from pipeline.store import MANIFEST, Run, digest, explained, write_json
from tests.faults import failed_everywhere, killed_everywhere, traced
from tests.unit.test_store import publish as published
from tests.unit.test_store import temporary, whole
from tests.unit.test_versions import content
from tests.unit.test_versions import publish as judged

ERRORS = {
    **dict.fromkeys(("write", "pwrite64", "sendfile", "copy_file_range"), ("ENOSPC", "EIO", "EACCES", "EINTR")),
    **dict.fromkeys(("openat", "mkdir", "mkdirat"), ("ENOSPC", "EIO", "EACCES", "EINTR")),
    **dict.fromkeys(("rename", "renameat", "renameat2", "link"), ("ENOSPC", "EIO", "EACCES", "EXDEV", "EINTR")),
    **dict.fromkeys(("fsync", "ftruncate"), ("ENOSPC", "EIO", "EACCES", "EINTR")),
    **dict.fromkeys(("read", "close"), ("EIO",)),
}
STEPS = ("mkdir", "mkdirat", "rename", "renameat", "fsync")
CODES = {"EACCES": 77, "ENOSPC": 74, "EIO": 74, "EXDEV": 74, "EINTR": 74}


@pytest.fixture
def template(quick_path):
    run = Run(quick_path / "template")
    run.prepare()
    run.create({"config": {}, "input": "here"})
    return run


@pytest.fixture
def on_a_copy(quick_path, template):
    """on_a_copy(action) -> what makes a copy of the template, always at the same path, and gives action(copy)."""
    folder = quick_path / "run"

    def prepared(action):
        def prepare():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(template.root, folder)
            return functools.partial(action, Run(folder))

        return prepare

    return prepared


def publish(run, value):
    """As a job does it: take the lock, begin, write the parts, commit."""
    with run.writing():
        run.create({"config": {}, "input": "here"})
        attempt = run.attempt("split")
        with explained(attempt, "write to"):
            published(run, value, attempt=attempt)


def left(run):
    """Whatever no manifest names."""
    attempts = {run.manifest(stage)["attempt"] for stage in ("split", "calibrate", "evaluate") if run.manifest(stage)}
    dead = [p.name for p in run.root.glob("*/attempt-*") if p.name not in attempts]
    return temporary(run.root) + dead


# -- a crash -----------------------------------------------------------------------------------------------------------


def test_killed_before_any_system_call_of_a_publication(quick_path, template, on_a_copy):
    publish(template, 1)

    prepare = on_a_copy(lambda run: publish(run, 2))
    seen, names = [], set()
    for call in killed_everywhere(quick_path, prepare):
        run = Run(quick_path / "run")
        names.add(call.name)
        seen.append(whole(run))
        assert run.info["input"] == "here"
        publish(run, 3)
        assert whole(run) == 3
        assert left(run) == [], call
    assert seen == sorted(seen)  # once new, always new
    assert set(seen) == {1, 2}
    assert len(seen) > 60
    assert {"openat", "write", "fsync"} < names


def test_killed_between_the_steps_of_a_first_publication(quick_path, template, on_a_copy):
    seen = []
    for _ in killed_everywhere(quick_path, on_a_copy(lambda run: publish(run, 1)), STEPS):
        run = Run(quick_path / "run")
        seen.append(run.manifest("split") and whole(run))
        publish(run, 2)
        assert whole(run) == 2
        assert left(run) == []
    assert set(seen) == {None, 1}


def test_killed_before_any_system_call_of_keeping_a_version(quick_path, template, on_a_copy):
    judged(template)
    first = content(template)
    seen = []
    for _ in killed_everywhere(quick_path, on_a_copy(versions.keep)):
        run = Run(quick_path / "run")
        assert content(run) == first
        seen.append([card["number"] for card in versions.kept(run)])
        assert versions.keep(run) == 1
        judged(run, k=9)
        versions.put_back(run, versions.version(run, 1))  # every file is as it was
        assert content(run) == first
        assert left(run) == []
    assert seen == sorted(seen)
    assert {tuple(numbers) for numbers in seen} == {(), (1,)}


def test_killed_before_any_system_call_of_putting_a_version_back(quick_path, template, on_a_copy):
    judged(template)
    first = content(template)
    versions.keep(template)
    second = content(judged(template, k=9))

    prepare = on_a_copy(lambda run: versions.put_back(run, versions.version(run, 1)))
    seen = []
    for _ in killed_everywhere(quick_path, prepare):
        run = Run(quick_path / "run")
        assert run.damage("calibrate") is None
        seen.append(content(run) == first)
        assert seen[-1] or content(run) == second
        versions.put_back(run, versions.version(run, 1))
        assert content(run) == first
        assert left(run) == []
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def tags(folder, value):
    """What `tag` has ready before it publishes."""
    folder.mkdir(parents=True)
    (folder / "_rejects").mkdir()
    (folder / "_rejects" / "rejects-00000.parquet").write_text(f"rejects {value}")
    (folder / "tags-00000.parquet").write_text(f"tags {value}")
    entry = {"file": "tags-00000.parquet", "sha256": digest(folder / "tags-00000.parquet")}
    write_json(folder / tagging.CARD, {"value": value, "tables": {"tags": [entry]}})
    return folder


def tagged(out):
    """The value that a reader of the output sees."""
    card = tagging._card(out)
    assert tagging._whole(out, card)
    assert (out / "_rejects" / "rejects-00000.parquet").read_text() == f"rejects {card['value']}"
    return card["value"]


@pytest.mark.parametrize(("earlier", "exchange"), [(True, True), (True, False), (False, True)])
def test_killed_before_any_system_call_of_publishing_tags(quick_path, earlier, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(tagging, "_exchanged", lambda *_: False)
    out, work = quick_path / "home" / "tags", quick_path / "home" / ".tags.tagmill"

    def prepare():
        shutil.rmtree(quick_path / "home", ignore_errors=True)
        if earlier:
            tags(out, 1)
        tags(work / "result", 2)
        return lambda: (tagging._publish(Run(work), out, None), shutil.rmtree(work))

    seen = []
    for _ in killed_everywhere(quick_path, prepare):
        seen.append(tagged(out) if out.exists() else None)
        tagging._recover(out)
        if earlier:
            assert tagged(out) in (1, 2)
        shutil.rmtree(work / "result", ignore_errors=True)
        tags(work / "result", 3)
        tagging._publish(Run(work), out, None)
        assert tagged(out) == 3
        shutil.rmtree(work)
        assert os.listdir(quick_path / "home") == ["tags"]
    assert set(seen) == {1 if earlier else None, 2} | ({None} if not exchange else set())


# -- an error ----------------------------------------------------------------------------------------------------------


def refused(place, call, error, end):
    """Whether the command ended with an error, which it has to tell as it should."""
    assert "Traceback" not in end.said
    if end.status == 0:
        return False
    assert end.status == CODES[error], (call, error, end.said)
    [line] = end.said.splitlines()
    assert str(place) in line, (call, error)
    if call.name == "fsync":  # the kernel has dropped the pages: a second fsync would say that all is well
        [failed] = [c for c in end.calls if (c.name, c.number) == (call.name, call.number)]
        assert not [c for c in end.calls if c.name == "fsync" and c.text == failed.text and c.number > failed.number]
    return True


def test_an_error_in_any_system_call_of_a_publication(quick_path, template, on_a_copy):
    publish(template, 1)

    prepare = on_a_copy(lambda run: publish(run, 2))
    ends = []
    for call, error, end in failed_everywhere(quick_path, quick_path / "run", prepare, ERRORS):
        run = Run(quick_path / "run")
        ends.append(refused(quick_path / "run", call, error, end))
        assert ends[-1] or error == "EINTR" or call.name in ("close", "read", "openat"), (call, error)
        assert whole(run) == 2 if not ends[-1] else whole(run) in (1, 2)
        assert temporary(run.root) == []
        if error == "EIO":  # the others leave the same behind
            publish(run, 3)
            assert whole(run) == 3
    assert ends.count(True) > 60


def test_an_error_in_any_system_call_of_a_version(quick_path, template, on_a_copy):
    judged(template)
    first = content(template)
    versions.keep(template)
    second = content(judged(template, k=9))

    prepare = on_a_copy(lambda run: (versions.keep(run), versions.put_back(run, versions.version(run, 1))))
    ends = []
    errors = {name: [error for error in found if error in ("ENOSPC", "EIO")] for name, found in ERRORS.items()}
    for call, error, end in failed_everywhere(quick_path, quick_path / "run", prepare, errors):
        run = Run(quick_path / "run")
        ends.append(refused(quick_path / "run", call, error, end))
        assert run.damage("calibrate") is None
        assert content(run) == first if not ends[-1] else content(run) in (first, second)
        assert [card["number"] for card in versions.kept(run)] in ([1], [1, 2])
    assert ends.count(True) > 60


# -- the order of system calls, which is all that can be seen of a loss of power ---------------------------------------


def later(calls, after, name, end):
    """The place of the first call `name`, after another one, with arguments that end so."""
    return next(k for k, call in enumerate(calls) if k > after and call.name == name and call.text.endswith(end))


@pytest.mark.parametrize("what", ["publication", "version"])
def test_content_is_on_disk_before_its_name_and_the_name_before_the_manifest(quick_path, template, on_a_copy, what):
    judged(template)
    run = Run(quick_path / "run")
    action = {"publication": lambda run: publish(run, 1), "version": versions.keep}[what]
    end = traced(quick_path, on_a_copy(action)())
    assert end.status == 0
    calls = end.calls
    files = {
        "publication": lambda: [*run.files("folds"), *run.files("label_support"), run.root / "split" / MANIFEST],
        "version": lambda: [p for p in (run.root / "versions" / "0001").iterdir() if p.name == "version.json"],
    }[what]()
    named = []
    for path in files:
        renamed = next(k for k, c in enumerate(calls) if c.name.startswith("rename") and f'{path.name}"' in c.text)
        part = next(text for text in calls[renamed].text.split('"') if text.endswith(".tmp"))
        written = [k for k, c in enumerate(calls) if c.name in ("write", "pwrite64") and f"<{part}>" in c.text]
        synced = [k for k, c in enumerate(calls) if c.name == "fsync" and f"<{part}>" in c.text]
        assert written
        assert max(written) < synced[0] < renamed
        folder = os.path.dirname(part)
        named.append(later(calls, renamed, "fsync", f"<{folder}>"))
    assert named == sorted(named)  # the manifest, or the card, is the last
    # a new folder is on disk when its parent is
    for k, call in enumerate(calls):
        if call.name.startswith("mkdir") and call.error is None:
            made = call.text.split('"')[1]
            assert later(calls, k, "fsync", f"<{os.path.dirname(made)}>") <= named[-1] or what == "version"
