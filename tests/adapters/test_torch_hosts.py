"""torchrun on two hosts: network namespaces, whose interfaces count what crosses the wire."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.adapters import Ended, run
from support.framework_jobs import Jobs, differing
from support.hosts import Host, hosts, needs_root

pytestmark = needs_root

_RANK = Path(__file__).with_name("torch_hosts_rank.py")
_PORT = 29400
_LIMBS = 20 * 33 * 2 * 6 * 8  # steps, channels, forward and backward, int64 sums of each


def test_the_bits_of_one_process_on_two_hosts(tmp_path: Path) -> None:
    """Two ranks on each, over a service that rank 0 starts and over gloo; what was exchanged has left through eth0."""
    alone = run([sys.executable, _RANK, tmp_path])
    assert alone.code == 0, alone.err
    assert alone.out == "service: rank 0 of 1 over alone\n"
    with hosts("one", "two") as made, ThreadPoolExecutor(2) as pool:
        before = [host.sent() for host in made]
        first = made[0].address

        def started(host: Host) -> Ended:
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{_PORT}", "--rdzv-id=two-hosts"]
            here = ["--nnodes=2", "--nproc-per-node=2", f"--local-addr={host.address}"]
            command = [
                *host.prefix,
                sys.executable,
                "-m",
                "torch.distributed.run",
                *here,
                *meet,
                str(_RANK),
                str(tmp_path),
            ]
            return run(command, environ={"BNLAYER_INSECURE": "1", "GLOO_SOCKET_IFNAME": "eth0"}, limit_s=170)

        ended = list(pool.map(started, made))
        sent = [host.sent() - was for host, was in zip(made, before, strict=True)]
        assert [host.processes() for host in made] == [[], []]
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    said = sorted(line for each in ended for line in each.out.splitlines())
    assert said == [f"{way}: rank {rank} of 4 over {way}" for way in ("service", "torch") for rank in range(4)]
    # Which host has rank 0, and so the service, is torchrun's choice: the other one has sent its sums, for two ranks.
    assert min(sent) > 2 * _LIMBS, sent
    reference = Jobs(tmp_path, {1: alone}).union("service", 1)
    parts = Jobs(tmp_path, {4: ended[0]})
    for way in ("service", "torch"):
        assert differing(parts.union(way, 4), reference) == []
