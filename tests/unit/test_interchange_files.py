"""Layers in files: whole, exact, atomic; and what is not a file of ours is refused before a layer changes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.interchange import load, load_into, save
from bnlayer.interchange.containers import CONTAINERS
from bnlayer.interchange.contents import Contents, describe

SUFFIXES = (".safetensors", ".npz")
POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


def _trained(name: str = "bn", channels: int = 3, ndim: int = 3, **arguments: Any) -> BatchNormalization:
    """A layer after two steps forward and back: every array of its state has been moved."""
    bn = BatchNormalization(name=name, **arguments)
    rng = np.random.default_rng(5)
    for _ in range(2):
        shape = (4,) * (ndim - 1) + (channels,)
        bn(rng.normal(3, 2, shape), training=True)
        bn.backward(rng.normal(0, 1, shape))
    return bn


def _bits(bn: BatchNormalization) -> dict[str, tuple[str, bytes]]:
    """Everything a file must keep of a layer's values."""
    arrays = {**{v.name: v.value for v in bn.weights}, **bn.state.arrays()}
    return {name: (array.dtype.name, array.tobytes()) for name, array in arrays.items()}


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arguments", [{}, {"renorm": True}, {"center": False, "scale": False}])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_loaded_layer_goes_on_with_the_same_bits(
    suffix: str, policy: str, arguments: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    """Weights, grids, version, configuration and rank: the next training step can't tell the two apart."""
    bn = _trained(channels=channels, dtype=policy, momentum=0.75, **arguments)
    save(tmp_path / f"layer{suffix}", bn)
    (again,) = load(tmp_path / f"layer{suffix}").values()
    assert again.get_config() == bn.get_config()
    assert (again.state.version, again.state.forward.known, again.state.backward.known) == (2, True, True)
    assert _bits(again) == _bits(bn)
    x = np.random.default_rng(6).normal(3, 2, (4, 4, channels))
    assert again(x, training=True).tobytes() == bn(x, training=True).tobytes()
    assert again.backward(x).tobytes() == bn.backward(x).tobytes()
    assert _bits(again) == _bits(bn)
    with pytest.raises(ValueError, match="expected ndim=3"):
        again(np.zeros((4, channels)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_layers_keep_their_names_and_order(suffix: str, tmp_path: Path) -> None:
    """Also one that is not built, names with slashes, and an empty mapping."""
    layers = {
        "z/1": _trained("a", axis=1, channels=4, dtype="bfloat16"),
        "z": _trained("b", gamma_initializer={"class_name": "Constant", "config": {"value": np.float32(0.5)}}),
        "größe": BatchNormalization(name="fresh", axis=2),
    }
    save(tmp_path / f"m{suffix}", layers)
    loaded = load(tmp_path / f"m{suffix}")
    assert list(loaded) == list(layers)
    assert [bn.name for bn in loaded.values()] == ["a", "b", "fresh"]
    assert [bn.built for bn in loaded.values()] == [True, True, False]
    assert all(_bits(loaded[name]) == _bits(layers[name]) for name in ("z/1", "z"))
    save(tmp_path / f"none{suffix}", {})
    assert load(tmp_path / f"none{suffix}") == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_layers_give_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    """No time of day, no order of a hash: files can be compared."""
    bn = _trained()
    for name in ("a", "b"):
        save(tmp_path / f"{name}{suffix}", bn)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".npz":
        with zipfile.ZipFile(tmp_path / "a.npz") as archive:
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_into_gives_values_and_leaves_configurations(suffix: str, tmp_path: Path) -> None:
    """A layer alone takes the file's only one; a mapping goes by name."""
    path, bn = tmp_path / f"layer{suffix}", _trained("saved", momentum=0.75)
    save(path, bn)
    for pick in (lambda target: target, lambda target: {"saved": target}):
        target = BatchNormalization(name="mine", momentum=0.5)
        target.build((None, None, 3))
        load_into(path, pick(target))
        assert _bits(target) == _bits(bn)
        assert (target.name, target.momentum) == ("mine", 0.5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_into_changes_nothing_unless_all_fits(suffix: str, tmp_path: Path) -> None:
    """The first of two layers fits, the second does not: both stay as they were."""
    path = tmp_path / f"two{suffix}"
    save(path, {"a": _trained("a"), "b": _trained("b")})
    fitting = BatchNormalization(name="first")
    fitting.build((None, None, 3))
    before = _bits(fitting)
    others: list[tuple[dict[str, Any], str]] = [
        ({"channels": 4}, r"gamma: float32\(4,\).* for layer 'second', received .*gamma: float32\(3,\)"),
        ({"dtype": "float64"}, r"gamma: float64\(3,\).*, received .*gamma: float32\(3,\)"),
        ({"center": False}, r"expected backward.deviation: .*, received .*, beta: float32\(3,\)"),
        ({"renorm": True}, r"renorm_mean: float32\(3,\).*, received "),
        ({"channels": None}, r"layer 'second' is not built: call its build\(input_shape\)\."),
    ]
    for arguments, text in others:
        channels = arguments.pop("channels", 3)
        other = BatchNormalization(name="second", **arguments)
        if channels is not None:
            other.build((None, None, channels))
        with pytest.raises(ValueError, match=f"two{suffix}: layer 'b': .*{text}"):
            load_into(path, {"a": fitting, "b": other})
        assert _bits(fitting) == before
    for layers, text in (
        ({"a": fitting}, "expected the layers a, received a, b."),
        (fitting, "expected one layer for layer 'first', received a, b. Pass a mapping by name."),
    ):
        with pytest.raises(ValueError, match=text):
            load_into(path, layers)
    assert _bits(fitting) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_unbuilt_layer_of_a_file_does_not_fit_a_built_one(suffix: str, tmp_path: Path) -> None:
    """There is nothing to give."""
    path, target = tmp_path / f"fresh{suffix}", _trained()
    save(path, BatchNormalization(name="fresh"))
    with pytest.raises(ValueError, match=r"layer 'fresh': expected .*, received no arrays \(not built\)\."):
        load_into(path, target)
    with pytest.raises(ValueError, match=r"layer 'fresh': layer 'mine' is not built: call its build"):
        load_into(path, BatchNormalization(name="mine"))


def _refusal(path: Path, target: BatchNormalization) -> str | None:
    """The text of the error that loading raises; None if it loads."""
    try:
        load_into(path, target)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_cut_and_every_flipped_byte_is_noticed(suffix: str, tmp_path: Path) -> None:
    """One ValueError that names the file, whatever was damaged; the layer keeps its values.

    A byte that carries no information (padding, a zip field that nobody reads) may change unnoticed: then what is
    loaded is right.
    """
    bn = _trained(channels=2, dtype="bfloat16")
    path, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    save(path, bn)
    data, target = path.read_bytes(), BatchNormalization(dtype="bfloat16", gamma_initializer="zeros")
    target.build((None, None, 2))
    before, noticed = target.state, 0
    unchanged = _bits(target)
    # A few hundred places, the ends included.
    places = sorted({*range(0, len(data), 1 + len(data) // 400), *range(64), *range(len(data) - 64, len(data))})
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 0x5A
        for broken in (data[:place], bytes(flipped)):
            damaged.write_bytes(broken)
            refusal = _refusal(damaged, target)
            if refusal is not None:
                assert refusal.startswith(f"{damaged}: ")
                assert _bits(target) == unchanged
                noticed += 1
            else:
                assert len(broken) == len(data)
                assert _bits(target) == _bits(bn)
                target.restore(before)
                target.set_weights([np.zeros(2), np.zeros(2), *target.get_weights()[2:]])
    assert noticed > 1.5 * len(places)


def test_a_flipped_bit_of_a_weight_is_noticed_by_the_digest(tmp_path: Path) -> None:
    """safetensors has no checksum of its own."""
    path = tmp_path / "layer.safetensors"
    save(path, _trained())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"layer.safetensors: its digest differs from what it says: the file is damaged"
    ):
        load(path)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "data", "text"),
    [
        (".safetensors", b"", "expected a whole safetensors file, received 0 bytes: "),
        (".safetensors", b"{}" * 50, "expected a whole safetensors file, received 100 bytes: "),
        (
            ".safetensors",
            safetensors.numpy.save({"weight": np.zeros(2)}),
            "expected metadata 'bnlayer' that describes layers, received nothing: another program's file.",
        ),
        (
            ".safetensors",
            safetensors.numpy.save({"weight": np.zeros(2)}, {"format": "pt"}),
            "expected metadata 'bnlayer' that describes layers, received format: another program's file.",
        ),
        (
            ".safetensors",
            safetensors.numpy.save({"weight": np.zeros(2, np.int8)}, {"bnlayer": "{}"}),
            "expected tensor 'weight' of F64, F32, F16, BF16, I64, received I8.",
        ),
        (".npz", b"", "expected a whole .npz archive, received 0 bytes: "),
        (".npz", _npy(np.zeros(3)), "expected a whole .npz archive, received 152 bytes: "),
        (".npz", _zip({"readme.txt": b"hello"}), "expected entry 'readme.txt' to be an array of numbers or text: "),
        (".npz", _zip({"a.npy": _npy(np.zeros(3))}), "expected a string 'bnlayer' that describes layers, received a: "),
        (".npz", _zip({"bnlayer.npy": _npy(np.zeros(3))}), "expected a string 'bnlayer' that describes layers, rec"),
        (
            ".npz",
            _zip({"a.npy": _npy(np.zeros(3)).replace(b"}", b"(")}),
            "expected entry 'a.npy' to be an array of numbers or text: ('EOF in multi-line statement'",
        ),
        (
            ".npz",
            _zip({"a.npy": _npy(np.array([{}], object))}),
            "expected entry 'a.npy' to be an array of numbers or text: Object arrays cannot be loaded",
        ),
    ],
)
def test_foreign_files_are_refused(suffix: str, data: bytes, text: str, tmp_path: Path) -> None:
    """Named, with what was expected; nothing is ever unpickled."""
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {text}")


def _without(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        del arrays[key]

    return change


def _array(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        arrays[key] = np.asarray(value)

    return change


def _told(**entries: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        description.update(entries)

    return change


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without("bn/gamma"), "expected the 9 arrays that it describes; missing: bn/gamma; not described: none."),
        (_array("bn/delta", [1.0]), "arrays that it describes; missing: none; not described: bn/delta."),
        (_array("bn/gamma", [1.0, 1.0]), "expected array 'bn/gamma' of dtype float32, received float64."),
        (_array("bn/gamma", np.ones(2, np.float32)), "its digest differs"),
        (_told(layers={"bn": {"ndim": 2, "config": {}}}), "its digest differs"),
        (_told(format_version=2), "expected format version 1, received 2."),
        (_told(layers=[]), "expected a description of layers, dtypes and digest, received ['digest', 'dtypes', "),
        (
            _told(layers={"bn": {"ndim": "2", "config": {}}}),
            "layer 'bn': expected its configuration and rank, received",
        ),
        (_told(layers={"bn": 3}), "layer 'bn': expected its configuration and rank, received 3."),
    ],
)
def test_changed_contents_are_refused(
    suffix: str, change: Callable[[dict[str, Any], dict[str, Any]], None], text: str, tmp_path: Path
) -> None:
    """A missing, added, reshaped or retyped array, or another description."""
    contents = describe({"bn": _trained()})
    arrays, description = dict(contents.arrays), json.loads(contents.description)
    change(arrays, description)
    path = tmp_path / f"changed{suffix}"
    path.write_bytes(CONTAINERS[suffix].encode(Contents(arrays, json.dumps(description))))
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("told", "arrays", "text"),
    [
        ({"ndim": 3, "config": {"axis": 9}}, {}, "layer 'bn': Axis 9 is out of bounds for input shape (3, 3, 3)"),
        ({"ndim": 10**9, "config": {}}, {}, "layer 'bn': Expected a rank of the inputs between 1 and 64, received"),
        ({"ndim": 3, "config": {"fused": 1}}, {}, "layer 'bn': its configuration is refused: Unrecognized keyword"),
        ({"ndim": 3, "config": {"axis": None}}, {}, "layer 'bn': its configuration is refused: int() argument"),
        ({"ndim": None, "config": {}}, None, ""),
        ({"ndim": 3, "config": {}}, None, "layer 'bn': expected moving_mean, received no arrays (not built)."),
        ({"ndim": 3, "config": {}}, {"moving_mean": np.zeros((1, 1))}, "layer 'bn': expected moving_mean, received "),
        ({"ndim": 3, "config": {}}, {"gamma": np.ones(2, np.float32)}, "received backward.deviation: "),
    ],
)
def test_consistent_files_that_describe_no_layer_are_refused(
    suffix: str,
    told: dict[str, Any],
    arrays: dict[str, NDArray[Any]] | None,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Digest and names are right, yet no layer is like that; the case without arrays is one that is not built."""
    contents = describe({"bn": _trained()})
    changed = {} if arrays is None else {**contents.arrays, **{f"bn/{key}": value for key, value in arrays.items()}}
    monkeypatch.setattr("bnlayer.interchange.contents._digest", lambda told, arrays: "right")
    dtypes = {key: array.dtype.name for key, array in changed.items()}
    description = {"format_version": 1, "digest": "right", "layers": {"bn": told}, "dtypes": dtypes}
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(CONTAINERS[suffix].encode(Contents(changed, json.dumps(description))))
    if not text:
        assert not load(path)["bn"].built
        return
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)


def test_arrays_of_no_described_layer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would vanish silently."""
    monkeypatch.setattr("bnlayer.interchange.contents._digest", lambda told, arrays: "right")
    description = {"format_version": 1, "digest": "right", "layers": {}, "dtypes": {"bn/gamma": "float32"}}
    contents = Contents({"bn/gamma": np.ones(2, np.float32)}, json.dumps(description))
    path = tmp_path / "stray.npz"
    path.write_bytes(CONTAINERS[".npz"].encode(contents))
    with pytest.raises(ValueError, match=r"expected arrays of the layers \(none\), received 'bn/gamma'\."):
        load(path)


def test_a_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    """Named by its beginning."""
    path = tmp_path / "text.safetensors"
    path.write_bytes(CONTAINERS[".safetensors"].encode(Contents({}, "not a description")))
    with pytest.raises(ValueError, match=r"expected a description in JSON, received 'not a description'"):
        load(path)


def test_other_endings_and_missing_files() -> None:
    """The ending chooses the container; a file that is not there is the system's error."""
    for use in (load, lambda path: load_into(path, {}), lambda path: save(path, {})):
        with pytest.raises(ValueError, match=r"layer.h5: expected a name that ends in .safetensors or .npz, rec"):
            use("layer.h5")
    with pytest.raises(FileNotFoundError):
        load("no/such/file.npz")


def test_layers_without_a_serialized_form_are_not_saved(tmp_path: Path) -> None:
    """The older file stays."""
    path = tmp_path / "layer.npz"
    save(path, _trained())
    data = path.read_bytes()
    with pytest.raises(ValueError, match="a plain callable can't be part of a layer's configuration"):
        save(path, BatchNormalization(gamma_constraint=lambda w: w))
    odd = BatchNormalization(gamma_initializer={"class_name": "Constant", "config": {"value": 1j}})
    with pytest.raises(ValueError, match=r"A configuration holds 1j, which has no form in JSON\."):
        save(path, odd)
    assert path.read_bytes() == data
    assert _names(tmp_path) == ["layer.npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_leaves_the_old_file_alone(
    suffix: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside it."""
    path = tmp_path / f"layer{suffix}"
    save(path, _trained())
    data = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save(path, _trained(channels=4))
    assert path.read_bytes() == data
    assert _names(tmp_path) == [path.name]


def test_a_file_takes_its_name_only_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole, synced, renamed within its folder, and the folder synced: in this order."""
    path, told = tmp_path / "layer.npz", []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        told.append(f"sync {'folder' if target.is_dir() else target.stat().st_size > 0}")
        sync(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        told.append(f"rename {old.parent == new.parent} {new.name}")
        return rename(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save(path, _trained())
    assert told == ["sync True", "rename True layer.npz", "sync folder"]
    assert _names(tmp_path) == ["layer.npz"]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    """Those of the process's umask, not a temporary file's private ones."""
    (tmp_path / "plain").write_bytes(b"")
    save(tmp_path / "layer.npz", _trained())
    assert (tmp_path / "layer.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode
