"""`bnlayer train`: options from a file and the command line, what is refused, and resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.core import TyperGroup
from typer.main import get_command

from bnworker.cli.commands import app
from bnworker.cli.files import Files
from bnworker.cli.started import main as start_rank
from bnworker.launcher import Job
from bnworker.train.loop import Replica
from bnworker.train.settings import Settings
from support.command_line import SMALL_RUN, Command, squeezed


def test_the_file_and_the_command_line(command: Command) -> None:
    """Every kind of value; what stands on the command line wins."""
    Path("run.toml").write_text(
        'transport = "none"\nhidden = [8, 4]\nepochs = 3\nbatch-size = 100\nlearning-rate = 0.5\nschedule = "step"\n'
        "decay-epochs = 1\ndry-run = true\n",
        encoding="utf-8",
    )
    code, out, err = command("train", "--config", "run.toml", "--epochs", "2")
    assert (code, err) == (0, "")
    plan = squeezed(out)
    assert " parameters 618 float32 " in plan  # 64·8 + 8·4 + 4·10 + 10 and 2·(8 + 4)
    assert " steps 30, 15 an epoch " in plan
    assert " learning rate step: 0.5 in the first step, 0.05 in the last " in plan
    assert " exchanges none " in plan


def test_the_ranks_get_every_option(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was given, zeros and flags too; but not what says how many ranks there are and how they meet."""
    started: list[Job] = []

    def launch(job: Job) -> int:
        started.append(job)
        return 7

    monkeypatch.setattr("bnworker.launcher.launch", launch)
    Path("run.toml").write_text("workers = 3\nseed = 4\nmomentum = 0.5\nresume = true\n", encoding="utf-8")
    code, _, err = command("train", "--config=run.toml", "--momentum=0", "--job=mine", "--save=a.safetensors")
    assert (code, err) == (7, "")
    assert (started[0].ranks, started[0].transport, started[0].name) == (3, "service", "mine")
    given = started[0].command[started[0].command.index("bnworker.cli.started") + 1 :]
    assert {"--momentum=0.0", "--seed=4", "--resume", "--save=a.safetensors", "--hidden=128,64"} <= set(given)
    names = {argument.partition("=")[0] for argument in given}
    assert names.isdisjoint({"--workers", "--transport", "--job", "--address", "--config", "--dry-run"})
    assert names.isdisjoint({"--steps", "--report"})


