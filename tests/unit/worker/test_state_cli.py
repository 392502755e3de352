"""`bnlayer state`: what is in a state directory, for people and for programs, and what may be changed there."""

import asyncio
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bnlayer import BatchNormalization, interchange
from bnserver.checkpoints import Checkpoints
from bnserver.core.effects import Checkpoint
from bnserver.job_file import file_name
from bnserver.state_survey import survey
from bnserver.store import Store
from bnworker.cli.commands import app
from bnworker.cli.errors import CommandError

_GOLDEN = Path(__file__).parents[2] / "golden" / "state" / "with-directory-id" / "jobs"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A service's state directory: one job is over, one failed, one was in the middle of a run."""
    return Path(shutil.copytree(_GOLDEN, tmp_path / "state"))


def _run(directory: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["state", *arguments, "--state-dir", str(directory)], env={"COLUMNS": "120"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def _refused(directory: Path, *arguments: str) -> tuple[int, str]:
    """How `main` would end it: the error is one line on stderr."""
    result = CliRunner().invoke(app, ["state", *arguments, "--state-dir", str(directory)])
    assert isinstance(result.exception, CommandError), result.output
    return result.exception.code, str(result.exception)


def _bits(directory: Path, job: str) -> dict[str, dict[str, bytes]]:
    (entry,) = [entry for entry in survey(directory) if entry.job == job]
    assert not entry.fault
    return {
        layer: {name: array.tobytes() for name, array in state.arrays().items()}
        for layer, state in entry.layers.items()
    }


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".job"}


@pytest.mark.parametrize("command", ["show", "verify", "checkpoints", "export", "import", "restore", "forget"])
def test_help_teaches(command: str) -> None:
    """An example that can be copied, the exit codes, and whether the service must be stopped."""
    shown = " ".join(CliRunner().invoke(app, ["state", command, "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert f"bnlayer state {command} " in shown
    assert "xit code" in shown
    assert (
        "The service must not be running" if command in ("import", "restore", "forget") else "may be running"
    ) in shown


def test_jobs_are_listed(directory: Path) -> None:
    """What became of each, and how much it is."""
    lines = [line for line in _run(directory, "show").stdout.splitlines() if "│" in line]
    assert [[word.strip() for word in line.split("│")[1:5]] for line in lines] == [
        ["failed", "failed", "1", "1"],
        ["over", "over", "1", "4"],
        ["running", "unfinished", "2", "4"],
    ]
    listed = json.loads(_run(directory, "show", "--json").stdout)
    assert [(job["job"], job["state"], job["generation"], job["snapshot"]) for job in listed] == [
        ("failed", "failed", 1, 1),
        ("over", "over", 1, 1),
        ("running", "unfinished", 2, 1),
    ]


def test_a_jobs_layers_are_shown(directory: Path) -> None:
    """Channels, versions, and the ranges of the moving statistics: those that the file holds."""
    said = _run(directory, "show", "running").stdout
    assert said.startswith("job running: unfinished, generation 2: 2 of 2 ranks may come back\n")
    assert f"{directory / file_name('running')}: snapshot 1 and 22 records after it, " in said
    assert "│ ü/renorm │        6 │ float32, renorm │       4 │" in said
    shown: Any = json.loads(_run(directory, "show", "running", "--json").stdout)
    (entry,) = [entry for entry in survey(directory) if entry.job == "running"]
    assert list(shown["layers"]) == ["plain", "ü/renorm", "double", "half"]
    for name, layer in shown["layers"].items():
        state = entry.layers[name]
        assert (layer["channels"], layer["version"]) == (6, state.version)
        for statistic, vector in state.moving.vectors.items():
            assert layer[statistic] == {"min": float(vector.min()), "max": float(vector.max())}


def test_what_ranks_said_can_not_do_anything_to_a_terminal(directory: Path, tmp_path: Path) -> None:
    """Names and reasons are theirs."""
    file = tmp_path / "layers.npz"
    layer = BatchNormalization(name="a")
    layer.build((None, 2))
    interchange.save(file, {"\x1b[31mred": layer})
    _run(directory, "import", "job\x1b[2J\n", str(file))
    for shown in (_run(directory, "show").output, _run(directory, "show", "job\x1b[2J\n").output):
        assert "\x1b" not in shown
        assert "job\\x1b[2J\\n" in shown


def test_what_is_damaged_is_named(directory: Path) -> None:
    """Each file with which the service would not start; the others are shown all the same, and nothing is changed."""
    assert _run(directory, "verify").stdout == "3 files, all sound\n"
    flipped = directory / file_name("over")
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    copy = directory / "copy of running.job"
    shutil.copy(directory / file_name("running"), copy)
    torn = directory / file_name("failed")
    torn.write_bytes(torn.read_bytes() + b"half")
    before = _contents(directory)
    checked = _run(directory, "verify", code=1)
    assert f"The snapshot {flipped} is corrupt: " in checked.stderr
    assert checked.stderr.count(f"The state directory holds job 'running' more than once: {copy} ") == 1
    assert f"{torn} ends in 4 bytes of an entry that was being written" in checked.stdout
    assert checked.stdout.endswith("4 files, 3 of them damaged\n")
    shown = _run(directory, "show", code=1)
    assert f"│ {flipped.name} │ damaged" in shown.stdout
    assert _run(directory, "show", "failed").exit_code == 0
    assert _refused(directory, "export", "over", "o.npz") == (1, f"state export: {_fault(directory, flipped)}")
    assert _contents(directory) == before


def _fault(directory: Path, path: Path) -> str:
    (entry,) = [entry for entry in survey(directory) if entry.path == path]
    return entry.fault


def test_what_was_exported_comes_back_to_the_bit(directory: Path, tmp_path: Path) -> None:
    """As a job of another name, beside those that are there; and as layers, without a service."""
    file = tmp_path / "running.safetensors"
    assert _run(directory, "export", "running", str(file)).stdout == f"{file}: 4 layers of job 'running'\n"
    before = _contents(directory)
    _run(directory, "import", "copy", str(file))
    assert _bits(directory, "copy") == _bits(directory, "running")
    assert _contents(directory).items() > before.items()
    layers = interchange.load(file)
    assert {name: layer.state.version for name, layer in layers.items()} == {
        "plain": 6, "ü/renorm": 4, "double": 4, "half": 4
    }  # fmt: skip
    assert layers["plain"](np.ones((2, 6), np.float32)).shape == (2, 6)


def test_import_replaces_a_job_only_where_that_is_said(directory: Path, tmp_path: Path) -> None:
    """Then wholly, and a run that was not finished can't go on: its ranks would bring back what is gone."""
    layer = BatchNormalization(name="a", dtype="float64")
    layer.build((None, 2))
    file = tmp_path / "layers.safetensors"
    interchange.save(file, layer)  # with gamma and beta, as `bnlayer export --names bnlayer` writes it
    code, text = _refused(directory, "import", "running", str(file))
    assert (code, text) == (2, "state import: There is a job 'running' already: give another name, or --replace.")
    _run(directory, "import", "running", str(file), "--replace")
    (entry,) = [entry for entry in survey(directory) if entry.job == "running"]
    assert (entry.state, entry.generation, entry.snapshot, list(entry.layers)) == ("failed", 2, 2, ["a"])
    assert entry.text == "The job's statistics were replaced by bnlayer state import or restore. Start the job again."


@pytest.mark.parametrize(
    ("arrange", "text"),
    [
        (lambda layer: layer, "layer 'a' was not built, so it has no statistics."),
        (
            lambda layer: (layer.build((None, 2)), layer.moving_variance.assign([1.0, -1.0])),
            "layer 'a': expected numbers of 0 or more in moving_variance, received -1.",
        ),
    ],
)
def test_import_takes_what_a_rank_may_send_and_nothing_else(
    directory: Path, tmp_path: Path, arrange: Any, text: str
) -> None:
    """One validation for all that enters."""
    layer = BatchNormalization(name="a")
    arrange(layer)
    file = tmp_path / "layers.npz"
    interchange.save(file, layer)
    assert _refused(directory, "import", "new", str(file)) == (2, f"state import: {file}: {text}")
    assert not (directory / file_name("new")).exists()


def test_a_forgotten_job_is_gone(directory: Path) -> None:
    """A damaged one, too, so that the service can start; the others stay."""
    for job in ("over", "failed"):
        path = directory / file_name(job)
        if job == "failed":
            path.write_bytes(b"damaged")
        assert _run(directory, "forget", job).stdout == f"job {job!r} is forgotten\n"
        assert not path.exists()
    assert list(_contents(directory)) == [file_name("running")]


def test_what_is_not_there_is_said(directory: Path, tmp_path: Path) -> None:
    """With a guess where there is one."""
    assert _refused(directory, "forget", "runing") == (
        2,
        f"state forget: there is no job 'runing' in {directory}. Did you mean 'running'?",
    )
    assert _refused(directory, "show", "x") == (
        2,
        f"state show: there is no job 'x' in {directory}. There are 3: bnlayer state show lists them.",
    )
    assert _refused(tmp_path / "no", "verify") == (2, f"state: --state-dir {tmp_path / 'no'}: no such directory.")
    assert not (tmp_path / "no").exists()


@pytest.fixture
def held(directory: Path) -> Iterator[Path]:
    """A directory that a service uses."""
    store = Store(directory)
    yield directory
    store.close()


def test_a_directory_in_use_is_read_and_not_changed(held: Path, tmp_path: Path) -> None:
    """Who uses it is said."""
    before, file = _contents(held), tmp_path / "o.npz"
    _run(held, "show")
    _run(held, "verify")
    _run(held, "export", "over", str(file))
    who = f"pid {os.getpid()} on host {socket.gethostname()}"
    for arguments in (["import", "new", str(file)], ["forget", "over"]):
        code, text = _refused(held, *arguments)
        assert code == 2
        assert text.startswith(
            f"state {arguments[0]}: {held} is in use by {who}. Stop that service first (kill -TERM, "
        )
    assert _contents(held) == before


@pytest.fixture
def kept(directory: Path) -> Path:
    """Job "over" has two checkpoints: of its own layers, and of one layer less."""
    (entry,) = [entry for entry in survey(directory) if entry.job == "over"]
    less = dict(list(entry.layers.items())[1:])
    checkpoints = Checkpoints(directory, 9, None)
    for name, step, layers in (("epoch-1", 100, less), ("epoch-2", 2**40, entry.layers)):
        asyncio.run(checkpoints.write(Checkpoint((), 1, "over", name, step, layers)))
    return directory


def test_checkpoints_are_listed(kept: Path) -> None:
    """The first one first, each with its step."""
    lines = [line for line in _run(kept, "checkpoints", "over").stdout.splitlines() if "│" in line]
    assert [[word.strip() for word in line.split("│")[1:4]] for line in lines] == [
        ["epoch-1", "100", "3"],
        ["epoch-2", "1,099,511,627,776", "4"],
    ]
    listed = json.loads(_run(kept, "checkpoints", "over", "--json").stdout)
    assert [(each["checkpoint"], each["step"], each["number"], len(each["layers"])) for each in listed] == [
        ("epoch-1", 100, 1, 3),
        ("epoch-2", 2**40, 2, 4),
    ]
    assert _refused(kept, "checkpoints", "failed") == (
        2,
        f"state checkpoints: job 'failed' has no checkpoints in {kept}.",
    )


def test_a_job_is_restored_by_name(kept: Path) -> None:
    """As it was, or as another job; a run that was not finished can't go on, and the checkpoints stay."""
    _run(kept, "restore", "over", "epoch-2", "--to", "again")
    assert _bits(kept, "again") == _bits(kept, "over")
    _run(kept, "restore", "over", "epoch-1")
    assert list(_bits(kept, "over")) == list(_bits(kept, "again"))[1:]
    assert len(json.loads(_run(kept, "checkpoints", "over", "--json").stdout)) == 2
    assert _refused(kept, "restore", "over", "epoch-1", "--to", "failed") == (
        2,
        "state restore: There is a job 'failed' already: give another name, or forget it first.",
    )
    assert _refused(kept, "restore", "over", "epoch-3") == (
        2,
        "state restore: job 'over' has no checkpoint 'epoch-3'; the latest are: 'epoch-1', 'epoch-2'.",
    )


def test_a_checkpoint_is_exported(kept: Path, tmp_path: Path) -> None:
    """Its layers, and not the job's."""
    _run(kept, "export", "over", str(tmp_path / "one.npz"), "--checkpoint", "epoch-1")
    assert list(interchange.load(tmp_path / "one.npz")) == list(_bits(kept, "over"))[1:]


def test_a_damaged_checkpoint_takes_no_job_back(kept: Path) -> None:
    """It is named, with exit code 1; the job is as it was."""
    (path,) = kept.glob("over*.epoch-1.checkpoint")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = _contents(kept)
    shown = _run(kept, "checkpoints", "over", code=1)
    assert "damaged" in shown.stdout
    assert f"The snapshot {path} is corrupt" in shown.stderr
    code, text = _refused(kept, "restore", "over", "epoch-1")
    assert (code, f"{path} is corrupt" in text) == (1, True)
    assert _contents(kept) == before


def test_a_job_and_its_checkpoints_are_forgotten(kept: Path) -> None:
    """All of them."""
    _run(kept, "forget", "over")
    assert not list(kept.glob("over*"))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30 + 1)


def _bomb(path: Path) -> None:
    """A small archive that says that it holds 2 GiB, and does hold a MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**20))
    path.write_bytes(path.read_bytes().replace((2**20).to_bytes(4, "little"), (2**31).to_bytes(4, "little")))


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("pipe.npz", os.mkfifo, "expected a regular file, received a pipe, a socket or a device."),
        ("zero.safetensors", lambda path: path.symlink_to("/dev/zero"), "expected a regular file"),
        ("sparse.safetensors", _sparse, "of up to 1,073,741,824 bytes of layers, received 1,073,741,825."),
        ("bomb.npz", _bomb, "of up to 1,073,741,824 bytes of layers, received 2,147,483,648."),
    ],
)
def test_a_file_from_anybody_neither_hangs_nor_fills_the_memory(
    name: str, make: Callable[[Path], Any], text: str, directory: Path, tmp_path: Path
) -> None:
    """A pipe was waited for without end, a device and an archive of zeros were read until there was no memory."""
    make(tmp_path / name)
    before = _contents(directory)
    code, error = _refused(directory, "import", "mine", str(tmp_path / name))
    assert (code, error.startswith(f"state import: {tmp_path / name}: "), text in error) == (2, True, True), error
    assert _contents(directory) == before


def test_a_layer_of_any_name_is_refused_in_few_words(directory: Path, tmp_path: Path) -> None:
    """The error had all of it."""
    layer = BatchNormalization(name="a", center=False, scale=False)
    layer.build((None, 2))
    interchange.save(tmp_path / "long.npz", {"x" * 50_000: layer})
    code, error = _refused(directory, "import", "mine", str(tmp_path / "long.npz"))
    assert (code, len(error) < 1000) == (2, True)
    assert "expected a layer name of 1 to 200 characters" in error
