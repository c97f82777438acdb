"""The demo corpus: the docstrings of the Python libraries that are installed with Tagmill.

    installed sources  ->  corpus (doc_id, text, labels)

Sources are parsed, never imported.  A document is the docstring of one public module, class, function, method or
property; its labels are what its place in the source says about it: library, subpackage, topics of the module path,
class, kind, and a few marks such as `deprecated`.
"""

import ast
import gc
import importlib.util
import inspect
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

STDLIB = "stdlib"
_APPLICATIONS = {"idlelib", "lib2to3", "turtledemo"}  # come with Python, but nobody imports them
# What Tagmill itself needs, directly or not, so that development tools in the same environment change nothing.
# Without databricks-sdk: its generated clients alone would be a fifth of the corpus.
_LIBRARIES = """
    aiohttp alembic anyio attr cachetools cffi charset_normalizer click cloudpickle contourpy cryptography cycler
    dateutil docker dotenv fastapi flask fontTools git gitdb google graphene graphql gunicorn h11 huey idna
    importlib_metadata itsdangerous jinja2 joblib kiwisolver llvmlite mako markdown_it matplotlib mlflow
    mpl_toolkits multidict narwhals numba numpy opentelemetry packaging pandas PIL platformdirs prettytable psutil
    py4j pyarrow pyasn1 pycparser pydantic pydantic_core pygments pyparsing pyspark pytz requests rich scipy sklearn
    skops smmap sqlalchemy sqlparse starlette threadpoolctl typer typing_extensions typing_inspection urllib3
    uvicorn wcwidth werkzeug yaml yarl zipp
"""
LIBRARIES = tuple(_LIBRARIES.split())

MIN_CHARS = 40  # a shorter docstring says too little to be tagged
MIN_WORDS = 5
MIN_SUPPORT = 20  # documents; a rarer label is not kept
MIN_LIBRARIES = 3  # a word of module and class names is a topic when so many libraries use it

SCHEMA = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("labels", pa.list_(pa.string()))])

# Tests and copies of other libraries.
_SKIPPED_FOLDERS = re.compile(
    r"tests?|idle_test|_?vendor(ed)?|_?externals?|extern|third_party|array_api_(compat|extra|strict)|examples"
    r"|site-packages|dist-packages|__pycache__"
)
_SKIPPED_FILES = re.compile(r"test_.*|.*_tests?|tests?|conftest|setup|__main__|.*_pb2(_grpc)?")

# Words of a module path that name no topic.
_HOLLOW = """
    abc abstract api async base bases basic builtin builtins class classes common compat constants contrib core cpp
    default defaults definitions defs deprecated ext extras func funcs function functions generic global globals
    helper helpers impl init interface interfaces internal internals lib libs main make map method methods misc
    mixin mixins mod module modules new object objects old ops private property public py python shared spec src
    support tool tools type types util utilities utils version versions wrapper wrappers
"""
_HOLLOW_WORDS = frozenset(_HOLLOW.split())
_SAME_TOPIC = {
    **dict.fromkeys(("err", "exc", "exception", "exceptions"), "errors"),
    **dict.fromkeys(("plot", "plots"), "plotting"),
    **dict.fromkeys(("log", "logs", "logger", "loggers"), "logging"),
    **dict.fromkeys(("index", "indexing", "indexers"), "indexes"),
    **dict.fromkeys(("dist", "distns"), "distributions"),
}
_PROPERTY = re.compile(r"(.*_)?(property|attribute)")
_DEPRECATING = re.compile(r"_?deprecated?(_(cls|class|func|function|method|alias))?")
# At the margin only: below it the directive speaks of one argument.
_DEPRECATED_TEXT = re.compile(
    r"\A\W*deprecated\b|^\.\. deprecated::"
    r"|\bthis (function|method|class|module|property|attribute) (is|has been) (now )?deprecated\b",
    re.IGNORECASE | re.MULTILINE,
)
_SIGNATURE = re.compile(r"\s*(?:def |class )?(?:\w+\.)*(\w+)\(")
_AFTER_SIGNATURE = re.compile(r"[ \t]*(->[^:\n]*)?:?[ \t]*(\n|\Z)")
_NAME = re.compile(r"(`?)\b((?:[^\W\d]\w*\.)*)([^\W\d]\w*)(?=([`(]?))")


class Found(NamedTuple):
    """One docstring with the labels that its place in the source gives it."""

    doc_id: str
    text: str
    library: str
    labels: frozenset[str]
    words: frozenset[str]  # topics, if other libraries use them too


def build_corpus() -> pa.Table:
    """Corpus of this installation: doc_id (key), text, labels (sorted, no repeats); rows sorted by doc_id."""
    found, unreadable = _collect(_sources())
    corpus = _as_table(found)
    n_labels = len(set(corpus["labels"].combine_chunks().flatten().to_pylist()))
    log.info("corpus: %s documents, %s labels, %s unreadable files", f"{len(corpus):,}", f"{n_labels:,}", unreadable)
    return corpus