def test_a_rank_has_its_launchers_settings(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher passes on is read as it was given: numbers of every kind, words, names of files, and flags."""
    started: list[Job] = []

    def launch(job: Job) -> int:
        started.append(job)
        return 7

    monkeypatch.setattr("bnworker.launcher.launch", launch)
    options = (
        "--hidden=8,4",
        "--learning-rate=1e-3",
        "--dtype=float64",
        "--last-batch=drop",
        "--seed=3",
        "--classes=10",
    )
    code, _, err = command("train", "--workers=2", *options, "--save=a=b.safetensors", "--save-every=3", "--resume")
    assert (code, err) == (7, "")
    given = started[0].command[started[0].command.index("bnworker.cli.started") + 1 :]
    monkeypatch.setattr("bnworker.cli.rank.run", lambda *run, **how: runs.append((*run, how)))
    monkeypatch.setattr("sys.argv", ["started", *given])
    monkeypatch.setenv("BNLAYER_TRANSPORT", "alone")
    monkeypatch.setenv("BNLAYER_RANK", "0")
    monkeypatch.setenv("BNLAYER_WORLD_SIZE", "1")
    runs: list[tuple[object, ...]] = []
    start_rank()
    settings = Settings(
        hidden=(8, 4), learning_rate=1e-3, dtype="float64", last_batch="drop", seed=3, classes=10, batch_size=64
    )
    files = Files(save=Path("a=b.safetensors"), save_every=3, resume=True)
    how = {"transport": "alone", "address": None, "job": None, "replica": Replica(0, 1), "files": files}
    assert runs == [("digits", settings, how)]


ACCEPTED = (
    "address, batch-size, beta-constraint, beta-regularizer, bn-momentum, classes, data, decay, decay-epochs, dry-run, "
    "dtype, early-stop, elastic, epochs, epsilon, gamma-constraint, gamma-regularizer, hidden, hostfile, hosts, "
    "init-from, insecure, job, last-batch, learning-rate, max-restarts, momentum, nnodes, "
    "node-rank, rendezvous, report, resume, save, "
    "save-every, schedule, seed, ssh, steps, summary, tensorboard, transport, validation-split, "
    "warmup-steps, weight-decay, workers."
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("batch_size = 3", f"unknown key 'batch_size'. Did you mean 'batch-size'? Accepted are {ACCEPTED}"),
        ("epoch = 3", f"unknown key 'epoch'. Did you mean 'epochs'? Accepted are {ACCEPTED}"),
        ("xyzzy = 3", f"unknown key 'xyzzy'. Accepted are {ACCEPTED}"),
        ("config = 'a.toml'", f"unknown key 'config'. Accepted are {ACCEPTED}"),
        ("epochs = 2.5", "epochs = 2.5: "),
        ("epochs = 0", "epochs = 0: "),
        ("schedule = 'cyclic'", "schedule = 'cyclic': "),
        ("[train]\nepochs = 3", f"unknown key 'train'. Accepted are {ACCEPTED}"),
        ("data = {a = 1}", "data = {'a': 1}: expected a string, a number, a boolean or a list of them."),
        ("epochs = ", "Invalid value (at end of document)"),
    ],
)
def test_errors_in_a_file_name_the_key(text: str, line: str, command: Command) -> None:
    """One line: the file, the key, and what is accepted."""
    Path("run.toml").write_text(text, encoding="utf-8")
    code, out, err = command("train", "--config", "run.toml")
    assert (code, out) == (2, "")
    assert err.startswith(f"bnlayer: train: --config run.toml: {line}")
    assert err.count("\n") == 1


def test_a_file_that_is_not_there(command: Command) -> None:
    """Named, with the reason."""
    assert command("train", "--config", "none.toml") == (
        2,
        "",
        "bnlayer: train: --config none.toml: No such file or directory\n",
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--resume"], "--resume needs --save FILE.safetensors, the file that it is about."),
        (["--save-every=3"], "--save-every needs --save FILE.safetensors, the file that it is about."),
        (
            ["--resume", "--save=a", "--transport=none", "--workers=2"],
            (
                "--resume: the 2 replicas of --transport none are models of their own, and --save keeps the first "
                "one's alone. Leave out --resume, or use --transport service or mpi."
            ),
        ),
        (
            ["--gamma-regularizer=l3"],
            (
                "--gamma-regularizer: expected one of l1, l2, l1_l2, those with factors as NAME=FACTOR (finite, >= 0), "
                "e.g. l2=1e-4; received 'l3'."
            ),
        ),
        (
            ["--beta-constraint=l2"],
            (
                "--beta-constraint: expected one of non_neg, max_norm, unit_norm, those with factors as NAME=FACTOR "
                "(finite, >= 0), e.g. max_norm=2; received 'l2'."
            ),
        ),
        (["--epsilon=0"], "--epsilon: expected a finite number > 0, received 0.0."),
        (
            ["--early-stop=2"],
            (
                "--early-stop watches the validation loss, and there are no validation rows: give "
                "--validation-split too, e.g. 0.1."
            ),
        ),
    ],
)
def test_options_that_cannot_work(arguments: list[str], line: str, command: Command) -> None:
    """Said before anything is started."""
    assert command("train", *arguments) == (2, "", f"bnlayer: train: {line}\n")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--workers=2", "--elastic=1:2", "--transport=mpi"],
            (
                "bnlayer: train: --elastic needs the statistics service, received transport mpi: there the loss of a "
                "rank ends the job. Leave out --transport; or start the ranks by Open MPI's `mpirun --with-ft ulfm`.\n"
            ),
        ),
        (["--elastic=2"], "bnlayer: train: --elastic: expected MIN:MAX, such as 2:8, received '2'.\n"),
        (["--elastic=2:4"], "bnlayer: train: --elastic 2:4: expected 2 to 4 ranks to start with, received 1.\n"),
    ],
)
def test_an_elastic_run_that_cannot_be(options: list[str], line: str, command: Command) -> None:
    """It is told before anything is started."""
    assert command("train", *options) == (2, "", line)


@pytest.mark.parametrize(
    ("environ", "options"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, []),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, []),
        ({"RANK": "0", "WORLD_SIZE": "2", "OMPI_MCA_mpi_ft_enable": "1"}, []),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_mpi_ft_enable": "1"},
            ["--transport=service", "--address=127.0.0.1:1"],
        ),
    ],
)
def test_an_elastic_run_under_another_launcher(
    environ: dict[str, str], options: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start no rank again, and none would survive but over MPI, where it was started so."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("train", "--elastic=1:2", *options)
    assert code == 2
    assert err.startswith("bnlayer: train: --elastic 1:2, but ")
    assert "started this process as rank 0, and starts no rank again: leave it out, or let bnlayer start" in err


def test_a_file_that_is_no_checkpoint(command: Command) -> None:
    """Said by the launcher, in one line, before it starts a rank."""
    Path("run.safetensors").write_bytes(b"garbage, that is what it is")
    code, out, err = command("train", "--save=run.safetensors", "--resume", "--workers=2")
    assert (code, out) == (2, "")
    assert err.startswith("bnlayer: train: run.safetensors is no complete safetensors file (")
    assert err.count("\n") == 1


def test_another_runs_checkpoint(command: Command) -> None:
    """Other options, then other data: both in one line."""
    assert command("train", *SMALL_RUN, "--save=run.safetensors")[0] == 0
    assert command("train", *SMALL_RUN, "--save=run.safetensors", "--resume", "--seed=4", "--momentum=0") == (
        2,
        "",
        (
            "bnlayer: train: --resume: run.safetensors belongs to a run with other options: --momentum was 0.9, "
            "now 0.0; --seed was 0, now 4. Give the same ones, or --save to another file.\n"
        ),
    )
    rng = np.random.default_rng(0)
    np.savez("mine.npz", x=rng.standard_normal((50, 64)), y=np.arange(50) % 10)
    code, _, err = command("train", *SMALL_RUN, "--save=run.safetensors", "--resume", "--data=mine.npz")
    assert code == 2
    assert err.startswith("bnlayer: train: --resume: run.safetensors belongs to a run on other data: it was digits (")
    assert err.count("\n") == 1


def test_a_resumed_run_equals_an_uninterrupted_one(command: Command) -> None:
    """By the command, in one process: the same file, and the table says what was made before."""
    assert command("train", *SMALL_RUN, "--save=whole.safetensors")[0] == 0
    assert command("train", *SMALL_RUN, "--save=parts.safetensors", "--resume", "--steps=2")[0] == 0
    assert Path("whole.safetensors").read_bytes() != Path("parts.safetensors").read_bytes()
    assert command("train", *SMALL_RUN, "--save=parts.safetensors", "--resume")[0] == 0
    assert Path("whole.safetensors").read_bytes() == Path("parts.safetensors").read_bytes()
    assert command("export", "whole.safetensors", "weights.npz")[0] == 0
    assert np.load("weights.npz")["dense_1/kernel"].shape == (64, 8)
    assert command("export", "whole.safetensors", "weights.pt") == (
        2,
        "",
        "bnlayer: export: weights.pt: expected a name that ends in .npz or .safetensors.\n",
    )
    assert command("export", "none.safetensors", "weights.npz") == (
        2,
        "",
        "bnlayer: export: none.safetensors: no such file.\n",
    )


@pytest.mark.parametrize(("name", "on"), [("resume", "--resume"), ("dry-run", "--dry-run")])
def test_flags_of_a_file_can_be_turned_off(
    name: str, on: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line beats the file in both directions."""
    started: list[Job] = []

    def launch(job: Job) -> int:
        started.append(job)
        return 0

    monkeypatch.setattr("bnworker.launcher.launch", launch)
    for text, options, holds in (
        ("true", [], True),
        ("true", [f"--no-{name}"], False),
        ("false", [], False),
        ("false", [on], True),
    ):
        started.clear()
        Path("run.toml").write_text(f"{name} = {text}\nsave = 'a.safetensors'\n", encoding="utf-8")
        assert command("train", "--config=run.toml", *options)[::2] == (0, "")
        assert holds == (not started if name == "dry-run" else "--resume" in started[0].command)


def test_every_flag_can_be_turned_off() -> None:
    """Of the commands whose options a file can give."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    flags = [option for option in group.commands["train"].params if getattr(option, "is_flag", False)]
    assert [option.name for option in flags] == ["dry_run", "insecure", "resume"]
    assert all(option.secondary_opts == [f"--no-{option.opts[0][2:]}"] for option in flags)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["--transport=none", "--dry-run"]),
        ("train", ["--transport=mpi", "--dry-run"]),
        ("evaluate", ["--transport=mpi", "--workers=2", "none.safetensors"]),
        ("calibrate", ["--transport=mpi", "--workers=2", "none.safetensors", "out.safetensors"]),
        ("launch", ["--transport=mpi", "-n0", "--", "true"]),
    ],
)
def test_an_address_needs_the_service(
    name: str, arguments: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silently ignored; as a variable, which may be there for other jobs, it still is."""
    transport = arguments[0].partition("=")[2]
    line = (
        f"bnlayer: {name}: --address is of a statistics service, and --transport {transport} uses none: leave out one "
        "of them.\n"
    )
    assert command(name, "--address=h:1", *arguments) == (2, "", line)
    without = command(name, *arguments)
    monkeypatch.setenv("BNLAYER_ADDRESS", "h:1")
    assert command(name, *arguments) == without
