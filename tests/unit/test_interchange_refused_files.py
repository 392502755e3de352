"""What is no file of ours, or not any more, is refused before a layer changes."""

from __future__ import annotations

import io
import json
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
from support.files import SUFFIXES, bits, trained


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
    bn = trained(channels=2, dtype="bfloat16")
    path, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    save(path, bn)
    data, target = path.read_bytes(), BatchNormalization(dtype="bfloat16", gamma_initializer="zeros")
    target.build((None, None, 2))
    before, noticed = target.state, 0
    unchanged = bits(target)
    # A few hundred places, the ends included.
    offsets = sorted({*range(0, len(data), 1 + len(data) // 400), *range(64), *range(len(data) - 64, len(data))})
    for offset in offsets:
        flipped = bytearray(data)
        flipped[offset] ^= 0x5A
        for broken in (data[:offset], bytes(flipped)):
            damaged.write_bytes(broken)
            refusal = _refusal(damaged, target)
            if refusal is not None:
                assert refusal.startswith(f"{damaged}: ")
                assert bits(target) == unchanged
                noticed += 1
            else:
                assert len(broken) == len(data)
                assert bits(target) == bits(bn)
                target.restore(before)
                target.set_weights([np.zeros(2), np.zeros(2), *target.get_weights()[2:]])
    assert noticed > 1.5 * len(offsets)


def test_a_flipped_bit_of_a_weight_is_noticed_by_the_digest(tmp_path: Path) -> None:
    """safetensors has no checksum of its own."""
    path = tmp_path / "layer.safetensors"
    save(path, trained())
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


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
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
            "expected entry 'a.npy' to be an array of numbers or text: (",  # and what this Python says of the header
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


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("names", "use"),
    [
        (("0.weight", "1.running_mean", "1.running_var"), "interchange.from_torch(arrays, prefix='1.', ndim=…, eps=…)"),
        (
            ("dense_1/kernel", "bn_1/gamma", "bn_1/moving_mean"),
            "interchange.from_keras([arrays[f'bn_1/{weight}'] for weight in ('gamma', 'beta', …)], config, ndim=…)",
        ),
    ],
)
def test_weights_alone_are_refused_with_what_takes_them(
    suffix: str, names: tuple[str, ...], use: str, tmp_path: Path
) -> None:
    """As `bnlayer export` writes them: they don't say what the layers are."""
    path = tmp_path / f"weights{suffix}"
    arrays = {name: np.ones(3, np.float32) for name in names}
    if suffix == ".npz":
        np.savez(path, allow_pickle=False, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: expected ")
    assert "weights alone, in " in text and "`bnlayer export`" in text
    assert f"pass them to {use}; or export a checkpoint with --names bnlayer." in text


def test_a_checkpoint_is_refused_with_the_command_that_makes_layers_of_it(tmp_path: Path) -> None:
    """Its description is JSON under the same name, but of a whole run."""
    path = tmp_path / "run.safetensors"
    facts = {"format": 1, "settings": {}, "data": {}, "progress": {}, "checksum": ""}
    path.write_bytes(safetensors.numpy.save({"bn_1/gamma": np.ones(3)}, {"bnlayer": json.dumps(facts)}))
    for use in (load, lambda path: load_into(path, {})):
        with pytest.raises(ValueError) as caught:
            use(path)
        assert str(caught.value) == (
            f"{path}: expected layers that interchange.save wrote, received a checkpoint of `bnlayer train --save`: "
            "`bnlayer export FILE layers.safetensors --names bnlayer` writes its layers as this reads them."
        )


def _without(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        del arrays[key]

    return change


def _array(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        arrays[key] = np.asarray(value)

    return change


def _with(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], description: dict[str, Any]) -> None:
        description.update(fields)

    return change


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_without("bn/gamma"), "expected the 9 arrays that it describes; missing: bn/gamma; not described: none."),
        (_array("bn/delta", [1.0]), "arrays that it describes; missing: none; not described: bn/delta."),
        (_array("bn/gamma", [1.0, 1.0]), "expected array 'bn/gamma' of dtype float32, received float64."),
        (_array("bn/gamma", np.ones(2, np.float32)), "its digest differs"),
        (_with(layers={"bn": {"ndim": 2, "config": {}}}), "its digest differs"),
        (_with(format_version=2), "expected format version 1, received 2."),
        (_with(layers=[]), "expected a description of layers, dtypes and digest, received ['digest', 'dtypes', "),
        (
            _with(layers={"bn": {"ndim": "2", "config": {}}}),
            "layer 'bn': expected its configuration and rank, received",
        ),
        (_with(layers={"bn": 3}), "layer 'bn': expected its configuration and rank, received 3."),
    ],
)
def test_changed_contents_are_refused(
    suffix: str, change: Callable[[dict[str, Any], dict[str, Any]], None], text: str, tmp_path: Path
) -> None:
    """A missing, added, reshaped or retyped array, or another description."""
    contents = describe({"bn": trained()})
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
    ("described", "arrays", "text"),
    [
        ({"ndim": 3, "config": {"axis": 9}}, {}, "layer 'bn': Axis 9 is out of bounds for input shape (3, 3, 3)"),
        ({"ndim": 10**9, "config": {}}, {}, "layer 'bn': Expected a rank of the inputs between 1 and 64, received"),
        ({"ndim": 3, "config": {"fused": 1}}, {}, "layer 'bn': its configuration is refused: Unrecognized keyword"),
        (
            {"ndim": 3, "config": {"axis": None}},
            {},
            "layer 'bn': its configuration is refused: axis: expected an integer",
        ),
        ({"ndim": None, "config": {}}, None, ""),
        ({"ndim": 3, "config": {}}, None, "layer 'bn': expected moving_mean, received no arrays (not built)."),
        ({"ndim": 3, "config": {}}, {"moving_mean": np.zeros((1, 1))}, "layer 'bn': expected moving_mean, received "),
        ({"ndim": 3, "config": {}}, {"gamma": np.ones(2, np.float32)}, "received backward.deviation: "),
    ],
)
def test_consistent_files_that_describe_no_layer_are_refused(
    suffix: str,
    described: dict[str, Any],
    arrays: dict[str, NDArray[Any]] | None,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Digest and names are right, yet no layer is like that; the case without arrays is one that is not built."""
    contents = describe({"bn": trained()})
    changed = {} if arrays is None else {**contents.arrays, **{f"bn/{key}": value for key, value in arrays.items()}}
    monkeypatch.setattr("bnlayer.interchange.contents._digest", lambda described, arrays: "right")
    dtypes = {key: array.dtype.name for key, array in changed.items()}
    description = {"format_version": 1, "digest": "right", "layers": {"bn": described}, "dtypes": dtypes}
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
    monkeypatch.setattr("bnlayer.interchange.contents._digest", lambda described, arrays: "right")
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
