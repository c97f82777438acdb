"""Users' input files, or objects of a store by their URI -> Arrow record batches, without Spark.

    plan(path)         -> which files, each with size and SHA-256, cut into splits of about equal size
    read_split(split)  -> record batches of RAW_SCHEMA, one row per record of the split, accepted or rejected

A record is accepted, or rejected with a reason; none is dropped.  What cannot be read to its end fails as a whole.
The reasons: invalid_utf8, nul_character, surrogate, malformed_json, duplicate_key, non_finite, number_range, too_deep,
not_an_object, type_error:<role>, malformed_csv, ragged_row, unclosed_quote, record_too_large, document_too_large,
missing_doc_id, missing_text, too_many_labels, label_too_long, unknown_split.
"""

import csv
import errno
import glob
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from io import BufferedReader
from itertools import count, pairwise
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, InputError, PermissionError_, StorageError, TagmillError, shown

RAW_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("position", pa.int64()),  # JSON Lines: offset of the line in the decompressed file; else record number, from 0
        ("doc_id", pa.string()),
        ("text", pa.string()),
        ("labels", pa.list_(pa.string())),  # sorted, distinct; null where there is no such column or key
        ("split", pa.string()),  # train, dev, test or null
        ("reason", pa.string()),  # null: accepted
        ("sample", pa.string()),  # of a rejected record: its first 200 bytes, escaped
        ("label_repairs", pa.int32()),  # given label strings that were stripped, dropped as empty, or collapsed
    ]
)

