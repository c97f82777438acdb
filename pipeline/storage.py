"""Where a run and its input are: files of a disk, or objects of a store by their URI (drivers of fsspec).

What differs between the two stands here, and the lock of an object store in `lease`:

    disk (pathlib.Path)                          object store (ObjectPath)
    temporary file, fsync, rename                temporary file of the host, put as one object: whole or not at all
    folder under another name, renamed           objects one by one, the one that makes the folder count last
    memory-mapped where it is                    a copy in the host's cache, checked by SHA-256, is mapped
    hard link                                    copy
    folders are made and removed                 a folder is what names begin with

Credentials are the environment's own (fsspec's configuration, the variables of the service), never a part of a URI.
"""

import contextlib
import errno
import fnmatch
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations
from upath.extensions import ProxyUPath

from pipeline.errors import (
    ConfigError,
    DataError,
    InputError,
    PermissionError_,
    ServiceError,
    StorageError,
    TagmillError,
    shown,
)
from pipeline.host import clean, host_folder, shared

log = logging.getLogger(__name__)

STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")  # an object is put as a whole, and folders are names
OTHERS = ("http", "https", "memory")  # input; one process alone
EXTRAS = {"s3fs": "tagmill[s3]"}  # packages that an extra of ours brings
BLOCK = 8 << 20  # bytes that are asked for at once where an object is read from its beginning to its end
URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# classes of errors by name, as their packages may not be installed
UNREACHABLE = {
    "ConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ServiceUnavailable",
    "ServiceRequestError",
}
UNREACHABLE |= {"TimeoutError", "FSTimeoutError", "TransportError"}
REFUSED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}
REFUSED |= {"DefaultCredentialsError", "ClientAuthenticationError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
DRIVERS = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "google", "adlfs", "azure", "requests")
BUSY = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EBUSY))  # what drivers make of 503, 409 and 500


class ObjectPath(ProxyUPath):
    """An object of a store, or what the names of objects begin with, as a path.

    Whoever asks whether something is there gets an answer of the store: fsspec's own `isfile` and `exists` take a
    service that is down for a file that is missing.  FileNotFoundError says that nothing is there; every other refusal
    is an error of ours.
    """

    __slots__ = ()

    def __reduce__(self):
        return place, (str(self),)

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def _info(self) -> dict[str, Any] | None:
        with _answers(self, "look at"):
            try:
                return self.fs.info(self.path)
            except FileNotFoundError as error:
                if _kinds(error.__cause__) & UNREACHABLE:  # what HTTP's driver makes of it
                    raise error.__cause__ or error from error
                return None

    def exists(self, **_) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> "ObjectPath":
        return self

    def mkdir(self, *_, **__) -> None:
        """Nothing: a folder is there with its first object."""

    def iterdir(self) -> Iterator["ObjectPath"]:
        """What is right below, sorted; nothing where nothing is there."""
        with _answers(self, "list"):
            try:
                found: list[str] = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                found = []
        below = {name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.strip("/") != self.path.strip("/")}
        return iter([self / name for name in sorted(below)])

    def glob(self, pattern: str, **options) -> Iterator["ObjectPath"]:  # type: ignore[override]
        """Paths that match a pattern of names between slashes; `**` is no pattern here."""
        first, _, rest = pattern.partition("/")
        for child in self.iterdir():
            if fnmatch.fnmatchcase(child.name, first):
                yield from child.glob(rest) if rest else [child]

    def open(self, mode: str = "rb", **options) -> Any:  # type: ignore[override]
        """A file object that reads bytes."""
        if mode != "rb":
            raise ValueError(f"{self}: opened as {mode!r}; objects are read here and put as a whole (`replacing`)")
        with _answers(self, "read"):
            return self.fs.open(self.path, mode, **({"block_size": BLOCK} | options))

    def read_bytes(self) -> bytes:
        with _answers(self, "read"):
            return self.fs.cat_file(self.path)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline=None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        with _answers(self, "write"):
            self.fs.pipe_file(self.path, bytes(data))
        return len(data)

    def stat(self, **_) -> Any:
        with _answers(self, "look at"):
            return self.__wrapped__.stat()

    def unlink(self, missing_ok: bool = False) -> None:
        with _answers(self, "remove"):
            try:
                self.fs.rm_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def relative_to(self, other: "ObjectPath", /, *_, **__) -> PurePosixPath:  # type: ignore[override]
        return PurePosixPath(self.path).relative_to(PurePosixPath(other.path))

    def put(self, path: Path) -> None:
        """Make the file `path` this object, in one step."""
        with _answers(self, "write"):
            self.fs.put_file(str(path), self.path)

    def get(self, path: Path) -> None:
        """Copy the object into the file `path`."""
        with _answers(self, "read"):
            self.fs.get_file(self.path, str(path))


