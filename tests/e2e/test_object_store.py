"""A run and its input in an object store: the same bytes as on a disk."""

import json
import os

import pyarrow.parquet as pq
import pytest

from jobs import compare as comparing
from jobs import entry, status, tag
from jobs import show as showing
from pipeline import config, storage, versions
from pipeline.flow import FIT
from pipeline.store import Run
from tests.object_store import CREDENTIALS

pytestmark = pytest.mark.slow


def content(run):
    """SHA-256 of every file of every table."""
    found = {}
    for stage in FIT:
        manifest = run.manifest(stage.name)
        for table, items in (manifest or {"tables": {}})["tables"].items():
            if table != "report.html":  # it has the seconds of the stages
                found[table] = [item["sha256"] for item in items]
    return found


def test_a_run_in_an_object_store_has_the_bytes_of_one_on_a_disk(spark, fit, toy, bucket, tmp_path, capsys):
    spark.sparkContext.environment.update({name: os.environ[name] for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")})
    sets = (f"spark.cache_dir={tmp_path / 'cache'}",)
    storage.place(f"{bucket}/in/documents.jsonl").write_bytes(toy.read_bytes())
    local = fit(toy, *sets, run=tmp_path / "run")
    remote = fit(f"{bucket}/in/", *sets, run=f"{bucket}/runs/one")
    assert remote.root.name == "one"
    assert content(remote) == content(local)
    assert [remote.damage(stage.name) for stage in FIT[:-1]] == [None] * (len(FIT) - 1)
    assert status.found(remote)["state"] == "complete"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tagmill-") and path.suffix == ".tmp"]
    cfg = tag.tag_config(str(remote.root), None, ["spark.master=local[2]", *sets])
    before = {stage.name: remote.manifest(stage.name) for stage in FIT}
    fit(f"{bucket}/in/", *sets, run=f"{bucket}/runs/one")
    assert {stage.name: remote.manifest(stage.name) for stage in FIT} == before  # up to date
    comparing.compare(local, remote, True, 100, 0.95, 0)
    assert json.loads(capsys.readouterr().out)["run_b"] == str(remote.root)
    showing.overview(remote, True)
    assert json.loads(capsys.readouterr().out)["run"] == str(remote.root)
    for source, run, out in ((toy, local, str(tmp_path / "tags")), (f"{bucket}/in/*.jsonl", remote, f"{bucket}/tags")):
        tag.tag(str(run.root), None, str(source), out, cfg)
    card = json.loads(storage.place(f"{bucket}/tags/_MANIFEST.json").read_bytes())
    for item in card["tables"]["tags"]:
        mine = pq.read_table(tmp_path / "tags" / item["file"])
        assert storage.read_table(f"{bucket}/tags/{item['file']}").equals(mine)
    assert tag.tag(str(remote.root), None, f"{bucket}/in/*.jsonl", f"{bucket}/tags", cfg) == card  # up to date
    assert Run(f"{bucket}/runs/one").holder() is None

    # the model goes to MLflow and comes back from there
    sent = config.load(None, ["mlflow.enabled=true", "mlflow.required=true"], remote.info["config"])[0]
    entry.fit(str(remote.root), None, sent, only=("register",))
    model = remote.finished("register")["model_uri"]
    assert model == "models:/tagmill/1"
    from_model = tag.tag_config(None, None, ["spark.master=local[2]", *sets])
    other = tag.tag(None, model, f"{bucket}/in/*.jsonl", f"{bucket}/tags-of-model", from_model)
    assert [item["sha256"] for item in other["tables"]["tags"]] == [item["sha256"] for item in card["tables"]["tags"]]

    calibrated = config.load(None, ["calibrate.rule=rcut"], remote.info["config"])[0]
    entry.fit(str(remote.root), None, calibrated, True, ("calibrate", "evaluate", "register"))
    assert content(remote) != content(local)
    assert [row["number"] for row in versions.listed(remote)] == [1, None]
