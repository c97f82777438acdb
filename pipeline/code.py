"""What computes here: the modules, and the versions of the packages that touch numbers, as one mark."""

import functools
import hashlib
import importlib.metadata
import unicodedata
from pathlib import Path


@functools.cache
def code_version() -> str:
    """Hash of the modules that compute, and of the versions of the packages that touch numbers."""
    root = Path(__file__).parent
    files = [root / "sources.py", root / "tables.py"]
    for layer in ("kernels", "learners", "stages"):
        files += sorted((root / layer).glob("*.py"))
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("numpy", "scipy", "numba", "llvmlite", "pyarrow"):
        total.update(f"{package} {importlib.metadata.version(package)}\0".encode())
    total.update(unicodedata.unidata_version.encode())  # what counts as a letter
    return total.hexdigest()[:16]
