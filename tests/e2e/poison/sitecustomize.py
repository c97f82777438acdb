"""Poisons documents, or kills workers, in every process that starts with POISON or POISON_KILLS set.

POISON: a text that holds one of the words of DEEDS does that to whoever works on it.
POISON_KILLS: a folder; the first three processes that come to each of the functions kill themselves there.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


def crash():
    import ctypes

    ctypes.string_at(0)


def exhaust():
    import numpy as np

    np.ones(3_000_000_000, np.uint8)


def fail():
    raise ZeroDivisionError("of this document alone")


# the word, the functions of pipeline.learners.vectorizer that choke on it, and how
DEEDS = {
    "segfaulting": (("lower_bytes",), crash),
    "raising": (("lower_bytes",), fail),
    "exhausting": (("count_documents", "vectorize"), exhaust),
    "hanging": (("vectorize",), lambda: time.sleep(1e5)),
}
KILLS = 3  # a task is tried four times


def wrapped(name, function):
    deeds = [(word, deed) for word, (names, deed) in DEEDS.items() if name in names]
    folder = os.environ.get("POISON_KILLS")

    def poisoned(texts, *arguments):
        for text in texts.to_pylist() if os.environ.get("POISON") else ():
            for word, deed in deeds:
                if word in text:
                    deed()
        for number in range(KILLS) if folder else ():
            try:
                Path(folder, f"{name}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return function(texts, *arguments)

    return poisoned


class _After(importlib.abc.MetaPathFinder):
    """Patches the vectorizer right after its own loader has run it."""

    def find_spec(self, name, path, target=None):
        if name != "pipeline.learners.vectorizer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for function in ("lower_bytes", "count_documents", "vectorize"):
                setattr(module, function, wrapped(function, getattr(module, function)))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("POISON") or os.environ.get("POISON_KILLS"):
    sys.meta_path.insert(0, _After())
