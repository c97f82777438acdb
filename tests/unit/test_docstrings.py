import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import docstrings
from pipeline.docstrings import _as_table, _collect, _docstrings, _modules, _without_name

SAYS = "Says enough about itself to be kept as one document."


def found_in(source, library="toy", module="toy.sparse.io"):
    return {one.doc_id: one for one in _docstrings(ast.parse(source), library, module)}


def write(root, files):
    for name, source in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return root


def collect(root, library="toy"):
    return _collect((library, module, file) for module, file in _modules(library, root))


def rows(found, **least):
    table = _as_table(found, **({"min_support": 1, "min_libraries": 1} | least))
    return {row["doc_id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("norm(x, ord=(1, 2))\n\nThe norm of x.", "The norm of x."),
        ("linalg.norm(x,\n            axis=None) -> float\n\nThe norm of x.", "The norm of x."),
        ("norm(x) -> float\nnorm(x, y) -> float\n\nThe norm of x.", "The norm of x."),
        ("def norm(x):\n    The norm of x.", "The norm of x."),
        ("norm(x) is the norm of x.", "…(x) is the norm of x."),  # prose, not a signature
        ("Use `norm` or :func:`toy.linalg.norm`.\n\n>>> la.norm(3)", "Use `…` or :func:`…`.\n\n>>> …(3)"),
        ("normal(x)\n\nAnother function.", "normal(x)\n\nAnother function."),
        ("norm(x, (unclosed\n\nThe norm of x.", "…(x, (unclosed\n\nThe norm of x."),
    ],
)
def test_signature_and_own_name_are_hidden(text, expected):
    assert _without_name(text, ["toy", "linalg"], ("norm",)) == expected


def test_a_telling_name_is_hidden_wherever_it_stands():
    assert _without_name("A SparseArray is sparse.", ["toy"], ("SparseArray",)) == "A … is sparse."


def test_the_module_hides_its_dotted_name():
    assert _without_name("Sparse algebra (:mod:`toy.sparse`)", ["toy", "sparse"], ()) == "Sparse algebra (:mod:`…`)"


def test_a_lone_surrogate_can_be_written():
    assert rows(found_in(f"def f():\n    '{SAYS} \\ud800'\n").values())["toy.sparse.io.f"]["text"] == f"{SAYS} ?"


KINDS = f'''
"""{SAYS} module"""
import contextlib

class Reader:
    """{SAYS} class"""

    def read(self):
        """{SAYS} method"""

    @property
    def size(self):
        """{SAYS} property"""

    @size.setter
    def size(self, value):
        """{SAYS} setter"""

    def __len__(self):
        """{SAYS} dunder"""

    class Row:
        def cells(self):
            """{SAYS} nested"""

class Lock:
    """{SAYS} lock"""
    def __enter__(self): ...

class ParseProblem(ValueError):
    """{SAYS} exception"""

class _Hidden:
    def method(self):
        """{SAYS} hidden"""

try:
    async def fetch():
        """{SAYS} async"""
except ImportError:
    pass

@contextlib.contextmanager
def opened():
    """{SAYS} context"""
    def inner():
        """{SAYS} inner"""

def _private():
    """{SAYS} private"""

def templated():
    f"""{SAYS} {{1}}"""
'''


def test_kinds_and_marks():
    found = found_in(KINDS)
    place = {"toy", "toy.sparse"}
    assert {doc_id.removeprefix("toy.sparse.io"): set(one.labels) - place for doc_id, one in found.items()} == {
        "": {"module"},
        ".Reader": {"class"},
        ".Reader.read": {"method"},
        ".Reader.size": {"method"},  # the setter, which `_as_table` drops: the property comes first
        ".Reader.Row.cells": {"method"},
        ".Lock": {"class", "context manager"},
        ".ParseProblem": {"class", "exception"},
        ".fetch": {"function", "async"},
        ".opened": {"function", "context manager"},
    }
    assert found["toy.sparse.io.Reader.Row.cells"].words == {"sparse", "io", "reader", "row"}
    assert found["toy.sparse.io.fetch"].words == {"sparse", "io"}


