"""What a disk may do to a saved job: it is found, and never taken for the job."""

from pathlib import Path

import pytest

from bnproto.v1 import journal_pb2 as pb
from bnserver import job_file as module
from bnserver.job_file import StoreError
from bnserver.journal_encoding import encode, encode_header, framed
from bnserver.store import Store
from support.journals import JOURNAL, SNAPSHOT, SUMS, all_loaded, same, written


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Silent loss of a bit would be silent loss of the run: in the snapshot, and in the journal after it."""
    path = written(tmp_path, "j", SNAPSHOT, JOURNAL)
    data = path.read_bytes()
    store = Store(tmp_path)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x20
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match="is corrupt"):
            store.load()
        assert path.read_bytes() == flipped
    store.close()


def test_a_file_cut_at_every_byte_is_what_was_before_or_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot that lacks its end was never in place; of a journal the last entry was being written."""
    content = written(tmp_path, "j", SNAPSHOT, JOURNAL).read_bytes()
    begins = [len(written(tmp_path, "j", SNAPSHOT, JOURNAL[:count]).read_bytes()) for count in range(6)]
    path = tmp_path / written(tmp_path).name
    for length in range(len(content)):
        path.write_bytes(content[:length])
        caplog.clear()
        if length < begins[0]:
            with pytest.raises(StoreError, match="is corrupt"):
                all_loaded(tmp_path)
            continue
        kept = max(count for count in range(6) if begins[count] <= length)
        store = Store(tmp_path)
        assert same(store.load()["j"], SNAPSHOT + JOURNAL[:kept])
        assert len(caplog.messages) == (length not in begins)  # what is cut off is told
        store.append("j", SUMS)  # and it goes on from there
        store.close()
        assert same(all_loaded(tmp_path)["j"], [*SNAPSHOT, *JOURNAL[:kept], SUMS])


def test_after_a_power_cut_the_end_of_a_journal_may_be_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was never synced is read as far as it is sound, and the log says so; the snapshot was synced."""
    monkeypatch.setattr(module, "_machine", lambda: "before the power cut")
    path = written(tmp_path, "j", SNAPSHOT, JOURNAL)
    synced = len(written(tmp_path / "other", "j", SNAPSHOT).read_bytes())
    monkeypatch.setattr(module, "_machine", lambda: "after it")
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        path.write_bytes(data[:position] + bytes(len(data) - position))
        caplog.clear()
        if position < synced:
            with pytest.raises(StoreError, match="is corrupt"):
                all_loaded(tmp_path)
        else:
            records = all_loaded(tmp_path)["j"]
            assert same(records, (SNAPSHOT + JOURNAL)[: len(records)])
            assert caplog.messages[0].startswith(f"{path} ends at byte ")


def test_a_corrupt_file_says_what_to_do(tmp_path: Path) -> None:
    """The error names the file, the fault and both ways out."""
    path = tmp_path / "j.job"
    path.write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        all_loaded(tmp_path)
    assert str(caught.value) == (
        f"The snapshot {path} is corrupt: it is empty. Put a good copy in its place; or move it away, and its job "
        "begins anew, without its moving statistics."
    )


@pytest.mark.parametrize(
    ("bodies", "text"),
    [
        ([encode_header(pb.Header(format=9, job="j"))], "expected the format 1, found 9"),
        ([encode(JOURNAL[0])], "it does not begin with a header"),
        ([encode_header(pb.Header(format=1, job="j"))] * 2, "a second header stands in its middle"),
        ([encode_header(pb.Header(format=1, job="j", synced=3))], "it has 1 of the 3 records of its snapshot"),
        ([encode_header(pb.Header(format=1, job="j")), b""], "expected an entry that this version knows, found None"),
        ([encode_header(pb.Header(format=1, job="j")), b"\xff"], "a record makes no sense"),
    ],
)
def test_a_file_of_another_kind_is_not_taken(tmp_path: Path, bodies: list[bytes], text: str) -> None:
    """Its checksums hold, but it is not what this version writes."""
    (tmp_path / "x.job").write_bytes(b"".join(framed(number, body) for number, body in enumerate(bodies)))
    with pytest.raises(StoreError, match=text):
        all_loaded(tmp_path)


def test_frames_can_not_be_taken_out_or_moved(tmp_path: Path) -> None:
    """Each is sound by itself; their numbers are not."""
    header = framed(0, encode_header(pb.Header(format=1, job="j", machine=module._machine())))
    path = tmp_path / "x.job"
    for numbers in ((2,), (1, 1), (2, 1)):
        path.write_bytes(header + b"".join(framed(number, encode(SUMS)) for number in numbers))
        with pytest.raises(StoreError, match="does not begin as one"):
            all_loaded(tmp_path)
