"""Error families and their exit codes (sysexits), so that a scheduler knows whether a retry makes sense.

A message says where, what it is, what was expected and what to do, in one line.
"""

USAGE = 2
INTERRUPTED = 130
TERMINATED = 143


class TagmillError(Exception):
    """Base of every error that a user can act on.  `code` is the exit code of the command."""

    code = 70


class DataError(TagmillError):
    """The data cannot be used as it is: too many rejects, no label at all, a damaged table."""

    code = 65


class InputError(TagmillError):
    """The input is missing, empty or unreadable."""

    code = 66


class ServiceError(TagmillError):
    """A required service (Spark master, MLflow with tracking.required) does not answer."""

    code = 69


class StorageError(TagmillError):
    """Reading or writing failed: disk full, I/O error, short read."""

    code = 74


class LockedError(TagmillError):
    """Another process is writing to the same run folder."""

    code = 75


class PermissionError_(TagmillError):
    """The operating system refuses access to a path."""

    code = 77


class ConfigError(TagmillError):
    """A setting is wrong or unknown, or a folder belongs to another configuration."""

    code = 78


def shown(value, limit=80):
    """`value` as it may stand in a message: control and bidirectional characters escaped, at most `limit` characters.

    >>> shown("a\\nb" + chr(0x202E))
    'a\\\\nb\\\\u202e'
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
