"""Sealed records: every damage is found, a torn end is cut, and the disk's failures are not passed over."""

import io
import itertools
import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbbpt_jax.black_box.ledger import journal as journals
from fedbbpt_jax.black_box.ledger.journal import MAGIC, Position, journal_in_memory, open_journal, read_journal
from fedbbpt_jax.errors import JournalError

RECORDS = [(b"S", b"start"), (b"A", b""), (b"R", bytes(range(40))), (b"A", b"\0" * 24)]


def written(path, records=RECORDS) -> list[int]:
    """Writes a journal; returns where its first bytes and each record end."""
    journal, ends = open_journal(path, lambda record: None), [len(MAGIC)]
    for kind, payload in records:
        journal.append(kind, payload)
        ends.append(journal.position().num_bytes)
    journal.close()
    return ends


def found_in(path, at_least=None) -> list[tuple[bytes, bytes]]:
    found = []
    open_journal(path, found.append, at_least).close()
    return [(record.kind, record.payload) for record in found]


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.binary(max_size=50)), max_size=5))
def test_what_was_written_is_read(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("journal") / "j"
    written(path, records)
    assert found_in(path) == records
    journal, found = journal_in_memory(), []
    for kind, payload in records:
        found.append(journal.append(kind, payload))
    assert [journal.read(record.offset) for record in found] == found


def test_every_changed_byte_is_found(tmp_path):
    path = tmp_path / "j"
    written(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flip in (1, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            with pytest.raises(JournalError, match=rf"{path}: damaged (at|between) byte"):
                found_in(path)
            with pytest.raises(JournalError, match="damaged"):
                read_journal(path, lambda record: None)


def test_every_cut_is_found(tmp_path, caplog):
    """Within a record by itself, and said; between two by whoever knows how long the journal was."""
    path = tmp_path / "j"
    ends = written(path)
    whole, end = path.read_bytes(), position(path)
    for size in range(len(whole)):
        caplog.clear()
        path.write_bytes(whole[:size])
        with pytest.raises(JournalError, match=f"does not hold what stood at byte {len(whole)}"):
            found_in(path, end)
        with caplog.at_level(logging.WARNING):
            assert found_in(path) == RECORDS[: max(sum(e <= size for e in ends) - 1, 0)]
        torn = size - max((e for e in ends if e <= size), default=0)
        assert caplog.messages == (
            [f"{path}: the last {torn} bytes were not completely written, and are cut off"] if torn else []
        )
        assert path.stat().st_size == max(size - torn, len(MAGIC))


def position(path) -> Position:
    journal = open_journal(path, lambda record: None)
    journal.close()
    return journal.position()


def test_a_journal_goes_on_where_it_was_cut(tmp_path):
    path = tmp_path / "j"
    written(path)
    with open(path, "ab") as file:
        file.write(b"\x07\x00")
    journal = open_journal(path, lambda record: None)
    assert journal.torn_bytes == 2
    journal.append(b"Z", b"more")
    journal.close()
    assert found_in(path) == [*RECORDS, (b"Z", b"more")]


@pytest.mark.parametrize("moved", [(0, 1), (1, 2), (1, 3)])
def test_swapped_records_are_found(tmp_path, moved):
    path = tmp_path / "j"
    ends = written(path)
    whole = path.read_bytes()
    pieces = [whole[a:b] for a, b in itertools.pairwise(ends)]
    a, b = moved
    pieces[a], pieces[b] = pieces[b], pieces[a]
    path.write_bytes(MAGIC + b"".join(pieces))
    with pytest.raises(JournalError, match="damaged at byte"):
        found_in(path)


@pytest.mark.parametrize("index", range(len(RECORDS) - 1))
def test_a_missing_or_doubled_record_is_found(tmp_path, index):
    path = tmp_path / "j"
    ends = written(path)
    whole = path.read_bytes()
    for changed in (whole[: ends[index]] + whole[ends[index + 1] :], whole[: ends[index + 1]] + whole[ends[index] :]):
        path.write_bytes(changed)
        with pytest.raises(JournalError, match="damaged at byte"):
            found_in(path)


@pytest.mark.parametrize("zeros", [1, 7, 8, 40, 5000])
def test_room_without_bytes_is_a_torn_end(tmp_path, zeros):
    """As file systems leave it after a power cut."""
    path = tmp_path / "j"
    written(path)
    with open(path, "ab") as file:
        file.write(b"\0" * zeros)
    assert found_in(path) == RECORDS


def test_a_last_record_whose_end_is_zeros_is_torn(tmp_path):
    path = tmp_path / "j"
    ends = written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: ends[-2] + 10] + b"\0" * (ends[-1] - ends[-2] - 10))
    assert found_in(path) == RECORDS[:-1]


def test_another_file_is_no_journal(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b"something else that is long enough")
    with pytest.raises(JournalError, match="no journal"):
        found_in(path)
    assert path.read_bytes() == b"something else that is long enough"


def test_a_position_of_another_journal_is_refused(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", [(b"S", b"other"), *RECORDS[1:]])
    end = position(tmp_path / "a")
    assert position(tmp_path / "b").num_bytes == end.num_bytes
    assert found_in(tmp_path / "a", end) == RECORDS
    with pytest.raises(JournalError, match="does not hold"):
        found_in(tmp_path / "b", end)


def test_any_earlier_position_is_held(tmp_path):
    path = tmp_path / "j"
    journal = open_journal(path, lambda record: None)
    places = [journal.position()]
    for kind, payload in RECORDS:
        journal.append(kind, payload)
        places.append(journal.position())
    journal.close()
    for place in places:
        assert found_in(path, place) == RECORDS


def test_one_at_a_time_has_it(tmp_path):
    path = tmp_path / "j"
    journal = open_journal(path, lambda record: None)
    with pytest.raises(JournalError, match="another process has it open"):
        open_journal(path, lambda record: None)
    with pytest.raises(JournalError, match="another process has it open"):
        read_journal(path, lambda record: None)
    journal.close()
    readers = [read_journal(path, lambda record: None) for _ in range(2)]
    with pytest.raises(JournalError, match="another process has it open"):
        open_journal(path, lambda record: None)
    for reader in readers:
        reader.close()
    assert found_in(path) == []


def test_another_process_keeps_us_out_until_it_is_killed(tmp_path):
    path = tmp_path / "j"
    written(path)
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(JournalError, match="another process has it open"):
            found_in(path)
        process.kill()
        process.wait()
    assert found_in(path) == RECORDS


def test_reading_changes_nothing(tmp_path):
    path = tmp_path / "j"
    written(path)
    with open(path, "ab") as file:
        file.write(b"torn")
    before, found = path.read_bytes(), []
    journal = read_journal(path, found.append)
    assert [(record.kind, record.payload) for record in found] == RECORDS
    assert journal.torn_bytes == 4
    with pytest.raises(JournalError, match="for reading only"):
        journal.append(b"A", b"")
    journal.sync()
    journal.close()
    assert path.read_bytes() == before


def test_there_must_be_something_to_read(tmp_path):
    with pytest.raises(JournalError, match="cannot be opened"):
        read_journal(tmp_path / "none", lambda record: None)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(JournalError, match="is empty"):
        read_journal(tmp_path / "empty", lambda record: None)
    with pytest.raises(JournalError, match="cannot be opened"):
        open_journal(tmp_path / "no folder" / "j", lambda record: None)


def test_what_changed_behind_our_back_is_not_read(tmp_path):
    path = tmp_path / "j"
    journal = open_journal(path, lambda record: None)
    record = journal.append(b"A", b"an answer")
    with open(path, "r+b") as file:
        file.seek(record.offset + 12)
        file.write(b"X")
    with pytest.raises(JournalError, match="damaged"):
        journal.read(record.offset)
    with pytest.raises(JournalError, match="no record"):
        journal.read(journal.position().num_bytes)
    journal.close()
    with pytest.raises(JournalError, match="cannot be read"):
        journal.read(record.offset)


class FullDisk(io.BytesIO):
    """Takes a few bytes more, then none."""

    room = 5

    def write(self, data):
        if self.room == 0:
            raise OSError("No space left on device")
        self.room, taken = 0, data[: self.room]
        return super().write(taken)


def test_a_full_disk_ends_the_journal():
    journal = journals.Journal(FullDisk(MAGIC), "j", Position(len(MAGIC), MAGIC.hex()), 0, writable=True)
    for _ in range(2):
        with pytest.raises(JournalError, match="j: cannot be written: No space left"):
            journal.append(b"A", b"more than there is room for")
    assert journal.position().num_bytes == len(MAGIC)


def test_a_failed_sync_ends_the_journal(tmp_path, monkeypatch):
    """What the disk did not take once it may have thrown away: a second `fsync` proves nothing."""
    journal = open_journal(tmp_path / "j", lambda record: None)
    journal.append(b"A", b"")

    def failing(descriptor):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(JournalError, match="cannot be made durable: Input/output error"):
            journal.sync()
    with pytest.raises(JournalError, match="cannot be made durable"):
        journal.sync()
    journal.close()


def test_a_closed_journal_says_so():
    journal = journal_in_memory()
    journal.close()
    with pytest.raises(JournalError, match="is closed"):
        journal.append(b"A", b"")


def test_records_have_a_largest_size(monkeypatch):
    monkeypatch.setattr(journals, "_MOST_BYTES", 10)
    with pytest.raises(ValueError, match="less than 10 bytes, got 11"):
        journal_in_memory().append(b"A", b"0123456789")