Place = Path | ObjectPath


def is_uri(text: object) -> bool:
    """Whether `text` names an object of a store.

    >>> is_uri("s3://bucket/run"), is_uri("file:///run"), is_uri("/run"), is_uri("runs/a://b")
    (True, False, False, False)
    """
    match = URI.match(str(text))
    return match is not None and match[1].lower() not in ("file", "local")


def place(text: str | os.PathLike | ObjectPath) -> Any:
    """The absolute path of a file or folder (also file://), or the object that a URI names.

    Raises ConfigError for a URI with a user or password in it, which is not printed, of an unknown file system, or of
    one whose driver is not installed.
    """
    if isinstance(text, ObjectPath):
        return text
    if not is_uri(text):
        # executors have another working directory, so every path that leaves here is absolute
        return Path(os.path.abspath(str(text).removeprefix("file://")))
    uri = checked(str(text))
    # a listing that was kept would hide what other hosts write
    return ObjectPath(uri.rstrip("/"), use_listings_cache=False)


def checked(uri: str) -> str:
    """`uri` without a secret in it, for a file system whose driver is here; else ConfigError."""
    scheme = URI.match(uri)[1].lower()  # type: ignore[index]
    authority = re.split(r"[/?#]", uri.partition("://")[2], maxsplit=1)[0]
    user = authority.rpartition("@")[0]
    container_first = scheme in ("abfs", "abfss") and ":" not in user  # container@account, no secret
    if (user and not container_first) or (scheme in ("http", "https") and urlsplit(uri).query):
        raise ConfigError(
            f"{scheme}://(not shown): holds a user, a password or a signature; expected a URI without: it is kept in "
            "files and logs; give credentials by the environment (AWS_ACCESS_KEY_ID, a profile, fsspec's configuration)"
        )
    if "::" in uri:
        raise ConfigError(f"{shown(uri, 300)}: is a chain of file systems; expected one URI")
    if scheme not in STORES + OTHERS:
        raise ConfigError(
            f"{shown(uri, 300)}: storage of the kind {shown(scheme)} is not supported; expected s3://, gs:// or "
            "abfs://, for input also http:// or https://; where it can be mounted, give its path"
        )
    # abfss is made known by its driver
    package = known_implementations.get(scheme, {"class": "adlfs"})["class"].split(".")[0]
    wanted = EXTRAS.get(package, package)
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{shown(uri, 300)}: needs the package {package}; install it: pip install '{wanted}'")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # of a package that the driver needs
        raise ConfigError(
            f"{shown(uri, 300)}: {shown(error, 200)}; install what is missing: pip install --upgrade '{wanted}'"
        ) from error
    return uri


# -- errors ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(path: object, what: str) -> Iterator[None]:
    """Turn the operating system's refusals into our errors, which name the path."""
    try:
        yield
    except (ConnectionRefusedError, ConnectionResetError):
        raise  # of a service, not of a disk
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"cannot {what} {shown(error.filename or path, 300)}: {reason}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError_(f"{message}; give write permission or choose another folder") from error
        if error.errno == errno.ELOOP:
            raise PermissionError_(f"{message}; a symbolic link stands where a file was expected: remove it") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputError(message) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{message}; free some space and run the same command again") from error
        raise StorageError(message) from error