def write_corpus(path: str | os.PathLike) -> int:
    """Write the corpus as one Parquet file, complete or not at all, and return its number of documents."""
    path = Path(path)
    corpus = build_corpus()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as sink:
            pq.write_table(corpus, sink, compression="zstd")
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(corpus)


def _sources() -> Iterator[tuple[str, str, Path]]:
    """(library, module, file) of every source to read, in a fixed order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - _APPLICATIONS):
        for module, file in _modules(name, stdlib / name, stdlib / f"{name}.py"):
            yield STDLIB, module, file
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        places = sorted(spec.submodule_search_locations or [spec.origin or ""])
        for module, file in _modules(name, *map(Path, places)):
            yield name, module, file


def _modules(name: str, *places: Path) -> Iterator[tuple[str, Path]]:
    """(module, file) of the public modules of a package folder or of a single file; missing places hold none."""
    for place in places:
        if place.is_file() and place.suffix == ".py":
            yield name, place
        for folder, subfolders, files in os.walk(place):
            subfolders[:] = sorted(f for f in subfolders if f.isidentifier() and not _SKIPPED_FOLDERS.fullmatch(f))
            above = (name, *Path(folder).relative_to(place).parts)
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix == ".py" and stem.isidentifier() and not _SKIPPED_FILES.fullmatch(stem):
                    yield ".".join(above if stem == "__init__" else (*above, stem)), Path(folder, file)


def _collect(sources: Iterable[tuple[str, str, Path]]) -> tuple[list[Found], int]:
    """Everything found in the sources, and the number of files that could not be parsed."""
    found: list[Found] = []
    unreadable = 0
    was_enabled = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles, and searching them for some is a quarter of the time
    try:
        for library, module, file in sources:
            try:
                tree = _parsed(file)
            except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
                # MemoryError: what the parser says of an expression nested too deep for it
                log.debug("corpus: %s left out, it does not parse: %s", file, error)
                unreadable += 1
            else:
                found += _docstrings(tree, library, module)
    finally:
        if was_enabled:
            gc.enable()
    return found, unreadable


def _parsed(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        return ast.parse(file.read_bytes())


def _docstrings(tree: ast.Module, library: str, module: str) -> Iterator[Found]:
    """The public docstrings of one module, in source order."""
    text = ast.get_docstring(tree)
    if text:
        yield _found(text, library, module, (), {"module"})
    yield from _members(tree, library, module, ())
    yield from _added(tree, library, module)


def _members(node: ast.AST, library: str, module: str, owners: tuple[str, ...]) -> Iterator[Found]:
    for child in _definitions(node):
        if child.name.startswith("_"):
            continue
        path = (*owners, child.name)
        text = ast.get_docstring(child)
        if text:
            if isinstance(child, ast.ClassDef):
                labels = _class_labels(child)
            else:
                labels = _function_labels(child, inside_class=bool(owners))
            yield _found(text, library, module, path, labels)
        if isinstance(child, ast.ClassDef):
            yield from _members(child, library, module, path)


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Definitions directly in a body, also those under `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(child)


def _class_labels(node: ast.ClassDef) -> set[str]:
    labels = {"class"} | _deprecation(node)
    if any(name.endswith(("Error", "Exception", "Warning")) for name in (node.name, *map(_last_name, node.bases))):
        labels.add("exception")
    if any(child.name in ("__enter__", "__aenter__") for child in _definitions(node)):
        labels.add("context manager")
    return labels


def _function_labels(node: ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> set[str]:
    decorators = [_last_name(d) for d in node.decorator_list]
    kind = "function"
    if inside_class:
        kind = "property" if any(map(_PROPERTY.fullmatch, decorators)) else "method"
    labels = {kind} | _deprecation(node)
    if "contextmanager" in decorators or "asynccontextmanager" in decorators:
        labels.add("context manager")
    if isinstance(node, ast.AsyncFunctionDef):
        labels.add("async")
    return labels


def _deprecation(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """A decorator for one deprecated argument does not count: the object itself stays."""
    return {"deprecated"} if any(_DEPRECATING.fullmatch(_last_name(d)) for d in node.decorator_list) else set()


def _last_name(node: ast.expr) -> str:
    """`c` of `c`, `a.b.c` and `a.b.c(...)`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "attr", getattr(node, "id", ""))


def _added(tree: ast.Module, library: str, module: str) -> Iterator[Found]:
    """Docstrings of compiled objects, which numpy and scipy keep in `add_newdoc([place,] name, doc or members)`."""
    added = []
    for node in tree.body:
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            continue
        if _last_name(node.value.func) != "add_newdoc":
            continue
        try:
            *place, name, docs = map(ast.literal_eval, node.value.args)
        except ValueError:  # put together at run time
            continue
        home = place[0] if place else module.rpartition(".")[0]
        if home.split(".")[0] != library:  # numpy._typing has a function of the same name with other arguments
            continue
        for doc in docs if isinstance(docs, list) else [docs]:
            match doc:
                case str():
                    added.append((home, name, "", inspect.cleandoc(doc)))
                case (str(member), str(text)):
                    added.append((home, name, member, inspect.cleandoc(text)))
    classes = {(home, name) for home, name, member, _ in added if member}
    for home, name, member, text in added:
        if name.startswith("_") or member.startswith("_"):
            continue
        if member:
            kind = "method" if _SIGNATURE.match(text) else "property"
        else:
            kind = "class" if (home, name) in classes else "function"
        yield _found(text, library, home, (name, member) if member else (name,), {kind})


