"""What is loaded is what was saved, or an error that names the file."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnserver.core.service import Snapshot
from bnserver.store import Store, StoreError


def _state(dtype: str, channels: int) -> LayerState:
    grid = Grid(dtype, np.linspace(-1e30, 3, channels), np.arange(channels) - 160, True)
    backward = BackwardGrid(dtype, np.arange(channels), np.arange(channels) - 5, False)
    mean = np.linspace(-1, 1, channels).astype(dtype)
    return LayerState(Moving(mean, mean**2), grid, backward, 2**40)


def _same(got: LayerState, expected: LayerState) -> bool:
    a, b = got.arrays(), expected.arrays()
    kinds = got.forward.dtype == expected.forward.dtype
    return kinds and all((a[key].dtype, a[key].tobytes()) == (b[key].dtype, b[key].tobytes()) for key in b)


_SNAPSHOT = Snapshot("j", 3, {"a": _state("float32", 1)})


def _saved(directory: Path, *snapshots: Snapshot) -> None:
    store = Store(directory)

    async def save() -> None:
        for snapshot in snapshots:
            await store.save(snapshot)

    asyncio.run(save())
    store.close()


def _loaded(directory: Path) -> tuple[Snapshot, ...]:
    store = Store(directory)
    try:
        return store.load()
    finally:
        store.close()


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    """Every bit of every layer of every job, whatever their names hold."""
    wide = Snapshot("j/../ü " + "x" * 190, 1, {"": _state("float64", 1), "a/b\n0": _state("float32", 5)})
    empty = Snapshot("..", 9, {})
    _saved(tmp_path / "new" / "directory", _SNAPSHOT, wide, empty)
    got = {snapshot.job: snapshot for snapshot in _loaded(tmp_path / "new" / "directory")}
    assert set(got) == {"j", wide.job, ".."}
    for expected in (_SNAPSHOT, wide, empty):
        found = got[expected.job]
        assert found.generation == expected.generation
        assert list(found.states) == list(expected.states)
        assert all(_same(found.states[name], state) for name, state in expected.states.items())


def test_jobs_of_similar_names_have_files_of_their_own(tmp_path: Path) -> None:
    """Names that only differ where a file name can't hold them."""
    names = ["x" * 199, "x" * 198 + "y", "a b", "a%20b", "A b"]
    _saved(tmp_path, *(replace(_SNAPSHOT, job=name) for name in names))
    assert sorted(snapshot.job for snapshot in _loaded(tmp_path)) == sorted(names)


def test_a_save_replaces_the_one_before(tmp_path: Path) -> None:
    """The latest is what counts, and nothing else stays."""
    _saved(tmp_path, _SNAPSHOT, replace(_SNAPSHOT, generation=4))
    assert [snapshot.generation for snapshot in _loaded(tmp_path)] == [4]
    assert len(list(tmp_path.iterdir())) == 2  # the file and the lock


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Silent loss of a bit would be silent loss of the run: header, names, arrays, digest."""
    _saved(tmp_path, _SNAPSHOT)
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    store = Store(tmp_path)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x20
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match="is corrupt"):
            store.load()
    store.close()


def test_every_torn_file_is_found(tmp_path: Path) -> None:
    """A file that lacks its end, as a disk may leave it."""
    _saved(tmp_path, _SNAPSHOT)
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(StoreError, match="is corrupt"):
            _loaded(tmp_path)


def test_a_corrupt_file_says_what_to_do(tmp_path: Path) -> None:
    """The error names the file, the fault and both ways out."""
    path = tmp_path / "j.safetensors"
    path.write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        _loaded(tmp_path)
    assert str(caught.value).startswith(f"The snapshot {path} is corrupt: ")
    assert str(caught.value).endswith(
        "Put a good copy in its place; or move it away, and its job begins anew, without its moving statistics."
    )


def test_a_file_of_another_kind_is_not_taken(tmp_path: Path) -> None:
    """A safetensors file that somebody put there is no snapshot."""
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(StoreError, match="expected the format bnlayer-job-1, found None"):
        _loaded(tmp_path)


def test_a_write_that_broke_off_leaves_the_file_before(tmp_path: Path) -> None:
    """What was aside when the machine died is no snapshot, and in nobody's way."""
    _saved(tmp_path, _SNAPSHOT)
    (path,) = tmp_path.glob("*.safetensors")
    path.with_suffix(".part").write_bytes(b"half")
    assert [snapshot.generation for snapshot in _loaded(tmp_path)] == [3]
    _saved(tmp_path, replace(_SNAPSHOT, generation=4))
    assert [snapshot.generation for snapshot in _loaded(tmp_path)] == [4]


def test_a_directory_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"The state directory .*file can't be used: "):
        Store(tmp_path / "file")