@contextlib.contextmanager
def named(path: object) -> Iterator[None]:
    """The system does not say the name of an open file that it cannot read or write."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def _answers(path: ObjectPath, what: str) -> Iterator[None]:
    """Turn the refusals of a store into our errors; FileNotFoundError stays, and names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _said(error) or "no such object", str(path)) from error
    except (TagmillError, ValueError):
        raise
    except Exception as error:
        raise refusal(error, path, what) from error


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """While an object is read by others, who have errors of their own: turn those of its driver into ours."""
    try:
        yield
    except Exception as error:
        if not isinstance(path, ObjectPath) or isinstance(error, TagmillError) or not _of_a_driver(error):
            raise
        raise refusal(error, path, "read") from error


def _of_a_driver(error):
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        type(e).__module__.split(".")[0] in DRIVERS for e in (error, error.__cause__)
    )


def refusal(error: BaseException, path: ObjectPath, what: str) -> TagmillError:
    """Our error for what a store said, or for its silence."""
    names = _kinds(error)
    message = f"cannot {what} {shown(path, 300)}: {_said(error)}"
    if names & REFUSED:
        return PermissionError_(
            f"{message}; expected credentials in the environment that may do it (its variables, a profile or a role)"
        )
    if names & UNREACHABLE or getattr(error, "errno", None) in BUSY:
        return ServiceError(f"{message}; check that the service answers, and run the same command again")
    if isinstance(error, NotImplementedError):
        return ConfigError(f"cannot {what} {shown(path, 300)}: this kind of storage cannot do it; choose another")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{message}; check the bucket and the name")
    return StorageError(f"{message}; look into the store what is wrong there, and run the same command again")


def _kinds(error):
    return {kind.__name__ for kind in type(error).__mro__}