def test_of_several_definitions_the_first_counts():
    row = rows(_docstrings(ast.parse(KINDS), "toy", "toy.sparse.io"))["toy.sparse.io.Reader.size"]
    assert row["text"] == f"{SAYS} property"
    assert "property" in row["labels"]


@pytest.mark.parametrize(
    ("source", "deprecated"),
    [
        ("@deprecated('since 2')\ndef f():\n    'Says how.'", True),
        ("@_api.deprecated('3.1')\nclass f:\n    'Says how.'", True),
        ("@deprecate_kwarg('x')\ndef f():\n    'Says how.'", False),  # one argument
        ("def f():\n    '''Says how.\n\n    .. deprecated:: 2.0\n    '''", True),
        ("def f():\n    '''Says how.\n\n    x : int\n        .. deprecated:: 2.0\n    '''", False),  # one argument
        ("def f():\n    'DEPRECATED: use g.'", True),
        ("def f():\n    'Says how.  This function is deprecated.'", True),
        ("def f():\n    'Collects deprecated names.'", False),
    ],
)
def test_deprecated(source, deprecated):
    assert ("deprecated" in found_in(source)["toy.sparse.io.f"].labels) is deprecated


def test_docstrings_of_compiled_objects():
    source = """
add_newdoc("toy.core", "array", "Many numbers.")
add_newdoc("toy.core", "array", ("size", "How many numbers."))
add_newdoc("toy.core", "array", [("sum", "a.sum(axis)\\n\\nThe sum."), ("_own", "Not public.")])
add_newdoc("sin", "The sine.")
add_newdoc("built", "Put " + together)
add_newdoc("ArrayLike", "Union[int]", "Another function of this name.")
add_newdoc("nothing", None)
"""
    found = found_in(source, module="toy.special._docs")
    assert {doc_id: (one.text, *sorted(one.labels)) for doc_id, one in found.items()} == {
        "toy.core.array": ("Many numbers.", "class", "toy"),
        "toy.core.array.size": ("How many numbers.", "property", "toy"),
        "toy.core.array.sum": ("The sum.", "method", "toy"),
        "toy.special.sin": ("The sine.", "function", "toy", "toy.special"),
    }


def test_place_and_topics_leave_hollow_words_out():
    one = found_in("def f():\n    'Says how.'", "pandas", "pandas.core._impl.plotting.v2.hist_utils")
    labels, words = one["pandas.core._impl.plotting.v2.hist_utils.f"][3:]
    assert labels == {"pandas", "pandas.plotting", "function"}
    assert words == {"plotting", "hist"}


def test_a_private_module_of_the_standard_library_is_known_by_its_public_name():
    assert found_in("'Says how.'", docstrings.STDLIB, "_pydecimal")["_pydecimal"].labels == {
        "stdlib", "decimal", "module",
    }  # fmt: skip


def test_topics_are_shared_words_and_singular_meets_plural():
    found = [
        one
        for library, module in [("a", "event"), ("b", "events"), ("c", "events"), ("a", "own")]
        for one in found_in(f'"""{SAYS} {library} {module}"""', library, f"{library}.{module}").values()
    ]
    table = rows(found, min_libraries=3)
    assert [doc_id for doc_id, row in table.items() if "events" in row["labels"]] == ["a.event", "b.events", "c.events"]
    assert table["a.own"]["labels"] == ["a", "a.own", "module"]


def test_rare_labels_are_left_out_but_their_documents_stay():
    table = rows(_docstrings(ast.parse(KINDS), "toy", "toy.sparse.io"), min_support=3)
    assert table["toy.sparse.io.fetch"]["labels"] == ["io", "sparse", "toy", "toy.sparse"]


def test_short_texts_and_copies_are_dropped():
    source = f"""
def b():
    '''{SAYS}'''

def a():
    '''{SAYS}'''

def few_words():
    '''{"x" * 60}'''

def few_letters():
    '''It is a b c d.'''
"""
    assert list(rows(found_in(source).values())) == ["toy.sparse.io.a"]