EXPECTED = ".parquet, .jsonl/.json/.ndjson, .csv, .tsv, each plain, .gz or .zst"
EXTENSIONS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes: names are often wrong
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst")
ENCODINGS = {  # UTF-32 first: its mark begins with that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}

CHUNK = 1 << 20  # bytes per read
BATCH_ROWS = 1024
BATCH_BYTES = 16 << 20  # of text
DICTIONARY_BYTES = 512 << 20  # most that dictionary-encoded text of Parquet may unfold to at once
SAMPLE_BYTES = 200
MAX_DEPTH = 100  # of nesting in JSON; far below the interpreter's limit, which depends on the caller's stack
FIRST_RECORDS = 100  # of JSON Lines, looked at for missing columns
FIRST_BYTES = 16 << 20
MESSAGES = 10  # different discrepancies spelled out in one error

Row = tuple[Any, ...]  # the columns of RAW_SCHEMA after `file`


@dataclass(frozen=True)
class SourceFormat:
    """Where the columns are and what a record may hold.  Any object with these attributes will do."""

    doc_id: str = "doc_id"
    text: tuple[str, ...] = ("text",)  # several are joined by a line feed
    labels: str | None = "labels"
    split: str | None = "split"
    label_separator: str = "|"  # where labels are one string
    format: str = "auto"  # or parquet, jsonl, csv, tsv: whatever the files' names say
    max_document_bytes: int = 20_000_000  # UTF-8
    max_labels_per_document: int = 1000
    max_label_bytes: int = 1000  # UTF-8


@dataclass(frozen=True)
class Split:
    """A part of a file: row groups [start, stop) of Parquet; of uncompressed JSON Lines the lines whose first byte lies
    in the bytes [start, stop); else the whole file.
    """

    file: str
    format: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What is read, in an order that depends on the paths only."""

    splits: tuple[Split, ...]
    files: tuple[tuple[str, int, str], ...]  # path, bytes, SHA-256
    ignored: tuple[tuple[str, str], ...]  # path, reason


class _Unfit(Exception):
    """A file that cannot be used; the arguments are its problems, to be said after its name."""


class _Ignored(Exception):
    """A file that is no input."""


class _Rejected(Exception):
    """`note` goes before the sample: a size, a line number."""

    def __init__(self, reason: str, value: bytes = b"", note: str = ""):
        super().__init__(reason)
        self.reason, self.value, self.note = reason, value, note


class _TooLarge(Exception):
    """The CSV record at hand has run over the limit."""


def plan(path: str, fmt: Any, target_bytes: int = 64 << 20, need_labels: bool = True) -> Plan:
    """The files under `path` (file, folder or glob) and their splits.  Each file is hashed and its columns checked."""
    if need_labels and not fmt.labels:
        raise ConfigError(
            "input.labels is empty; expected the name of a column, as this command learns from labels; set it"
        )
    try:
        candidates, ignored = _listed(path)
    except OSError as error:
        raise _in_our_words(path, error) from error

    def examined(file: str) -> tuple[list[Split], tuple[str, int, str]] | _Unfit | _Ignored:
        try:
            return _examined(file, fmt, target_bytes, need_labels)
        except (_Unfit, _Ignored) as found:
            return found
        except OSError as error:
            if error.errno is None:
                return _Unfit(_damage(error))
            raise _in_our_words(file, error) from error

    splits, files = [], []
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:  # hashing and footers leave the interpreter free
        for file, found in zip(candidates, pool.map(examined, candidates), strict=True):
            if isinstance(found, _Ignored):
                ignored.append((file, str(found)))
            elif isinstance(found, _Unfit):
                for problem in found.args:
                    problems.setdefault(problem, []).append(file)
            else:
                splits += found[0]
                files.append(found[1])
    if problems:
        raise InputError(_all_problems(problems))
    if not files:
        reasons = ", ".join(sorted({reason for _, reason in ignored}))
        aside = f" ({len(ignored)} ignored: {reasons})" if ignored else ""
        raise InputError(f"{_name(path)} holds no readable file{aside}; expected {EXPECTED}")
    return Plan(tuple(splits), tuple(files), tuple(sorted(ignored)))


def read_split(split: Split, fmt: Any) -> Iterator[pa.RecordBatch]:
    """Batches of RAW_SCHEMA: at most 1024 rows, and 16 MB of text unless one document is larger."""
    try:
        with storage.opened(split.file) as file:
            if split.format == "parquet":
                yield from _parquet_batches(file, split, fmt)
            else:
                rows = _json_rows if split.format == "jsonl" else _csv_rows
                yield from _batches(split.file, rows(file, split, fmt))
                size = storage.size(split.file)
                if size < split.stop:
                    raise _Unfit(f"has {size} bytes, {split.stop} were expected: it was cut while in use; run again")
    except _Unfit as unfit:
        raise InputError(f"{_name(split.file)} {'; '.join(unfit.args)}") from unfit.__cause__
    except OSError as error:
        raise _in_our_words(split.file, error) from error


def refuse_changed(plan: Plan) -> None:
    """Raise InputError where a file has not the content any more that was planned: a mixture may have been read."""
    read = {split.file for split in plan.splits}
    marks = {path: mark for path, _, mark in plan.files if path in read}

    def mark_of(path: str) -> str:
        try:
            with storage.opened(path) as file:
                return _digest(file)
        except OSError as error:
            raise _in_our_words(path, error) from error

    with ThreadPoolExecutor() as pool:
        for path, now in zip(marks, pool.map(mark_of, marks), strict=True):
            if now != marks[path]:
                raise InputError(f"{_name(path)} changed while it was read; run again when nobody writes to it")


# Which files


def _listed(path: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Files that may be input, sorted, and what is ignored."""
    if storage.is_uri(path):
        return _listed_objects(path)
    # absolute: an executor has another working directory
    path = os.path.abspath(path.removeprefix("file://"))
    found: set[str] = set()
    ignored: dict[str, str] = {}
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        matches = glob.glob(path, recursive=True, include_hidden=True)
        if not matches:
            raise
        base = os.path.dirname(re.split(r"[*?[]", path)[0])
        for match in matches:
            _gather(match, os.path.relpath(match, base).split(os.sep), found, ignored)
    else:
        if stat.S_ISREG(mode):
            found.add(path)  # named by the user: read whatever its name begins with
        else:
            _gather(path, [], found, ignored)
    return sorted(found), list(ignored.items())


def _listed_objects(uri: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The same of objects, whose names begin with `uri` or match it."""
    found, ignored = [], {}
    for name, below in storage.objects(uri):
        if any(part.startswith(("_", ".")) for part in below):
            ignored[name] = "hidden"
        elif name.lower().endswith((".crc", ".tmp")):
            ignored[name] = "left by another program"
        else:
            found.append(name)
    if not found and not ignored:
        raise FileNotFoundError(errno.ENOENT, "no such object", uri)
    return sorted(found), list(ignored.items())


def _gather(path: str, names: list[str], found: set[str], ignored: dict[str, str]) -> None:
    """Add what is at `path` and below; `names` are the parts of the path that the user did not write."""
    if any(name.startswith(("_", ".")) for name in names):
        ignored[path] = "hidden"
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        ignored[path] = "broken link"
        return
    if stat.S_ISDIR(mode):
        if names and os.path.islink(path):
            ignored[path] = "link to a folder"  # it may lead back here
            return
        for name in os.listdir(path):
            _gather(os.path.join(path, name), [name], found, ignored)
    elif not stat.S_ISREG(mode):
        ignored[path] = "not a regular file"
    elif path.lower().endswith((".crc", ".tmp")):
        ignored[path] = "left by another program"
    else:
        found.add(path)


def _examined(path: str, fmt: Any, target: int, need_labels: bool) -> tuple[list[Split], tuple[str, int, str]]:
    with storage.opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        kind = _kind(path, file, size, fmt.format)
        file.seek(0)
        digest = _digest(file)
        file.seek(0)
        if kind == "parquet":
            metadata = _parquet_checked(file, fmt, need_labels).metadata
            ranges = _row_group_ranges(metadata, target)
        elif kind == "jsonl":
            step = size if _compression(file) else target
            ranges = [(start, min(start + step, size)) for start in range(0, size, step)]
            _check_json_head(file, fmt, need_labels)
        else:
            _csv_header(_CsvLines(_stream(file), fmt), _delimiter(kind), fmt, need_labels)
            ranges = [(0, size)] if size else []
    return [Split(path, kind, start, stop) for start, stop in ranges], (path, size, digest)


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: str, file: BinaryIO, size: int, given: str) -> str:
    name = os.path.basename(path).lower()
    if name.endswith(ARCHIVES):
        raise _Ignored("an archive")
    stem, extension = os.path.splitext(name)
    if extension in (".gz", ".zst"):
        extension = os.path.splitext(stem)[1]
    kind = EXTENSIONS.get(extension) if given == "auto" else given
    file.seek(0)
    is_parquet = file.read(4) == b"PAR1" and file.seek(max(0, size - 4)) > 4 and file.read(4) == b"PAR1"
    if given == "auto" and is_parquet:
        return "parquet"
    if kind is None:
        raise _Ignored("unknown kind of file")
    if kind == "parquet" and not is_parquet:
        what = f"does not begin and end as a Parquet file does ({size} bytes)" if size else "has 0 bytes"
        raise _Unfit(f"{what}; expected a whole Parquet file that is not compressed again; write it anew or remove it")
    return kind


def _row_group_ranges(metadata: pq.FileMetaData, target: int) -> list[tuple[int, int]]:
    """Neighbouring row groups together as long as they hold at most `target` bytes."""
    cuts, held = [0], 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if group > cuts[-1] and held + size > target:
            cuts.append(group)
            held = 0
        held += size
    return [*pairwise(cuts), (cuts[-1], metadata.num_row_groups)] if metadata.num_row_groups else []


def _column_problems(
    fmt: Any, need_labels: bool, found: list[str], types: dict[str, pa.DataType] | None
) -> tuple[str, ...]:
    """What is wrong with a file's columns.  `types` is None where every value is checked as it is read."""
    roles = [("doc_id", fmt.doc_id, True), *(("text", name, True) for name in fmt.text)]
    roles += [("labels", fmt.labels, need_labels), ("split", fmt.split, False)]
    problems = []
    for role, name, required in roles:
        if required and name not in found:
            columns = ", ".join(shown(column) for column in found[:30]) + (", ..." if len(found) > 30 else "")
            problems.append(
                f"has no column '{shown(name)}', its columns are {columns}; set input.{role} to one of them"
            )
        elif found.count(name) > 1:
            problems.append(f"has {found.count(name)} columns '{shown(name)}'; expected one; rename the others")
        elif types and name in types and not _is_fit(role, types[name]):
            problems.append(
                f"has a column '{shown(name)}' of {shown(types[name])}; expected {_WANTED[role]}; "
                f"convert it or set input.{role} to another"
            )
    return tuple(problems)


_WANTED = {
    "doc_id": "strings or integers",
    "text": "strings",
    "labels": "lists of strings, or strings with a separator",
    "split": "strings",
}


def _is_fit(role: str, kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind) or _is_string(kind):
        return True
    if role == "labels":
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and _is_fit("label", kind.value_type)
    return role == "doc_id" and pa.types.is_integer(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# Errors


def _in_our_words(path: str, error: OSError) -> TagmillError:
    name = _name(error.filename or path)
    if isinstance(error, PermissionError):
        return PermissionError_(f"{name} may not be read by this user; expected read permission; change it with chmod")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError(f"{name}: no such file or folder, no file matches it; expected {EXPECTED}; check the path")
    if error.errno is None:  # Arrow's decompressors
        return InputError(f"{name} {_damage(error)}")
    return StorageError(f"{name} could not be read: {error.strerror}; expected a healthy disk or mount; then run again")


def _damage(error: BaseException) -> str:
    return f"is damaged ({shown(str(error).strip(), 200)}); expected a whole file; write it anew or remove it"


def _all_problems(problems: dict[str, list[str]]) -> str:
    said = [
        f"{_name(files[0])}{f' (and {len(files) - 1} more)' if len(files) > 1 else ''} {problem}"
        for problem, files in problems.items()
    ]
    return "; ".join(said[:MESSAGES]) + (f"; and {len(said) - MESSAGES} more" if len(said) > MESSAGES else "")


def _name(path: str) -> str:
    return shown(path, 1000)


def _sample(value: bytes, note: str) -> str:
    head = shown(value[:SAMPLE_BYTES].decode("utf-8", "backslashreplace"), 10 * SAMPLE_BYTES)
    return f"{note}: {head}" if note else head


# One record: the rules in the order in which they are told


def _row(
    fmt: Any,
    position: int,
    doc_id: Any,
    texts: list[Any],
    labels: list[Any] | None,
    split: Any,
    raw: bytes | None = None,
) -> Row:
    """Strings may be given as bytes.  `raw` is the record for the sample; without it the value at fault is shown."""
    name = None
    try:
        name = _doc_id(doc_id)
        text = _text(texts, fmt)
        kept, repairs = _labels(labels, fmt)
        part = _split(split)
    except _Rejected as rejected:
        return _rejected_row(position, rejected, raw, name)
    return position, name, text, kept, part, None, None, repairs


def _rejected_row(position: int, rejected: _Rejected, raw: bytes | None, doc_id: bytes | None = None) -> Row:
    sample = _sample(rejected.value if raw is None else raw, rejected.note)
    return position, doc_id, None, None, None, rejected.reason, sample, 0


def _utf8(value: Any, role: str) -> bytes:
    if isinstance(value, str):
        try:
            data = value.encode()
        except UnicodeEncodeError:
            raise _Rejected("surrogate", value.encode("utf-8", "backslashreplace")) from None
    elif isinstance(value, bytes):
        data = value
        try:
            data.decode()
        except UnicodeDecodeError:
            raise _Rejected("invalid_utf8", data) from None
    else:
        raise _Rejected(f"type_error:{role}", repr(value)[:SAMPLE_BYTES].encode())
    if b"\0" in data:
        raise _Rejected("nul_character", data)
    return data


def _doc_id(value: Any) -> bytes:
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%d" % value
    if value is None:
        raise _Rejected("missing_doc_id")
    data = _utf8(value, "doc_id")
    if not data.decode().strip():
        raise _Rejected("missing_doc_id", data)
    return data


def _text(values: list[Any], fmt: Any) -> bytes:
    parts = [value for value in values if value is not None]
    if not parts:
        raise _Rejected("missing_text")
    text = b"\n".join([_utf8(part, "text") for part in parts])
    if len(text) > fmt.max_document_bytes:
        raise _Rejected("document_too_large", text[:SAMPLE_BYTES], f"{len(text)} bytes")
    return text


def _labels(given: Any, fmt: Any) -> tuple[list[bytes] | None, int]:
    if given is None:
        return None, 0
    if not isinstance(given, list):
        raise _Rejected("type_error:labels", repr(given)[:SAMPLE_BYTES].encode())
    strings = [_utf8(value, "labels") for value in given if value is not None]
    kept = {label for string in strings if (label := _label(string, fmt))}
    if len(kept) > fmt.max_labels_per_document:
        raise _Rejected("too_many_labels", note=f"{len(kept)} labels")
    return sorted(kept), len(given) - len(kept.intersection(strings))


def _label(string: bytes, fmt: Any) -> bytes:
    label = string.decode().strip().encode()
    if len(label) > fmt.max_label_bytes:
        raise _Rejected("label_too_long", label, f"{len(label)} bytes")
    return label


def _split(value: Any) -> str | None:
    if value is None:
        return None
    data = _utf8(value, "split")
    if data and data.decode() not in SPLITS:
        raise _Rejected("unknown_split", data)
    return SPLITS.get(data.decode())


def _batches(file: str, rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    held: list[Row] = []
    size = 0
    for row in rows:
        length = len(row[2] or b"")
        if held and (len(held) == BATCH_ROWS or size + length > BATCH_BYTES):
            yield _batch(file, held)
            held, size = [], 0
        held.append(row)
        size += length
    if held:
        yield _batch(file, held)


def _batch(file: str, rows: list[Row]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    kinds = RAW_SCHEMA.types[1:]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays([_file_column(file, len(rows)), *arrays], schema=RAW_SCHEMA)


def _file_column(file: str, rows: int) -> pa.Array:
    # a path may hold bytes that are no UTF-8
    return pa.array([file.encode("utf-8", "backslashreplace")] * rows, pa.string())


# Lines of text


def _stream(file: BinaryIO) -> Any:
    """`file` from its beginning, decompressed if its first bytes say so."""
    codec = _compression(file)
    return file if codec is None else pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)


def _compression(file: BinaryIO) -> str | None:
    head = file.read(4)
    file.seek(0)
    return next((codec for magic, codec in COMPRESSIONS.items() if head.startswith(magic)), None)


def _lines(stream: Any, offset: int, limit: int) -> Iterator[tuple[int, bytes, int, int]]:
    """(offset, line, its size, quotes left out) of each line; of one over `limit` bytes only the beginning is held."""
    parts: list[bytes] = []
    size = left_out = 0
    while chunk := stream.read(CHUNK):
        pieces = chunk.split(b"\n")
        for number, piece in enumerate(pieces, 1):
            if size <= limit:
                parts.append(piece)
            else:
                left_out += piece.count(b'"')
            size += len(piece)
            if number < len(pieces):
                yield offset, _unmarked(offset, b"".join(parts)), size, left_out
                offset += size + 1
                parts, size, left_out = [], 0, 0
    if size:
        yield offset, _unmarked(offset, b"".join(parts)), size, left_out


def _unmarked(offset: int, line: bytes) -> bytes:
    """`line` without the byte order mark that may open a file."""
    if offset:
        return line
    for mark, encoding in ENCODINGS.items():
        if line.startswith(mark):
            raise _Unfit(f"is encoded in {encoding}; expected UTF-8; convert it (iconv -f {encoding} -t UTF-8)")
    return line.removeprefix(b"\xef\xbb\xbf")


def _record_limit(fmt: Any) -> int:
    return fmt.max_document_bytes * 11 // 10 + (1 << 20)


# JSON Lines


def _json_lines(file: BinaryIO, start: int, stop: float, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """(offset, line, size) of the lines that begin in the bytes [start, stop) and are not blank."""
    if start:
        file.seek(start - 1)
        # the line that holds the byte before `start` is another split's; it is empty here where one begins at `start`
        lines = _lines(file, start - 1, limit)
        next(lines, None)
    else:
        lines = _lines(_stream(file), 0, limit)
    for offset, line, size, _ in lines:
        if offset >= stop:
            return
        if line and not line.isspace():
            yield offset, line, size


def _json_rows(file: BinaryIO, split: Split, fmt: Any) -> Iterator[Row]:
    limit = _record_limit(fmt)
    stop = math.inf if _compression(file) else split.stop
    for offset, line, size in _json_lines(file, split.start, stop, limit):
        try:
            if size > limit:
                raise _Rejected("record_too_large", note=f"{size} bytes")
            record = _parsed(line)
            labels = _json_labels(record, fmt)
        except _Rejected as rejected:
            yield _rejected_row(offset, rejected, line)
        else:
            texts = [record.get(name) for name in fmt.text]
            yield _row(fmt, offset, record.get(fmt.doc_id), texts, labels, record.get(fmt.split), line)


def _json_labels(record: dict[str, Any], fmt: Any) -> Any:
    if fmt.labels not in record:
        return None
    return [] if record[fmt.labels] is None else record[fmt.labels]


def _parsed(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise _Rejected("nul_character")
    try:
        record = _JSON.decode(line.decode())
    except UnicodeDecodeError:
        raise _Rejected("invalid_utf8") from None
    except RecursionError:
        raise _Rejected("too_deep") from None
    except json.JSONDecodeError:
        raise _Rejected("malformed_json") from None
    except ValueError:  # an integer of more digits than Python converts
        raise _Rejected("number_range") from None
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(record) > MAX_DEPTH:
        raise _Rejected("too_deep")
    if not isinstance(record, dict):
        raise _Rejected("not_an_object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _Rejected("duplicate_key")
    return record


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Rejected("non_finite")
    return number


def _constant(_: str) -> NoReturn:
    raise _Rejected("non_finite")


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_constant)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        level = [item for item in level if isinstance(item, dict | list)]
        depth += bool(level)
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _check_json_head(file: BinaryIO, fmt: Any, need_labels: bool) -> None:
    """Refuse a file whose first records all lack a column."""
    limit = _record_limit(fmt)
    keys: dict[str, None] = {}
    for number, (offset, line, size) in enumerate(_json_lines(file, 0, math.inf, limit)):
        if number == FIRST_RECORDS or offset > FIRST_BYTES:
            break
        try:
            keys |= dict.fromkeys(_parsed(line) if size <= limit else ())
        except _Rejected:
            continue
    if keys and (problems := _column_problems(fmt, need_labels, list(keys), None)):
        raise _Unfit(*problems)


# CSV and TSV


class _CsvLines:
    """Lines for csv.reader.  Holds the record at hand, and ends it where it grows over the limit."""

    def __init__(self, stream: Any, fmt: Any):
        self.limit = _record_limit(fmt)
        self.lines = _lines(stream, 0, self.limit)
        self.number = 0
        self.ended = False
        self.begin()

    def begin(self) -> None:
        self.raw: list[bytes] = []
        self.first, self.size, self.quotes = self.number + 1, 0, 0
        self.is_utf8 = True

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = self._taken()
        if self.size > self.limit:
            raise _TooLarge
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode("utf-8", "surrogateescape") + "\n"

    def _taken(self) -> bytes:
        try:
            _, line, size, left_out = next(self.lines)
        except StopIteration:
            self.ended = True
            raise
        self.number += 1
        self.size += size + 1
        self.quotes += line.count(b'"') + left_out
        if not self.raw or self.size <= self.limit:
            self.raw.append(line)
        return line

    def skip_record(self) -> None:
        """To the end of a record that is too large: the first line after which no quote is open."""
        while self.quotes % 2:
            try:
                self._taken()
            except StopIteration:
                # one reject must not stand for any number of records
                raise _Unfit(
                    f"has a quote in the record at line {self.first} that is still open at the end of the file, "
                    f"{self.size} bytes later; expected quotes in pairs (RFC 4180); close it or double it"
                ) from None

    def place(self) -> str:
        return f"line {self.first}, {self.size} bytes"


def _delimiter(kind: str) -> str:
    return "\t" if kind == "tsv" else ","


def _csv_reader(lines: _CsvLines, delimiter: str) -> Any:
    csv.field_size_limit(max(csv.field_size_limit(), lines.limit + CHUNK))  # _CsvLines has the limit that counts
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_header(lines: _CsvLines, delimiter: str, fmt: Any, need_labels: bool) -> list[str]:
    """Names of the columns; none if the file is empty."""
    reader = _csv_reader(lines, delimiter)
    names: list[str] = []
    try:
        while not names and not lines.ended:
            lines.begin()
            names = next(reader, [])
    except (csv.Error, _TooLarge):
        raise _Unfit("has a first line that is no CSV; expected the names of the columns; put them there") from None
    if not lines.is_utf8:
        raise _Unfit("has a header that is not UTF-8; expected UTF-8; convert it")
    twice = sorted({shown(name) for name in names if names.count(name) > 1})
    if twice:
        raise _Unfit(f"has columns of the same name ({', '.join(twice)}); expected each name once; rename them")
    if names and (problems := _column_problems(fmt, need_labels, names, None)):
        raise _Unfit(*problems)
    return names


def _csv_rows(file: BinaryIO, split: Split, fmt: Any) -> Iterator[Row]:
    lines = _CsvLines(_stream(file), fmt)
    delimiter = _delimiter(split.format)
    names = _csv_header(lines, delimiter, fmt, need_labels=False)
    reader = _csv_reader(lines, delimiter)
    for position in count():
        try:
            cells = _csv_cells(reader, lines)
            if cells is None:
                return
            if not lines.is_utf8:
                raise _Rejected("invalid_utf8", note=lines.place())
            if len(cells) != len(names):
                raise _Rejected("ragged_row", note=f"{lines.place()}, {len(cells)} cells")
        except _Rejected as rejected:
            yield _rejected_row(position, rejected, b"\n".join(lines.raw))
        else:
            record = dict(zip(names, cells, strict=True))
            labels = None
            if fmt.labels in record:
                labels = record[fmt.labels].split(fmt.label_separator) if record[fmt.labels] else []
            texts = [record[name] for name in fmt.text]
            raw = b"\n".join(lines.raw)
            yield _row(fmt, position, record[fmt.doc_id], texts, labels, record.get(fmt.split), raw)


def _csv_cells(reader: Any, lines: _CsvLines) -> list[str] | None:
    """The next record; None at the end of the file."""
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except _TooLarge:
            lines.skip_record()
            raise _Rejected("record_too_large", note=lines.place()) from None
        except csv.Error:  # the next line begins a record again
            raise _Rejected("unclosed_quote" if lines.ended else "malformed_csv", note=lines.place()) from None
        if cells != []:  # a blank line
            return cells


# Parquet


def _parquet_checked(file: BinaryIO, fmt: Any, need_labels: bool) -> pq.ParquetFile:
    try:
        # a buffer: else a whole column of a row group is held at once
        parquet = pq.ParquetFile(file, buffer_size=CHUNK, page_checksum_verification=True)
        schema = parquet.schema_arrow
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _unless_os(error, _damage(error)) from error
    problems = _column_problems(fmt, need_labels, schema.names, dict(zip(schema.names, schema.types, strict=True)))
    if problems:
        raise _Unfit(*problems)
    return parquet


def _unless_os(error: BaseException, problem: str) -> Exception:
    return error if isinstance(error, OSError) and error.errno is not None else _Unfit(problem)


def _parquet_batches(file: BinaryIO, split: Split, fmt: Any) -> Iterator[pa.RecordBatch]:
    parquet = _parquet_checked(file, fmt, need_labels=False)
    metadata = parquet.metadata
    if metadata.num_row_groups < split.stop:
        raise _Unfit(f"has {metadata.num_row_groups} row groups, {split.stop} were planned: it was replaced; run again")
    wanted = dict.fromkeys((fmt.doc_id, *fmt.text, fmt.labels, fmt.split))
    columns = [name for name in wanted if name in parquet.schema_arrow.names]
    position = sum(metadata.row_group(group).num_rows for group in range(split.start))
    for group in range(split.start, split.stop):
        end = position + metadata.row_group(group).num_rows
        # one row first: a read refuses a damaged footer, whereas asking for its column metadata may abort the process
        _next_batch(parquet.iter_batches(1, row_groups=[group], columns=columns, use_threads=False), group)
        rows = _rows_at_once(file, parquet, group, fmt)
        batches = parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
        while (batch := _next_batch(batches, group)) is not None:
            for part in _slices(batch, fmt):
                yield _checked(part, fmt, split.file, position)
                position += part.num_rows
        if position != end:
            raise _Unfit(f"row group {group} " + _damage(ValueError(f"{end - position} rows are missing")))


def _next_batch(batches: Iterator[pa.RecordBatch], group: int) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _unless_os(error, f"row group {group} {_damage(error)}") from error


def _rows_at_once(file: BinaryIO, parquet: pq.ParquetFile, group: int, fmt: Any) -> int:
    """Rows per read that keep memory bounded, also where a long text stands in many rows but once in the file."""
    metadata = parquet.metadata.row_group(group)
    size = repeated = 0
    for index in range(len(parquet.schema)):
        if parquet.schema.column(index).path in fmt.text:
            size += metadata.column(index).total_uncompressed_size
            repeated += _dictionary_bytes(file, metadata.column(index))
    rows = min(4 * BATCH_BYTES * metadata.num_rows // max(1, size), DICTIONARY_BYTES // max(1, repeated))
    return max(1, min(BATCH_ROWS, rows))


def _dictionary_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """Uncompressed size of the dictionary page; no repeated value is longer.  Only the page's own header has it."""
    if not column.has_dictionary_page:
        return 0
    at = file.tell()
    file.seek(column.dictionary_page_offset)
    header = file.read(8)
    file.seek(at)
    if header[:3] != b"\x15\x04\x15":  # compact Thrift: field 1, an integer, type 2 (dictionary); field 2, an integer
        return column.total_uncompressed_size
    size = 0
    for place, byte in enumerate(header[3:]):
        size |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return size >> 1


def _slices(batch: pa.RecordBatch, fmt: Any) -> Iterator[pa.RecordBatch]:
    """Parts of at most BATCH_BYTES of text, or one document."""
    for name in fmt.text:
        batch = batch.set_column(batch.schema.get_field_index(name), name, _plain(batch[name]))
    lengths = reduce(pc.add, [pc.binary_length(batch[name]).cast(pa.int64()).fill_null(0) for name in fmt.text])
    if (pc.sum(lengths).as_py() or 0) <= BATCH_BYTES:
        yield batch
        return
    start = size = 0
    for index, length in enumerate(lengths.to_pylist()):
        if index > start and size + length > BATCH_BYTES:
            yield batch.slice(start, index - start)
            start, size = index, 0
        size += length
    yield batch.slice(start)


def _plain(array: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    return array


def _checked(batch: pa.RecordBatch, fmt: Any, file: str, position: int) -> pa.RecordBatch:
    """Columns as in RAW_SCHEMA.  Whole columns are tested; rows that fail a test go to `_row`, which has the rules."""
    rows = batch.num_rows
    doc_id = _plain(batch[fmt.doc_id]).cast(pa.string())
    text = _joined([batch[name] for name in fmt.text])
    split = pa.nulls(rows, pa.string())
    if fmt.split in batch.schema.names:
        split = _plain(batch[fmt.split]).cast(pa.string())
    given = None
    labels = pa.nulls(rows, pa.list_(pa.string()))
    repairs, odd = pa.array([0] * rows, pa.int32()), pa.array([False] * rows)
    if fmt.labels in batch.schema.names:
        given = _label_lists(batch[fmt.labels], fmt)
        labels, repairs, odd = _kept_labels(given, fmt)

    if all(map(_is_utf8, (doc_id, text, split))):
        tests = [
            odd,
            pc.is_null(doc_id),
            pc.equal(pc.binary_length(pc.utf8_trim_whitespace(doc_id)), 0),
            pc.match_substring(doc_id, "\0"),
            pc.is_null(text),
            pc.greater(pc.binary_length(text), fmt.max_document_bytes),
            pc.invert(pc.is_in(split, pa.array([*SPLITS, "", None], pa.string()))),
        ]
        if _may_hold_nul(text):
            tests.append(pc.match_substring(text, "\0"))
        odd = reduce(pc.or_kleene, tests)
    else:
        odd = pa.array([True] * rows)

    places = pc.indices_nonzero(odd).to_pylist()
    arrays = [
        _file_column(file, rows),
        pa.array(range(position, position + rows), pa.int64()),
        doc_id,
        text,
        labels,
        pc.take(pa.array(SPLITS.values()), pc.index_in(split, pa.array(SPLITS.keys()))),
        pa.nulls(rows, pa.string()),
        pa.nulls(rows, pa.string()),
        repairs,
    ]
    if places or text.type != pa.string():  # copied: a part of a long column has offsets of more than 32 bits
        arrays = [array.filter(pc.invert(odd)) for array in arrays]
    arrays[3] = arrays[3].cast(pa.string())
    accepted = pa.RecordBatch.from_arrays(arrays, schema=RAW_SCHEMA)
    if not places:
        return accepted
    doc_id, text, split = (array.cast(_binary(array.type)) for array in (doc_id, text, split))
    others = [
        _row(fmt, position + i, doc_id[i].as_py(), [text[i].as_py()], _raw_labels(given, i), split[i].as_py())
        for i in places
    ]
    return pa.concat_batches([accepted, _batch(file, others)]).sort_by("position")


def _binary(kind: pa.DataType) -> pa.DataType:
    return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()


def _joined(texts: list[pa.Array]) -> pa.Array:
    """Those of a row that are not null, with a line feed between."""
    if len(texts) == 1:
        return texts[0]

    def pair(left: pa.Array, right: pa.Array) -> pa.Array:
        # null_handling="skip" would do, but gives no value at all for a row of nulls: the rows after it move up
        both = pc.binary_join_element_wise(left, right, pa.scalar("\n", pa.large_string()))
        return pc.coalesce(both, left, right)

    return reduce(pair, [text.cast(pa.large_string()) for text in texts])


def _is_utf8(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _may_hold_nul(array: pa.Array) -> bool:
    """Six times faster than a search per string, which is then rarely needed."""
    data = array.buffers()[2]
    return data is not None and re.search(b"\0", data) is not None


def _label_lists(column: pa.Array, fmt: Any) -> pa.Array:
    column = _plain(column)
    if _is_string(column.type):
        column = column.cast(pa.string())
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        column = pc.split_pattern(column, fmt.label_separator)
    return column.cast(pa.list_(pa.string()))


def _raw_labels(lists: pa.Array | None, row: int) -> list[bytes | None] | None:
    if lists is None:
        return None
    strings = lists[row].values
    return [] if strings is None else strings.cast(pa.binary()).to_pylist()


def _kept_labels(lists: pa.Array, fmt: Any) -> tuple[pa.Array, pa.Array, pa.Array]:
    """What `_labels` does, for a column: labels kept, repairs, and the rows that `_row` has to judge."""
    encoded = lists.flatten().dictionary_encode(null_encoding="encode")
    kept, at_fault = _kept_strings(encoded.dictionary, fmt)
    names = kept.drop_null().unique().sort()
    rank = pc.index_in(kept, names).take(encoded.indices)
    # not list_parent_indices: of a list that is null it counts values too where a file has any
    row = pa.array(np.repeat(np.arange(len(lists)), pc.list_value_length(lists).fill_null(0).to_numpy()))
    # (row, label) as one number, and 0 as the first label of every row, so that none is without
    width = len(names) + 1
    firsts = pc.multiply(pa.array(range(len(lists)), pa.int64()), width)
    keys = pc.add(pc.multiply(row, width), pc.add(rank.cast(pa.int64()), 1))

    def by_row(keys: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Distinct labels of the rows, row by row in order, and how many each row has."""
        keys = pa.concat_arrays([firsts, keys.drop_null()]).unique().sort()
        rows = pc.divide(keys, width)
        labels = pc.subtract(pc.subtract(keys, pc.multiply(rows, width)), 1)
        counts = pc.subtract(rows.value_counts().field("counts"), 1)
        return labels.filter(pc.greater_equal(labels, 0)), counts

    labels, counts = by_row(keys)
    untouched = pc.equal(kept, encoded.dictionary).take(encoded.indices)
    counts_untouched = counts if pc.all(untouched).as_py() else by_row(keys.filter(untouched))[1]
    repairs = pc.subtract(pc.list_value_length(lists).fill_null(0), counts_untouched)
    odd = pc.greater(counts, fmt.max_labels_per_document)
    if pc.any(at_fault).as_py():
        rows_at_fault = row.filter(at_fault.take(encoded.indices))
        odd = pc.or_(odd, pc.is_in(pa.array(range(len(lists)), pa.int64()), rows_at_fault))
    ends = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(counts)]).cast(pa.int32())
    return pa.ListArray.from_arrays(ends, names.take(labels)), repairs.cast(pa.int32()), odd


def _kept_strings(strings: pa.Array, fmt: Any) -> tuple[pa.Array, pa.Array]:
    """Each string as `_label` keeps it, null where nothing is left or it is at fault; and whether it is."""
    at_fault = [False] * len(strings)
    if _is_utf8(strings):
        trimmed = pc.utf8_trim_whitespace(strings)
        tests = [pc.not_equal(trimmed, strings), pc.equal(trimmed, ""), pc.match_substring(strings, "\0")]
        tests.append(pc.greater(pc.binary_length(strings), fmt.max_label_bytes))
        places = pc.indices_nonzero(reduce(pc.or_, tests)).to_pylist()
    else:
        places = pc.indices_nonzero(pc.is_valid(strings)).to_pylist()
    if places:
        kept = strings.cast(pa.binary()).to_pylist()
        for place in places:
            try:
                kept[place] = _label(_utf8(kept[place], "labels"), fmt) or None
            except _Rejected:
                kept[place], at_fault[place] = None, True
        strings = pa.array(kept, pa.string())
    return strings, pa.array(at_fault, pa.bool_())
