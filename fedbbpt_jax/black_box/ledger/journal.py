"""An append-only file of records, each sealed with a checksum over all that stands before it.

A record is `length u32 · seal of the length 4 bytes · kind 1 byte · payload · seal 16 bytes`, little-endian. A seal is
BLAKE2b of the previous seal and the record, so that a changed, missing, added or moved record breaks the chain. Lengths
have seals of their own: otherwise a changed length would look like the end of the file.

A process that is killed while it writes leaves the beginning of a last record. Such a torn record is cut off at the
next opening, and said; damage anywhere else is refused. A file that was cut exactly between two records is a valid
journal: whoever must notice keeps the `Position` of what it relies on, and asks for at least that much.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fedbbpt_jax.errors import JournalError

MAGIC = b"fedbbpt journal1"
"""The first bytes of a journal; as long as a seal, and the seal that its first record continues."""

_SEAL = len(MAGIC)
_HEAD = struct.Struct("<I4s")
_MOST_BYTES = 1 << 31
_LOG = logging.getLogger(__name__)


class Position(NamedTuple):
    """A place in a journal: how many bytes, and the seal over them in hexadecimal digits."""

    num_bytes: int
    seal: str


class Record(NamedTuple):
    """A record, and where in the file it begins.

    Attributes:
      offset: bytes.
      kind: one byte.
      payload: what it says.
    """

    offset: int
    kind: bytes
    payload: bytes


class Journal:
    """A file of sealed records. Made by `open_journal`, `read_journal` or `journal_in_memory`; not thread-safe.

    Attributes:
      name: of the file, for messages.
      writable: whether records can be added.
      torn_bytes: how much of a last record was cut off at opening.
    """

    def __init__(self, file: BinaryIO, name: str, end: Position, torn_bytes: int, *, writable: bool):
        self.name, self.writable, self.torn_bytes = name, writable, torn_bytes
        self._file, self._end, self._seal = file, end.num_bytes, bytes.fromhex(end.seal)
        self._durable = end.num_bytes
        self._refusal = "" if writable else "is open for reading only"

    def append(self, kind: bytes, payload: bytes) -> Record:
        """Adds a record, which survives a kill of this process; a power cut only after `sync`.

        Raises:
          JournalError: it cannot be written; the journal takes no more.
        """
        self._check_open()
        record = _sealed(self._seal, kind + payload)
        try:
            self._file.seek(self._end)
            rest = memoryview(record)
            while rest:
                rest = rest[self._file.write(rest) :]
        except (OSError, ValueError) as error:
            self._refuse("cannot be written", error)
        written = Record(self._end, kind, payload)
        self._end, self._seal = self._end + len(record), record[-_SEAL:]
        return written

    def read(self, offset: int) -> Record:
        """Returns the record that begins at `offset`.

        Raises:
          JournalError: it is not the one that was written there.
        """
        try:
            self._file.seek(offset - _SEAL)
            found = next(_scan(self._file, self.name, offset, self._end, self._file.read(_SEAL)), None)
        except (OSError, ValueError) as error:
            raise JournalError(f"{self.name}: cannot be read: {error}") from error
        if found is None:
            raise JournalError(f"{self.name}: no record at byte {offset}")
        return found[0]

    def sync(self) -> None:
        """Makes all records survive a power cut.

        Raises:
          JournalError: the disk does not take them; the journal takes no more.
        """
        if self._durable == self._end or not self.writable:
            return
        self._check_open()
        try:
            _sync(self._file)
        except (OSError, ValueError) as error:
            self._refuse("cannot be made durable", error)
        self._durable = self._end

    def position(self) -> Position:
        """Returns where the journal ends."""
        return Position(self._end, self._seal.hex())

    def close(self) -> None:
        """Closes the file, and lets others open it."""
        self._refusal = "is closed"
        self._file.close()

    def _check_open(self) -> None:
        if self._refusal:
            raise JournalError(f"{self.name}: {self._refusal}")

    def _refuse(self, what: str, error: Exception) -> None:
        self._refusal = f"{what}: {error}"
        raise JournalError(f"{self.name}: {self._refusal}") from error


def open_journal(path: Path, visit: Callable[[Record], object], at_least: Position | None = None) -> Journal:
    """Returns the journal in a file, to be continued; a new one where there is none.

    Args:
      path: of the file; its folder exists.
      visit: is called with each record, in order; its `JournalError` gets the file's name.
      at_least: the journal must hold all up to here, unchanged.

    Raises:
      JournalError: another process has it open, it is damaged, or shorter than `at_least`; or it cannot be opened.
    """
    file = _locked(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    try:
        size = os.fstat(file.fileno()).st_size
        end = _visit_all(file, str(path), size, visit, at_least)
        torn = size - end.num_bytes
        if torn > 0:
            _LOG.warning("%s: the last %d bytes were not completely written, and are cut off", path, torn)
        if end.num_bytes == 0:
            file.truncate(0)
            file.seek(0)
            file.write(MAGIC)
            end = Position(_SEAL, MAGIC.hex())
        file.truncate(end.num_bytes)
        _sync(file)
        _sync_folder(path.parent)
    except OSError as error:
        file.close()
        raise JournalError(f"{path}: cannot be opened: {error}") from error
    except BaseException:
        file.close()
        raise
    return Journal(file, str(path), end, max(torn, 0), writable=True)


def read_journal(path: Path, visit: Callable[[Record], object]) -> Journal:
    """Returns the journal in a file, to be read only; nothing is changed, and a torn last record is left out.

    Args:
      path: of the file.
      visit: is called with each record, in order; its `JournalError` gets the file's name.

    Raises:
      JournalError: another process writes it, it is damaged, or not there.
    """
    file = _locked(path, os.O_RDONLY, fcntl.LOCK_SH)
    try:
        size = os.fstat(file.fileno()).st_size
        end = _visit_all(file, str(path), size, visit, None)
        if end.num_bytes == 0:
            raise JournalError(f"{path}: is empty")
    except BaseException:
        file.close()
        raise
    return Journal(file, str(path), end, size - end.num_bytes, writable=False)


def journal_in_memory() -> Journal:
    """Returns a new journal that ends with its process."""
    file = io.BytesIO(MAGIC)
    return Journal(file, "the journal in memory", Position(_SEAL, MAGIC.hex()), 0, writable=True)


def _locked(path: Path, flags: int, lock: int) -> BinaryIO:
    try:
        file: BinaryIO = os.fdopen(os.open(path, flags, 0o600), "rb" if lock == fcntl.LOCK_SH else "r+b", buffering=0)
    except OSError as error:
        raise JournalError(f"{path}: cannot be opened: {error}") from error
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise JournalError(f"{path}: another process has it open") from error
    return file


def _visit_all(
    file: BinaryIO, name: str, size: int, visit: Callable[[Record], object], at_least: Position | None
) -> Position:
    """Returns where the last complete record ends; 0 bytes where not even the first bytes are complete."""
    end, reached = Position(0, ""), at_least is None
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        magic = reader.read(_SEAL)
        if not MAGIC.startswith(magic):
            raise JournalError(f"{name}: damaged at byte 0, or no journal")
        if magic == MAGIC:
            end = Position(_SEAL, MAGIC.hex())
            reached = reached or end == at_least
            for record, place in _scan(reader, name, _SEAL, size, MAGIC):
                try:
                    visit(record)
                except JournalError as error:
                    raise JournalError(f"{name}: {error}") from error
                end, reached = place, reached or place == at_least
    if not reached:
        raise JournalError(f"{name}: does not hold what stood at byte {at_least.num_bytes if at_least else 0}")
    return end


def _scan(file: BinaryIO, name: str, offset: int, size: int, seal: bytes) -> Iterator[tuple[Record, Position]]:
    """Yields the complete records from `offset` on, and where each ends."""
    while size - offset >= _HEAD.size:
        head = file.read(_HEAD.size)
        length, check = _HEAD.unpack(head)
        if check != _length_seal(seal, length):
            if _was_never_written(head, file):
                return
            raise JournalError(f"{name}: damaged at byte {offset}")
        if size - offset < _HEAD.size + length + _SEAL:
            return
        body, found = file.read(length), file.read(_SEAL)
        seal = _seal(seal, head, body)
        if seal != found or not body:
            if _was_never_written(found, file):
                return
            raise JournalError(f"{name}: damaged between bytes {offset} and {offset + _HEAD.size + length + _SEAL}")
        record = Record(offset, body[:1], body[1:])
        offset += _HEAD.size + length + _SEAL
        yield record, Position(offset, seal.hex())


def _was_never_written(part: bytes, file: BinaryIO) -> bool:
    """Whether only zeros follow: after a power cut a file can have its new size but not its new bytes."""
    return not any(part) and not any(file.read())


def _sealed(seal: bytes, body: bytes) -> bytes:
    if len(body) >= _MOST_BYTES:
        raise ValueError(f"a record holds less than {_MOST_BYTES} bytes, got {len(body)}")
    head = _HEAD.pack(len(body), _length_seal(seal, len(body)))
    return b"".join([head, body, _seal(seal, head, body)])


def _length_seal(seal: bytes, length: int) -> bytes:
    return hashlib.blake2b(seal + length.to_bytes(4, "little"), digest_size=4).digest()


def _seal(seal: bytes, head: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(seal + head, digest_size=_SEAL)
    digest.update(body)
    return digest.digest()


def _sync(file: BinaryIO) -> None:
    if not isinstance(file, io.BytesIO):
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
