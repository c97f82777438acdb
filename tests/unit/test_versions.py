import json
import os

import pytest

from pipeline import versions
from pipeline.errors import DataError, InputError
from pipeline.store import Run, entry, write_json

SETTINGS = {"calibrate.rule": "f_beta", "calibrate.k": 5, "calibrate.rules": "", "evaluate.if_undefined": 0}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare()
    run.create({"config": {}, "input": "here"})
    return run


def publish(run, models="m1", evaluated=True, **changed):
    """What calibrate and evaluate would leave, in small: files that say their settings."""
    settings = {**SETTINGS, **{f"calibrate.{name}": value for name, value in changed.items()}}
    manifest = None
    for stage, name in (("calibrate", "decision.json"), ("evaluate", "metrics.json"))[: 1 + evaluated]:
        attempt = run.attempt(stage)
        content = {"metrics": {"micro_f1": settings["calibrate.k"] / 10, "macro_f1": 0.5}, "settings": settings}
        write_json(attempt / name, content)
        mine = {key: value for key, value in settings.items() if key.startswith(stage) or stage == "calibrate"}
        inputs = {"calibrate": manifest["fingerprint"]} if manifest else {"train": models}
        recipe = {"stage": stage, "settings": mine, "inputs": inputs, "code": "c"}
        manifest = run.commit(stage, attempt, recipe, {name: [entry(attempt / name, attempt, 1)]}, {"seconds": 1})
    return run


def content(run, name="decision.json"):
    return run.files(name)[0].read_bytes()


def test_a_version_is_kept_once_and_put_back_byte_for_byte(run):
    assert versions.kept(run) == versions.listed(run) == []
    assert versions.keep(run) is None
    first = content(publish(run))
    assert versions.keep(run) == versions.keep(run) == 1  # killed after it was kept, begun again
    second = content(publish(run, k=7))
    assert first != second
    assert versions.keep(run) == 2
    manifest = run.finished("calibrate")
    versions.put_back(run, versions.version(run, 1))
    assert content(run) == first
    assert run.damage("calibrate") is None
    assert run.finished("calibrate")["fingerprint"] == versions.version(run, 1)["calibrate"]["fingerprint"]
    assert run.finished("calibrate")["seconds"] == manifest["seconds"]
    publish(run)
    assert versions.keep(run) == 1  # what is back is no new version
    assert sorted(os.listdir(run.root / "versions" / "0001")) == ["decision.json", "metrics.json", "version.json"]


def test_the_list_says_what_changed_from_one_to_the_next(run):
    publish(run)
    versions.keep(run)
    publish(run, rule="rcut", k=7)
    versions.keep(run)
    publish(run, rule="rcut", k=9)
    rows = versions.listed(run)
    assert [row["number"] for row in rows] == [1, 2, None]
    assert [row["rule"] for row in rows] == ["f_beta", "rcut", "rcut"]
    assert [row["settings"] for row in rows] == [
        {},
        {"calibrate.rule": "rcut", "calibrate.k": 7},
        {"calibrate.k": 9},
    ]
    assert [row["micro_f1"] for row in rows] == [0.5, 0.7, 0.9]
    assert [row["current"] for row in rows] == [False, False, True]
    assert all(row["same_models"] for row in rows)
    publish(run, rule="rcut", k=7)
    assert [(row["number"], row["current"]) for row in versions.listed(run)] == [(1, False), (2, True)]
    publish(run, models="m2")
    assert [row["same_models"] for row in versions.listed(run)] == [False, False, True]


def test_what_is_not_evaluated_yet_is_kept_without_metrics(run):
    publish(run)
    publish(run, evaluated=False, k=7)  # evaluate is still that of before
    assert versions.keep(run) == 1
    [row] = versions.listed(run)
    assert (row["micro_f1"], row["settings"]) == (None, {"calibrate.k": 7})
    assert not (run.root / "versions" / "0001" / "metrics.json").exists()


def test_the_settings_of_a_version_come_back(run):
    publish(run, k=3, rules="rules.yaml@0123abc")
    versions.keep(run)
    found = versions.settings(versions.version(run, 1))
    assert found["calibrate"] == {"rule": "f_beta", "k": 3, "rules": "rules.yaml"}
    assert found["evaluate"] == {"if_undefined": 0}


@pytest.mark.parametrize("name", ["rename", "fsync", "replace"])
def test_a_version_is_whole_or_not_there(run, monkeypatch, name):
    publish(run)

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(os, name, killed)
    with pytest.raises(Killed):
        versions.keep(run)
    monkeypatch.undo()
    assert versions.kept(run) == []
    assert versions.keep(run) == 1
    assert os.listdir(run.root / "versions") == ["0001"]


def test_killed_while_it_is_put_back_nothing_has_changed(run, monkeypatch):
    publish(run)
    versions.keep(run)
    second = content(publish(run, k=7))
    monkeypatch.setattr(Run, "commit", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        versions.put_back(run, versions.version(run, 1))
    monkeypatch.undo()
    assert content(run) == second
    assert run.damage("calibrate") is None


def test_what_is_damaged_is_neither_kept_nor_put_back(run, caplog):
    publish(run)
    versions.keep(run)
    publish(run, k=7)
    run.files("metrics.json")[0].write_text("{}")
    assert versions.keep(run) is None
    assert "not kept" in caplog.text
    (run.root / "versions" / "0001" / "decision.json").write_text("{}")
    with pytest.raises(DataError, match=r"0001/decision\.json"):
        versions.put_back(run, versions.version(run, 1))
    with pytest.raises(InputError, match="no version 4; kept are: 1"):
        versions.version(run, 4)


def test_a_card_that_leaves_its_folder_is_refused(run):
    publish(run)
    versions.keep(run)
    card = versions.version(run, 1)
    outside = entry(run.root / "run.json", run.root, 1)
    card["calibrate"]["tables"]["decision.json"][0] |= {**outside, "file": "../../run.json"}
    with pytest.raises(DataError, match="changed"):
        versions.put_back(run, card)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"number": 1, "when": "", "calibrate": []})])
def test_a_damaged_card_is_refused_by_name(run, text):
    publish(run)
    versions.keep(run)
    (run.root / "versions" / "0001" / "version.json").write_text(text)
    with pytest.raises(DataError, match=r"version\.json"):
        versions.kept(run)