FILES = {
    "__init__.py": f'"""{SAYS} root"""',
    "_private.py": f'def public():\n    """{SAYS} public"""',
    "sub/deep.py": f'def found():\n    """{SAYS} deep"""',
    "tests/helpers.py": f'"""{SAYS} tests"""',
    "_vendor/copied.py": f'"""{SAYS} vendored"""',
    "test_own.py": f'"""{SAYS} test"""',
    "conftest.py": f'"""{SAYS} conftest"""',
    "not-a-module.py": f'"""{SAYS} no module"""',
}


def test_tests_and_copies_of_other_libraries_are_skipped(tmp_path):
    found, unreadable = collect(write(tmp_path, FILES))
    assert [one.doc_id for one in found] == ["toy", "toy._private.public", "toy.sub.deep.found"]
    assert unreadable == 0


def test_a_file_that_does_not_parse_is_counted_and_the_others_are_read(tmp_path):
    broken = {
        "a_syntax.py": "def broken(:\n",
        "b_null.py": b'"""' + SAYS.encode() + b'"""\0',
        "c_encoding.py": b"'\xff\xfe'\n",
        "d_codec.py": b"# -*- coding: no-such-codec -*-\n",
        "e_deep.py": "-" * 100_000 + "1",
        "z_good.py": f'"""{SAYS}"""',
    }
    found, unreadable = collect(write(tmp_path, broken))
    assert ([one.doc_id for one in found], unreadable) == (["toy.z_good"], 5)


def test_latin_1_is_read_as_declared(tmp_path):
    source = f'# coding: latin-1\n"""{SAYS} é"""'.encode("latin-1")
    found, unreadable = collect(write(tmp_path, {"old.py": source}))
    assert ([one.text for one in found], unreadable) == ([f"{SAYS} é"], 0)


BUILD = """
import sys
from functools import partial
from pathlib import Path
from pipeline import docstrings

docstrings._sources = lambda: (("toy", module, file) for module, file in docstrings._modules("toy", Path(sys.argv[1])))
docstrings._as_table = partial(docstrings._as_table, min_support=1, min_libraries=1)
print(docstrings.write_corpus(sys.argv[2]))
"""


def test_the_bytes_do_not_depend_on_the_hash_seed_or_on_file_times(tmp_path):
    root = write(tmp_path / "toy", FILES | {"big.py": KINDS})
    digests = set()
    for seed in ("1", "2"):
        os.utime(root / "big.py", (int(seed), int(seed)))
        corpus = tmp_path / f"corpus{seed}.parquet"
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(docstrings.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", BUILD, root, corpus], env=env, check=True, stdout=subprocess.DEVNULL)
        digests.add(hashlib.sha256(corpus.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_written_as_one_whole_file(tmp_path, monkeypatch):
    root = write(tmp_path / "toy", FILES)
    monkeypatch.setattr(docstrings, "_sources", lambda: (("toy", *source) for source in _modules("toy", root)))
    target = tmp_path / "out" / "corpus.parquet"
    target.parent.mkdir()
    assert docstrings.write_corpus(target) == 3
    assert pq.read_schema(target).equals(docstrings.SCHEMA)
    before = target.read_bytes()

    def full_disk(table, sink, **_):
        sink.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(docstrings.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        docstrings.write_corpus(target)
    assert target.read_bytes() == before
    assert os.listdir(target.parent) == ["corpus.parquet"]


def test_a_library_of_this_installation():
    import json  # the sources of what runs this test

    found, unreadable = _collect(("stdlib", *source) for source in _modules("json", Path(json.__file__).parent))
    table = rows(found)
    assert unreadable == 0
    assert table["json.dumps"]["labels"] == ["function", "json", "stdlib"]
    assert {"class", "decoder", "json", "stdlib"} <= set(table["json.decoder.JSONDecoder"]["labels"])
    assert table["json.dumps"]["text"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")
    assert list(table) == sorted(table)


def test_sources_name_every_file_once_and_leave_tests_and_this_project_out():
    sources = list(docstrings._sources())
    assert len({file for _, _, file in sources}) == len(sources)
    libraries = {library for library, _, _ in sources}
    assert {"stdlib", "numpy", "pandas", "pyspark", "sklearn", "typing_extensions"} <= libraries
    assert not libraries & {"pipeline", "jobs", "pytest", "setuptools"}
    assert not [module for _, module, _ in sources if ".tests." in module]
