"""Layers in files: whole, exact, atomic."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.interchange import load, load_into, save
from support.files import SUFFIXES, bits, trained

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


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
    bn = trained(channels=channels, dtype=policy, momentum=0.75, **arguments)
    save(tmp_path / f"layer{suffix}", bn)
    (loaded,) = load(tmp_path / f"layer{suffix}").values()
    assert loaded.get_config() == bn.get_config()
    assert (loaded.state.version, loaded.state.forward.is_probed, loaded.state.backward.is_probed) == (2, True, True)
    assert bits(loaded) == bits(bn)
    x = np.random.default_rng(6).normal(3, 2, (4, 4, channels))
    assert loaded(x, training=True).tobytes() == bn(x, training=True).tobytes()
    assert loaded.backward(x).tobytes() == bn.backward(x).tobytes()
    assert bits(loaded) == bits(bn)
    with pytest.raises(ValueError, match="expected ndim=3"):
        loaded(np.zeros((4, channels)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_layers_keep_their_names_and_order(suffix: str, tmp_path: Path) -> None:
    """Also one that is not built, names with slashes, and an empty mapping."""
    layers = {
        "z/1": trained("a", axis=1, channels=4, dtype="bfloat16"),
        "z": trained("b", gamma_initializer={"class_name": "Constant", "config": {"value": np.float32(0.5)}}),
        "größe": BatchNormalization(name="fresh", axis=2),
    }
    save(tmp_path / f"m{suffix}", layers)
    loaded = load(tmp_path / f"m{suffix}")
    assert list(loaded) == list(layers)
    assert [bn.name for bn in loaded.values()] == ["a", "b", "fresh"]
    assert [bn.built for bn in loaded.values()] == [True, True, False]
    assert all(bits(loaded[name]) == bits(layers[name]) for name in ("z/1", "z"))
    save(tmp_path / f"none{suffix}", {})
    assert load(tmp_path / f"none{suffix}") == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_layers_give_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    """No time of day, no order of a hash: files can be compared."""
    bn = trained()
    for name in ("a", "b"):
        save(tmp_path / f"{name}{suffix}", bn)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".npz":
        with zipfile.ZipFile(tmp_path / "a.npz") as archive:
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_into_gives_values_and_leaves_configurations(suffix: str, tmp_path: Path) -> None:
    """A layer alone takes the file's only one; a mapping goes by name."""
    path, bn = tmp_path / f"layer{suffix}", trained("saved", momentum=0.75)
    save(path, bn)
    for pick in (lambda target: target, lambda target: {"saved": target}):
        target = BatchNormalization(name="mine", momentum=0.5)
        target.build((None, None, 3))
        load_into(path, pick(target))
        assert bits(target) == bits(bn)
        assert (target.name, target.momentum) == ("mine", 0.5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_into_changes_nothing_unless_all_fits(suffix: str, tmp_path: Path) -> None:
    """The first of two layers fits, the second does not: both stay as they were."""
    path = tmp_path / f"two{suffix}"
    save(path, {"a": trained("a"), "b": trained("b")})
    fitting = BatchNormalization(name="first")
    fitting.build((None, None, 3))
    before = bits(fitting)
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
        assert bits(fitting) == before
    for layers, text in (
        ({"a": fitting}, "expected the layers a, received a, b."),
        (fitting, "expected one layer for layer 'first', received a, b. Pass a mapping by name."),
    ):
        with pytest.raises(ValueError, match=text):
            load_into(path, layers)
    assert bits(fitting) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_unbuilt_layer_of_a_file_does_not_fit_a_built_one(suffix: str, tmp_path: Path) -> None:
    """There is nothing to give."""
    path, target = tmp_path / f"fresh{suffix}", trained()
    save(path, BatchNormalization(name="fresh"))
    with pytest.raises(ValueError, match=r"layer 'fresh': expected .*, received no arrays \(not built\)\."):
        load_into(path, target)
    with pytest.raises(ValueError, match=r"layer 'fresh': layer 'mine' is not built: call its build"):
        load_into(path, BatchNormalization(name="mine"))


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
    save(path, trained())
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
    save(path, trained())
    data = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        save(path, trained(channels=4))
    assert path.read_bytes() == data
    assert _names(tmp_path) == [path.name]


def test_a_file_takes_its_name_only_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole, synced, renamed within its folder, and the folder synced: in this order."""
    path, reported = tmp_path / "layer.npz", []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        reported.append(f"sync {'folder' if target.is_dir() else target.stat().st_size > 0}")
        sync(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        reported.append(f"rename {old.parent == new.parent} {new.name}")
        return rename(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save(path, trained())
    assert reported == ["sync True", "rename True layer.npz", "sync folder"]
    assert _names(tmp_path) == ["layer.npz"]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    """Those of the process's umask, not a temporary file's private ones."""
    (tmp_path / "plain").write_bytes(b"")
    save(tmp_path / "layer.npz", trained())
    assert (tmp_path / "layer.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_can_hold_are_refused(suffix: str, name: str, tmp_path: Path) -> None:
    """Also of a layer that goes by another name in the file; the older file stays."""
    path = tmp_path / f"layer{suffix}"
    save(path, trained())
    data = path.read_bytes()
    for layers in (BatchNormalization(name=name), {name: trained()}, {"fine": trained(name)}):
        with pytest.raises(ValueError, match="expected a name that a file can hold") as raised:
            save(path, layers)
        assert repr(name) in str(raised.value)
    assert path.read_bytes() == data
