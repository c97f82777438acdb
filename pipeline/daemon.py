"""The process that Spark forks its Python workers from, with the slow imports done once for all of them."""

import numba
import pyarrow.parquet
from pyspark import daemon

__all__ = ["numba", "pyarrow"]

if __name__ == "__main__":
    daemon.manager()
