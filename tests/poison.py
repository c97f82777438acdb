"""Changes of the vectorizer, for `tests.site.patched`: documents that poison it, workers that die in it."""

import ctypes
import os
import signal
import time
from pathlib import Path

import numpy as np

KILLS = 3  # of each function: a task is tried four times
FUNCTIONS = ("lower_bytes", "count_documents", "vectorize")


def fail():
    raise ZeroDivisionError("of this document alone")


# a word, the functions that choke on a text that holds it, and how
DEEDS = {
    "segfaulting": (("lower_bytes",), lambda: ctypes.string_at(0)),
    "raising": (("lower_bytes",), fail),
    "exhausting": (("count_documents", "vectorize"), lambda: np.ones(3_000_000_000, np.uint8)),
    "hanging": (("vectorize",), lambda: time.sleep(1e5)),
}


def documents(vectorizer):
    """Texts do what the words in them say."""

    def poisoned(name, texts):
        for text in texts.to_pylist():
            for word, (functions, deed) in DEEDS.items():
                if name in functions and word in text:
                    deed()

    _before_each(vectorizer, poisoned)


def workers(vectorizer):
    """The first processes that come to each of the functions kill themselves; they are counted in KILLS_FOLDER."""

    def killed(name, texts):
        for number in range(KILLS):
            try:
                Path(os.environ["KILLS_FOLDER"], f"{name}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each(vectorizer, killed)


def _before_each(vectorizer, deed):
    def wrapped(name, function):
        def called(texts, *arguments):
            deed(name, texts)
            return function(texts, *arguments)

        return called

    for name in FUNCTIONS:
        setattr(vectorizer, name, wrapped(name, getattr(vectorizer, name)))