def _said(error):
    """What a driver says, without the address of the service, which may hold a secret."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(re.sub(r"\w+://[^/\s]*@", "", text) or type(error).__name__, 200)


# -- files -------------------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Any) -> None:
    if isinstance(folder, ObjectPath):  # what is put is there
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well: old or new, never between."""
    if isinstance(path, ObjectPath):
        with temporary_file() as part:
            yield part
            path.put(part)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named(path):
            # nobody else's business, and no link that waits under this name is followed
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640))
            yield part
            sync_file(part)
            os.replace(part, path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_file() -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="tagmill-", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def appearing(folder: Any, last: str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well: whole, or without its file `last`."""
    if isinstance(folder, ObjectPath):
        with filling(folder, last) as part:
            yield part
        return
    folder.parent.mkdir(exist_ok=True, mode=0o750)
    for left in folder.parent.glob(".*.tmp"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.mkdir(mode=0o750)
    yield part
    for path in part.iterdir():
        sync_file(path)
    os.rename(part, folder)
    for above in (folder.parent, folder.parent.parent):
        sync_folder(above)


@contextlib.contextmanager
def filling(folder: Any, last: str = "") -> Iterator[Path]:
    """A folder of this host whose files are in `folder` when the block ends well: that one, or one that is put there.

    last: name of the file that is put after all others.
    """
    if not isinstance(folder, ObjectPath):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tagmill-") as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir(), key=lambda path: (path.name == last, path.name)):
            (folder / path.name).put(path)


def fetch(path: Any, target: Path) -> None:
    """Copy a file of a run to a file of this host."""
    if isinstance(path, ObjectPath):
        path.get(target)
    else:
        shutil.copyfile(path, target)


@contextlib.contextmanager
def on_this_host(path: Any) -> Iterator[Path]:
    """A file to be memory-mapped within the block: itself, or a copy of an object that is gone afterwards."""
    if not isinstance(path, ObjectPath):
        yield path
        return
    with temporary_file() as part:
        path.get(part)
        yield part


def copy(path: Any, target: Any) -> None:
    """Copy a file or an object to another place of the same storage."""
    if isinstance(path, ObjectPath):
        with _answers(target, "write"):
            path.fs.cp_file(path.path, target.path)
        return
    shutil.copyfile(path, target)
    sync_file(target)


def link(path: Any, target: Any) -> None:
    """Have the content of `path` under `target` too: a link where there are links, else a copy."""
    if isinstance(path, ObjectPath):
        copy(path, target)
        return
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        copy(path, target)


def remove(folder: Any, keep: Sequence[str] = (), strict: bool = False) -> None:
    """Remove a folder with all that is in it, but for children named in `keep`.

    What is not there is no error; neither is what cannot be removed, unless `strict`: nobody reads it.
    """
    if not isinstance(folder, ObjectPath):
        shutil.rmtree(folder, ignore_errors=not strict)
        return
    try:
        for path in [child for child in folder.iterdir() if child.name not in keep] if keep else [folder]:
            with _answers(path, "remove"), contextlib.suppress(FileNotFoundError):
                path.fs.rm(path.path, recursive=True)
    except TagmillError as error:
        if strict:
            raise
        log.warning("%s", error)


def digest(path: Any) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with reading(path), named(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path: Any, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, by its path or URI; of an object only the columns that are asked for are fetched."""
    if not is_uri(path):
        return pq.read_table(path, columns=columns)
    path = place(path)
    with reading(path), path.open("rb", cache_type="none") as file:  # Arrow joins neighbouring ranges itself
        return pq.read_table(file, columns=columns)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """The file of an input, which is read from its beginning to its end or, if it is Parquet, here and there."""
    if not is_uri(path):
        with open(path, "rb") as file:
            yield file
        return
    found = place(path)
    with reading(found), found.open("rb") as file:
        yield file


def size(path: str) -> int:
    """Bytes of a file of the input, now."""
    return place(path).stat().st_size if is_uri(path) else os.stat(path).st_size


def objects(uri: str) -> list[tuple[str, list[str]]]:
    """The objects that `uri` names: one, all below it, or those that match it as a glob.

    Each as its URI, and the parts of its name that the user did not write.
    """
    path = place(uri)
    fs = path.fs
    info = path._info()
    if info and info["type"] == "file":  # named by the user, whatever its name begins with or holds
        return [(str(path), [])]
    with _answers(path, "list"):
        if re.search(r"[*?[]", path.path) and not info:
            roots = fs.glob(path.path)
            base = re.split(r"[*?[]", path.path)[0].rpartition("/")[0]
        else:
            roots, base = [path.path], path.path
        found: dict[str, list[str]] = {}
        for root in roots:
            for name in fs.find(root):
                below = name.strip("/").removeprefix(base.strip("/")).strip("/")
                found[name] = below.split("/") if below else []
    return [(fs.unstrip_protocol(name), below) for name, below in found.items()]


class Mapped(NamedTuple):
    """Files of a run that tasks map into memory: where they are, or of an object store as a copy in the host's cache.

    One copy an owner: making another removes what was made of earlier files.
    """

    owner: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]  # of each; on a disk nobody looks at it
    cache_dir: str = ""

    def folder(self) -> Path:
        """The folder that holds them on this host.  Raises DataError where an object is not what it was."""
        if not is_uri(self.files[0]):
            return Path(self.files[0]).parent
        folder = self._place()
        if shared(folder, self._copy):
            for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
                if other.is_dir() and other != folder and "." not in other.name:  # with a dot: being made
                    clean(other)
        return folder

    def forget(self) -> None:
        """Remove the copy from this host."""
        if is_uri(self.files[0]):
            clean(self._place())

    def _place(self) -> Path:
        owner, content = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (self.owner, "".join(self.sha256)))
        return host_folder(self.cache_dir, f"copy-{owner}-{content}")

    def _copy(self, folder: Path) -> None:
        for uri, expected in zip(self.files, self.sha256, strict=True):
            path = place(uri)
            copy = folder / path.name
            path.get(copy)
            if digest(copy) != expected:
                raise DataError(f"{path}: missing or changed since it was written; run the same `tagmill fit` again")
            sync_file(copy)  # nobody looks at it again, not after a power failure either
        sync_folder(folder)


