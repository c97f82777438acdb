"""The lock of a run folder in an object store: numbered leases.

    RUN/.lease/000007.json     number, holder, beat, token, released

A lease is created under the next number, which only one process can do, and written again by its holder every `RENEW`
seconds.  It is over when it says so, or when its content has stayed the same for `LEASE` seconds of the monotonic clock
of whoever waits: no two clocks are compared.  The number fences: who finds a higher one publishes no more.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline import storage
from pipeline.errors import LockedError, TagmillError, shown
from pipeline.storage import Conditions, ObjectPath

log = logging.getLogger(__name__)

FOLDER = ".lease"
RENEW = 3.0  # seconds between two beats of a holder
LEASE = 30.0  # seconds without a beat after which another process may take over
LOOK = 0.5  # seconds between two looks at another one's lease


class Found(NamedTuple):
    """The lease of the highest number, as it is seen."""

    number: int
    content: bytes

    @property
    def card(self) -> dict:
        try:
            card = json.loads(self.content)
        except ValueError:
            card = None
        return card if isinstance(card, dict) else {}

    @property
    def holder(self) -> str:
        return str(self.card.get("holder") or "an unknown process")

    @property
    def released(self) -> bool:
        return bool(self.card.get("released"))


@dataclass
class Lease:
    """A lease that this process holds, or has held."""

    root: ObjectPath
    number: int
    can: Conditions  # what the store keeps; without `create` nothing but care keeps two writers apart
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"

    @property
    def path(self) -> ObjectPath:
        return _path(self.root, self.number)

    def content(self, released: bool = False) -> bytes:
        card = {name: getattr(self, name) for name in ("number", "holder", "beat", "token")}
        return json.dumps({**card, "released": released}).encode()

    def check(self) -> None:
        """Raises LockedError where a later lease has been given, or this one is not ours: nothing more is published."""
        highest = max(_numbers(self.root), default=0)
        if highest > self.number:
            raise LockedError(
                f"{self.root}: taken over by another process (lease {highest}, ours is {self.number}) while this one "
                "did not answer; nothing more is published: look at `tagmill status`, and run the same command again"
            )
        try:
            found = Found(self.number, self.path.read_bytes())
        except FileNotFoundError:
            found = Found(self.number, b"")
        if found.card.get("token") != self.token:
            raise LockedError(
                f"{self.root}: lease {self.number} is held by {shown(found.holder, 200)} now, or was removed; nothing "
                "more is published: see to it that one process at a time writes there, and run the same command again"
            )

    def _renew(self) -> None:
        while not self.done.wait(RENEW):
            self.beat += 1
            try:
                self.check()  # first: where nothing but care keeps writers apart, it may be another one's by now
                self.path.write_bytes(self.content())
            except LockedError as error:
                log.warning("%s", error)
                return
            except TagmillError as error:  # the store may be back at the next beat; publishing asks it anyway
                log.warning("lease %d: not renewed: %s", self.number, error)


@contextlib.contextmanager
def held(root: ObjectPath) -> Iterator[Lease]:
    """Hold the lease of a run.  Raises LockedError naming the holder after its next beat."""
    can = storage.conditions(root / FOLDER)
    if not can.create:
        log.warning(
            "%s: this store does not keep the condition of a put (If-None-Match); see to it that one process at a time "
            "writes to the run",
            root,
        )
    found = latest(root)
    if found and not found.released:
        if _beats(root, found, LEASE):
            raise LockedError(f"{root}: locked by {shown(found.holder, 200)}; wait for it or stop it")
        log.warning("lease %d of %s was not renewed for %g s; taken over", found.number, found.holder, LEASE)
    lease = Lease(root, found.number + 1 if found else 1, can)
    if can.create:
        mine = storage.create(lease.path, lease.content())
    else:
        lease.path.write_bytes(lease.content())
        mine = lease.path.read_bytes() == lease.content()
    if not mine:
        other = latest(root)
        raise LockedError(
            f"{root}: locked by {shown(other.holder if other else 'another process', 200)}; wait for it or stop it"
        )
    for number in _numbers(root):
        if number < lease.number:  # a holder that wakes up may write its own again; the highest number counts
            _path(root, number).unlink(missing_ok=True)
    thread = threading.Thread(target=lease._renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.done.set()
        thread.join(10)  # a beat that hangs is overwritten, or ends as one that was not renewed
        with contextlib.suppress(TagmillError):  # it is another one's, or over when it is not renewed
            lease.check()
            lease.path.write_bytes(lease.content(released=True))


def latest(root: ObjectPath) -> Found | None:
    """The lease of the highest number; None where there was never one."""
    for _ in range(3):
        numbers = _numbers(root)
        if not numbers:
            return None
        with contextlib.suppress(FileNotFoundError):  # removed since by the holder of a higher one
            return Found(max(numbers), _path(root, max(numbers)).read_bytes())
    raise LockedError(f"{root}: its leases change all the time; wait for the processes that write there")


def holder(root: ObjectPath) -> str | None:
    """Who holds the lease, as text; None where it was released or three beats were missed."""
    found = latest(root)
    if found is None or found.released or not _beats(root, found, 3 * RENEW):
        return None
    return found.holder


def _beats(root, found, seconds):
    """Whether the lease changes within some seconds of this process's clock."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(LOOK, seconds / 10))
        now = latest(root)
        if now != found:
            return now is not None and not now.released
    return False


def _numbers(root):
    names = (path.name for path in (root / FOLDER).iterdir())
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _path(root, number):
    return root / FOLDER / f"{number:06d}.json"