def _found(text: str, library: str, module: str, path: tuple[str, ...], labels: set[str]) -> Found:
    parts = module.split(".")
    doc_id = ".".join((*parts, *path))
    labels = labels | {library}
    if "deprecated" in text.lower() and _DEPRECATED_TEXT.search(text):
        labels.add("deprecated")
    if library == STDLIB:  # known by the name of the module; `_pydecimal` holds what `decimal` shows
        labels.add(re.sub(r"\A_(py)?", "", parts[0]))
        below = parts
    else:
        below = parts[1:]
        places = [part for part in map(_meaning, below) if part and part != library]
        labels.update(f"{library}.{part}" for part in places[:1])
    owners = path if "class" in labels else path[:-1]
    words = set(map(_topic, (*below, *owners))) - {""}
    return Found(doc_id, _without_name(text, parts, path), library, frozenset(labels), frozenset(words))


def _meaning(part: str) -> str:
    """The words of a module's name that say what it is about.

    >>> _meaning("_linprog_utils"), _meaning("_core"), _meaning("ImageFont")
    ('linprog', '', 'ImageFont')
    """
    words = (w for w in part.split("_") if len(w) > 1 and not re.fullmatch(r"v?\d+", w))
    return "_".join(w for w in words if w.lower() not in _HOLLOW_WORDS)


def _topic(part: str) -> str:
    topic = _meaning(part).lower()
    return _SAME_TOPIC.get(topic, topic)


def _without_name(text: str, parts: list[str], path: tuple[str, ...]) -> str:
    """The text without signature lines, and with an ellipsis where the object names itself.

    A plain word such as `count` is its name only where it is written as code.

    >>> _without_name("norm(x, ord=None)\\n\\nThe norm of x.\\n\\n>>> linalg.norm(x)", ["numpy", "linalg"], ("norm",))
    'The norm of x.\\n\\n>>> …(x)'
    """
    name = (*parts, *path)[-1]
    text = _without_signatures(text, name)
    if name in text:
        plain = name.isalpha() and name.islower()

        def hidden(match: re.Match) -> str:
            before, owner, last, after = match.groups()
            return f"{before}…" if last == name and (owner or before or after or not plain) else match[0]

        text = _NAME.sub(hidden, text)
    return text.strip().encode("utf-8", "replace").decode()  # a lone surrogate fits into no file


def _without_signatures(text: str, name: str) -> str:
    """Compiled and numpy-style docstrings open with `name(arguments) -> result`, once or several times."""
    while (opening := _SIGNATURE.match(text)) and opening[1] == name:
        depth, end = 1, opening.end()
        while depth and end < len(text):
            depth += (text[end] in "([{") - (text[end] in ")]}")
            end += 1
        rest = _AFTER_SIGNATURE.match(text, end)
        if depth or rest is None:  # prose: "norm(x) is the norm of x"
            break
        text = text[rest.end() :]
    return text


def _as_table(found: Iterable[Found], min_support: int = MIN_SUPPORT, min_libraries: int = MIN_LIBRARIES) -> pa.Table:
    """One row for each document that says enough and says it first, with the labels that enough documents have."""
    by_id: dict[str, Found] = {}
    for one in found:
        if len(one.text) >= MIN_CHARS and len(one.text.split()) >= MIN_WORDS:
            by_id.setdefault(one.doc_id, one)  # of overloads and property setters the first counts
    # inherited docstrings are copies: on both sides of a split they would measure memory, not learning
    by_text: dict[str, Found] = {}
    for doc_id in sorted(by_id):
        by_text.setdefault(by_id[doc_id].text, by_id[doc_id])
    documents = list(by_text.values())
    topics = _topics(documents, min_libraries)
    labels_of = [d.labels | {topics[word] for word in d.words if word in topics} for d in documents]
    support = Counter(label for of_one in labels_of for label in of_one)
    labels = [sorted(label for label in of_one if support[label] >= min_support) for of_one in labels_of]
    return pa.table([[d.doc_id for d in documents], [d.text for d in documents], labels], schema=SCHEMA)


def _topics(documents: list[Found], min_libraries: int) -> dict[str, str]:
    """Word -> topic, for the words that enough libraries use; `event` and `events` are one topic."""
    words = {word for d in documents for word in d.words}
    # not the shortest ones: `io` is not one `ios`
    topics = {word: f"{word}s" if len(word) > 2 and f"{word}s" in words else word for word in words}
    users = defaultdict(set)
    for d in documents:
        for word in d.words:
            users[topics[word]].add(d.library)
    return {word: topic for word, topic in topics.items() if len(users[topic]) >= min_libraries}