def shipped(folder: Path, to: ObjectPath, cache_dir: str) -> Mapped:
    """Put the files of a folder of this host into a store, for tasks of other hosts."""
    paths = sorted(folder.iterdir())
    for path in paths:
        (to / path.name).put(path)
    names = tuple(str(to / path.name) for path in paths)
    return Mapped(str(to), names, tuple(map(digest, paths)), cache_dir)


# -- publishing --------------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """What a store can be asked for: objects that are created once, objects that are replaced as they were seen."""

    create: bool
    replace: bool


def conditions(folder: ObjectPath) -> Conditions:
    """Try out, with an object below `folder`, which conditions the store keeps."""
    if not _creates(type(folder.fs)):
        return Conditions(False, False)
    path = folder / f"probe-{uuid.uuid4().hex[:12]}"
    try:
        kept = create(path, b"first") and not create(path, b"second")
        replaced = False
        version = _version(path) if kept else None
        if version:
            try:
                _put_if(path, b"third", version)
                _put_if(path, b"fourth", version)
            except Exception:
                replaced = path.read_bytes() == b"third"
        return Conditions(kept, replaced)
    finally:
        path.unlink(missing_ok=True)


def _creates(driver):
    """Whether a driver brings a conditional put of its own; fsspec's looks and then writes, as two may at once."""
    asynchronous = getattr(driver, "_pipe_file", AsyncFileSystem._pipe_file) is not AsyncFileSystem._pipe_file
    return asynchronous or driver.pipe_file is not fsspec.AbstractFileSystem.pipe_file


def create(path: ObjectPath, content: bytes) -> bool:
    """Put an object that is not there yet; False where it is there.  `content` is nobody else's (it holds a token).

    A driver tries again after a silence, and is then told that the object is there: whose it is, its content says.
    """
    try:
        path.fs.pipe_file(path.path, content, mode="create")
        return True
    except Exception as error:
        found = _found(path, error)
        if found is None:
            raise refusal(error, path, "create") from error
        return found == content


def publish(path: ObjectPath, content: bytes, seen: str | None, can: Conditions) -> bool:
    """Put `content` where `seen` (`version_of` it, None: nothing) still stands; False where something else does.

    After an error the object is read: an answer that was lost is no failure, and nothing is put twice.
    """
    try:
        if seen is None and can.create:
            path.fs.pipe_file(path.path, content, mode="create")
        elif seen is not None and can.replace:
            _put_if(path, content, seen)
        else:
            path.fs.pipe_file(path.path, content)
        return True
    except Exception as error:
        found = _found(path, error)
        if found == content:
            log.info("%s: published; the answer of the store was lost or was an error: %s", path, _said(error))
            return True
        if version_of(path) != seen:
            return False
        raise refusal(error, path, "publish") from error


def version_of(path: ObjectPath) -> str | None:
    """What identifies the present content of an object; None where there is none."""
    with _answers(path, "look at"):
        return _version(path)


def _version(path):
    try:
        info = path.fs.info(path.path)
    except FileNotFoundError:
        return None
    return str(info.get("ETag") or info.get("etag") or info.get("created") or info.get("size"))


def _put_if(path, content, version):
    if type(path.fs).__module__.split(".")[0] != "s3fs":
        raise NotImplementedError(f"{path}: conditional replacement")
    path.fs.pipe_file(path.path, content, IfMatch=version)


def _found(path, error):
    """The object as it is after `error`; None where it is not there.  Not to know is an error of its own."""
    try:
        return path.fs.cat_file(path.path)
    except FileNotFoundError:
        return None
    except Exception as again:
        raise ServiceError(
            f"{shown(path, 300)}: whether it was written is not known ({_said(error)}; {_said(again)}); "
            "the same command finds out: run it again"
        ) from again
