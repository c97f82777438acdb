"""Tests that run in the environment of `make airflow-env`; in Tagmill's own, which has no Airflow, they are skipped."""

import os
import shutil
import tempfile

# Airflow writes a configuration and a log folder to its home as soon as it is imported
HOME = tempfile.mkdtemp(prefix="tagmill-airflow-")
os.environ["AIRFLOW_HOME"] = HOME
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)
