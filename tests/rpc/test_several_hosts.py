"""`bnlayer launch` and `train` on several hosts: network namespaces, whose interfaces count what crosses the wire."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.hosts import Host, hosts, needs_root
from support.processes import PYTHON, launch, script
from support.running import Running
from support.several import COMPUTES, ELASTIC, ENDINGS, JOINED, LAUNCHER_LOST, PORT, Ending, Job

pytestmark = [pytest.mark.rpc, needs_root]

_LEFT_S = 5.0  # the promise: so long after whatever died, nothing of the job runs anywhere
_TRAINS = """\
    import hashlib, numpy as np
    from bnlayer import BatchNormalization
    bn = BatchNormalization(synchronized=True, name='bn', momentum=0.5)
    for step in range(20):
        x = np.random.default_rng(step).normal(3, 2, (64, 33)).astype(np.float32)
        bn(x[w.shard(64)], training=True)
    state = b''.join(array.tobytes() for array in bn.state.arrays().values())
    print('digest', hashlib.sha256(state).hexdigest())
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    """Two hosts; a test that takes one down makes its own."""
    with hosts("one", "two") as made:
        yield made


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs, and leaves nothing of them."""
    with ExitStack() as stack:

        def start(on: Sequence[Host], program: Sequence[str], **options: Any) -> Job:
            job = Job(on, program, tmp_path, **options)
            for node in job.nodes:
                stack.callback(node.clean_up)
            return job

        yield start


def test_the_bits_of_one_host_over_the_wire(started: Callable[..., Job]) -> None:
    """On one host and on three, with lines that carry host and rank; what was exchanged has left through eth0."""
    program = script(JOINED + _TRAINS)
    (digest,) = set(re.findall("digest (.*)", launch(6, *program).stdout))
    with hosts("one", "two", "three") as made:
        before = [host.sent() for host in made]
        job = started(made, program)
        assert job.end() == [0, 0, 0]
        sent = [host.sent() - was for host, was in zip(made, before, strict=True)]
    for (out, _), host, first in zip(job.said(), made, (0, 2, 4), strict=True):
        assert sorted(out.splitlines()) == [f"[{host.name}:{rank}] digest {digest}" for rank in (first, first + 1)]
    limbs = 20 * 33 * 6 * 8  # steps, channels, int64 sums of each
    assert sent[1] > 2 * limbs and sent[2] > 2 * limbs  # to the service, from two ranks each
    assert sent[0] > 4 * limbs  # and the totals, to four
    assert job.carriers() == []


@pytest.mark.fault
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.row)
def test_ending(ending: Ending, pair: list[Host], started: Callable[..., Job]) -> None:
    """Exit codes on both hosts, and nothing left on either 5 s later."""
    job = started(pair, script(JOINED + "    " + ending.body))
    for node in job.nodes:
        node.ready()
    ending.act(job)
    codes = job.end()
    ended = time.monotonic()
    while job.carriers() and time.monotonic() < ended + _LEFT_S:
        time.sleep(0.05)
    left, said = job.carriers(), job.said()
    assert tuple(codes) == ending.codes, said
    assert left == []
    for (_, err), says in zip(said, ending.says, strict=True):
        assert re.search(f"^bnlayer launch: {re.escape(says)}" if says else "", err, re.MULTILINE), err


@pytest.mark.fault
def test_a_host_is_cut_off(started: Callable[..., Job]) -> None:
    """No packet says so: both sides give the other up after the lease, and end."""
    with hosts("one", "two") as made:
        job = started(made, script(JOINED + "    " + COMPUTES))
        for node in job.nodes:
            node.ready()
        made[1].cut_off()
        assert job.end() == [137, 137]
        assert job.carriers() == []
        (_, one), (_, two) = job.said()
        assert LAUNCHER_LOST.format("1 (two)") in one
        assert LAUNCHER_LOST.format(0) in two


def test_what_does_not_go_together(pair: list[Host], started: Callable[..., Job], tmp_path: Path) -> None:
    """A node that differs is refused, and the job goes on without it until the right one comes."""
    program = script(JOINED + "    print('here')")
    over = tmp_path / "over"
    ended = f"w.allreduce([int(w.rank == 0 and os.path.exists({str(over)!r}))])[0]"  # rank 0 looks: all leave at once
    held = script(JOINED + f"    ready()\n    while not {ended}: time.sleep(0.01)")
    job = started(pair, held)
    where = ["--insecure", f"--rendezvous={pair[0].address}:{PORT + 10}", "--nnodes=2"]
    head = Running(1, program, [*where, "--node-rank=0"], tmp_path / "head", prefix=pair[0].prefix)
    try:
        for options, differs in (
            (["-n2", "--node-rank=1"], "ranks 4, here 2. Give all the same --nnodes and -n."),
            (["--nnodes=3", "--node-rank=2"], "--nnodes 3, here 2, ranks 3, here 2."),
        ):
            command = [*pair[1].prefix, PYTHON, "-m", "bnworker.cli", "launch", *where, *options, "--", *program]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith(f"bnlayer: launch: node 0: the launchers disagree: {differs}"), done.stderr
        done = subprocess.run(
            [*pair[1].prefix, PYTHON, "-m", "bnworker.cli", "launch", *where, "--node-rank=1", "--", "nonsense"],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (127, "bnlayer: launch: nonsense: command not found\n")
        assert head.end() == 127
        assert "bnlayer: launch: node 1 (two): nonsense: command not found\n" in head.err.all()
    finally:
        head.clean_up()
    job.nodes[0].ready()
    nowhere = f"{pair[0].address}:{PORT + 30}"
    for rendezvous, node, says in (
        (PORT, 1, "node 0: --node-rank 1 is taken by two. Give each host another one."),
        (PORT, 2, "--node-rank: expected 0 to 1 with --nnodes 2, received 2."),
        (PORT + 30, 0, f"node 1 did not come to {nowhere} within 1 s (--wait). Start the command with that --no"),
        (PORT + 30, 1, f"--rendezvous {nowhere}: nobody listens on port {PORT + 31} of {pair[0].address}, where"),
    ):
        where = ["--insecure", f"--rendezvous={pair[0].address}:{rendezvous}", "--nnodes=2", "-n2", "--wait=1"]
        command = [*pair[node != 0].prefix, PYTHON, "-m", "bnworker.cli", "launch", *where, f"--node-rank={node}"]
        done = subprocess.run([*command, "--", *program], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode in (1, 2)
        assert f"bnlayer: launch: {says}" in done.stderr, done.stderr
    over.touch()
    assert job.end() == [0, 0], job.said()


def test_training_on_two_hosts(pair: list[Host], tmp_path: Path) -> None:
    """The same checkpoint as on one host with as many workers, byte for byte."""
    options = ("--data=digits", "--epochs=1", "--hidden=16", "--batch-size=128")
    command = [PYTHON, "-m", "bnworker.cli", "train", *options]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    subprocess.run([*command, "--workers=4", f"--save={one}"], check=True, capture_output=True, timeout=200)
    where = ["--nnodes=2", f"--rendezvous={pair[0].address}:{PORT + 20}", "--insecure", "--workers=2"]
    running = [
        subprocess.Popen(
            [*host.prefix, *command, *where, f"--node-rank={node}", f"--save={two}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, host in enumerate(pair)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], said
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert two.read_bytes() == one.read_bytes()
    assert "epoch 1/1" in said[0]
    assert said[1] == ""


# ---- elastic jobs ----


@pytest.mark.fault
def test_an_elastic_job_loses_a_host(pair: list[Host], started: Callable[..., Job]) -> None:
    """Its launcher is killed, and its ranks with it: the others go on, and nothing is left there."""
    body = "        while w.world_size > 2:\n            w.barrier()\n            time.sleep(0.01)\n"
    job = started(pair, script(ELASTIC + body + "        print('ends', w.world_size)\n"), options=["--elastic=2:4"])
    for node in job.nodes:
        node.ready()
    job.nodes[1].process.kill()
    assert job.end() == [0, 137]
    out, err = job.said()[0]
    assert sorted(line for line in out.splitlines() if "ends" in line) == ["[one:0] ends 2", "[one:1] ends 2"]
    assert f"bnlayer launch: {LAUNCHER_LOST.format('1 (two)')}; the job goes on with 2 ranks (--elastic)" in err
    assert job.carriers() == []


@pytest.mark.fault
def test_a_rank_on_another_host_is_started_again(pair: list[Host], started: Callable[..., Job]) -> None:
    """Node 0's launcher decides, the other one does it; the rank is let in."""
    body = """\
        back = float('BNLAYER_RESTART_COUNT' in os.environ)
        while not w.allreduce([back])[0]:
            w.admit()
            time.sleep(0.01)
        print('ends', w.world_size)
"""
    job = started(pair, script(ELASTIC + body), options=["--elastic=2:4", "--max-restarts=1"])
    job.nodes[0].ready()
    os.kill(job.nodes[1].ready()[3], signal.SIGKILL)
    assert job.end() == [0, 0]
    ends = [line for out, _ in job.said() for line in out.splitlines() if "ends" in line]
    assert sorted(ends) == ["[one:0] ends 4", "[one:1] ends 4", "[two:2] ends 4", "[two:3] ends 4"]
    text = "rank 3 (two) was killed by SIGKILL; it is started again (restart 1 of 1: --max-restarts)"
    assert text in job.said()[0][1]
    assert job.carriers() == []
