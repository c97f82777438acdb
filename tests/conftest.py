"""Fixtures: the toy corpus, one Spark session per process, the folder of real corpora."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "corpus" / "documents.jsonl"

# nothing that a test does reaches the user's own MLflow store or run folders
SMALL = ("train.labels_per_block=2", "mlflow.enabled=false", "spark.master=local[2]", "spark.driver_memory=1g")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TAGMILL_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def own_log():
    """What a command logs to is the stream of its test, which is closed for the next one."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def memory(tmp_path_factory):
    """A folder in memory where there is such a place: a thousand calls of fsync cost nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tagmill-tests-") as folder:
        yield Path(folder)


@pytest.fixture
def quick_path(memory):
    """As tmp_path, in memory."""
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def toy() -> Path:
    return TOY


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    """One local session for all tests of this process; jobs use it and leave it running."""
    from pipeline import config
    from pipeline.session import session

    cfg, _ = config.load(sets=SMALL)
    spark = session(cfg.spark, "tests")
    yield spark
    spark.stop()


@pytest.fixture
def fit(spark, tmp_path):
    """fit(input, *sets, run=...) -> Run: a fit in this process, with small settings."""
    from jobs import entry
    from pipeline import config

    def call(path, *sets, run=None, overwrite=False):
        cfg, _ = config.load(sets=[*SMALL, *sets])
        return entry.fit(str(run or tmp_path / "run"), str(path), cfg, overwrite)

    return call


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real corpora; without TAGMILL_DATA the test is skipped and says so."""
    folder = os.environ.get("TAGMILL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TAGMILL_DATA is not set to a folder of corpora")
    return Path(folder)


@pytest.fixture(scope="session")
def store_port():
    """Port of an object store on the loopback."""
    from tests.object_store import serving

    with serving() as port:
        yield port


@pytest.fixture
def bucket(store_port, monkeypatch) -> str:
    """URI of a new bucket of that store; this process's environment leads there."""
    from tests import object_store

    for name, value in object_store.reached_at(store_port).items():
        monkeypatch.setenv(name, value)
    return f"s3://{object_store.new_bucket()}"
