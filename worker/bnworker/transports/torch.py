"""Exchanges over a process group of `torch.distributed`: no service, no address, no MPI.

Every rank owns a mirror of the moving statistics, as over MPI. An exchange is one message in most cases: an all-reduce
SUM of a fixed number of int64 words, which begins with a header and holds the data, if they fit. The header is the
call's fingerprint h, as pieces of 20 bits and their squares: with W ranks, W·Σh² = (Σh)² if and only if all have the
same h, so every rank finds out from the same total whether all made the same call. Only a probe, which is a MAX, and
data that are larger take a second message. What was tried: a header of its own for every exchange doubles its time.

The messages travel over gloo connections of their own, made through the group's store: those of DistributedDataParallel
and of the caller never meet ours, and the caller's group may be one of NCCL or XCCL. Where torch was built without
gloo, they travel over a new group of the same backend, by way of its device.

Laws:
1. The data of a second message move only after all ranks have agreed on the call, so buffers always match.
2. A wait ends by its deadline, and within a second of a rank's leaving or failing (`torch_wait.py`).
3. A group with an unfinished message is never destroyed: that would wait for the message.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import _get_default_store

from bnlayer.collective import Call, Operation, Total
from bnlayer.state import LayerState
from bnworker.transports import peers
from bnworker.transports.torch_events import EventLog
from bnworker.transports.torch_wait import Wait, Watch

_PIECES, _BITS = 3, 20  # of a fingerprint: the squares of 2^20 ranks' pieces have a sum below 2^63
_HEADER = 2 * _PIECES
_SMALLEST, _LARGEST = 256, 4096  # words of the first message: 4096 take as long as 64 between processes of a machine
_OPS: dict[peers.Op, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

_joined: Counter[str] = Counter()  # worlds so far over each group: all ranks make them in the same order


class TorchTransport(peers.PeerTransport[Wait]):
    """One rank of a process group.

    Args:
        group: of `torch.distributed`; None: the default group.
        timeout: seconds that joining, and each exchange, may take.
        deterministic: add floats in rank order: the same bits as over the service, for more traffic.

    Raises:
        ValueError: this process does not belong to the group.
        PeerLostError: not all ranks joined in time.
    """

    name = "torch"

    def __init__(self, group: Any = None, *, timeout: float = 300.0, deterministic: bool = False) -> None:
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("This process does not belong to the process group that its layers are to exchange over.")
        super().__init__(rank, dist.get_world_size(group), timeout=timeout, deterministic=deterministic)
        name = f"bnlayer/{group.group_name}/{_joined[group.group_name]}"
        _joined[group.group_name] += 1
        store = _get_default_store()
        store = store.clone() if hasattr(store, "clone") else store  # a connection of its own
        log = EventLog(dist.PrefixStore(f"{name}/events", store))
        self._peers = log.meet(self.rank, self.world_size, timeout)
        self._group, self._device = self._private(group, dist.PrefixStore(f"{name}/gloo", store))
        self._watch = Watch(self._group, log, self.rank, self._peers)
        self._room = _SMALLEST
        self._message = np.zeros(_LARGEST, np.int64)

    def _private(self, group: Any, store: Any) -> tuple[Any, torch.device]:
        """Connections of our own to the ranks of a group, and where what they send must lie."""
        if dist.is_gloo_available():
            limit = timedelta(seconds=2 * self._timeout)  # ours ends first, and names the rank
            return dist.ProcessGroupGloo(store, self.rank, self.world_size, limit), torch.device("cpu")
        new = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
        device = torch.accelerator.current_accelerator()
        return new, torch.device("cpu") if device is None or dist.get_backend(new) == "mpi" else device

    # ---- the transport ----

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce limbs over the ranks; each rank has set its own mirror already."""
        del state
        if call.operation is Operation.PROBE:
            wait = self._agree(call, limbs.shape)
            return Total(self._reduced(limbs, "max", wait))
        if limbs.size <= self._room - _HEADER:
            return Total(self._agree_and_add(call, limbs))
        wait = self._agree(call, limbs.shape)
        self._room = max(self._room, min(_LARGEST, 1 << (limbs.size + _HEADER - 1).bit_length()))
        return Total(self._reduced(limbs, "sum", wait))

    def leave(self, reason: str) -> None:
        """Tell the others, who look for it while they wait; stay until they know, but for a second at most."""
        self._watch.leave(reason)

    # ---- agreeing ----

    def _agree(self, call: Call, shape: tuple[int, ...] | None = None) -> Wait:
        """Return when all ranks have made the same call.

        Raises:
            CollectiveError: they have not.
        """
        wait, _ = self._compare(call, shape, np.empty(0, np.int64))
        return wait

    def _agree_and_add(self, call: Call, limbs: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same, and the sums of the ranks' limbs, in one message."""
        _, total = self._compare(call, limbs.shape, limbs.reshape(-1))
        return total.reshape(limbs.shape)

    def _compare(
        self, call: Call, shape: tuple[int, ...] | None, data: NDArray[np.int64]
    ) -> tuple[Wait, NDArray[np.int64]]:
        pushed = self._pushed.get(call.key.layer or "", "nothing")
        text = "" if shape is None else str(shape)
        wait = Wait(self._exchange_number, call, text, pushed, self._timeout, time.monotonic(), self._last)
        self._exchange_number += 1
        message = self._message[: self._room]
        name = self._fingerprints.of(call, shape, pushed)
        for piece in range(_PIECES):
            part = name >> _BITS * piece & (1 << _BITS) - 1
            message[piece], message[_PIECES + piece] = part, part * part
        end = _HEADER + data.size
        message[_HEADER:end] = data
        message[end:] = 0
        self._all_reduce(message, "sum", wait)
        header = message[:_HEADER].tolist()
        if any(
            self.world_size * squares != sums * sums
            for sums, squares in zip(header[:_PIECES], header[_PIECES:], strict=True)
        ):
            raise self._watch.disagreement(wait)
        self._last = call
        return wait, message[_HEADER:end].copy()

    # ---- moving data ----

    def _reduced(self, array: NDArray[Any], op: peers.Op, wait: Wait) -> NDArray[Any]:
        total = np.array(array, order="C")
        for chunk in peers.chunks(total):
            self._all_reduce(chunk, op, wait)
        return total

    def _all_reduce(self, array: NDArray[Any], op: peers.Op, wait: Wait) -> None:
        """Reduce a contiguous array in its place."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        mine = torch.from_numpy(array)
        sent = mine if self._device.type == "cpu" else mine.to(self._device)
        self._watch.complete(lambda: self._group.allreduce([sent], options), wait)
        if sent is not mine:
            mine.copy_(sent)

    def _added_in_rank_order(self, floats: NDArray[np.float64], wait: Wait) -> NDArray[np.float64]:
        rows = np.zeros((self.world_size, floats.size))
        rows[self.rank] = floats
        # As integers, to which adding the zeros of the other ranks does nothing, −0.0 and NaN included.
        rows = self._reduced(rows.view(np.int64), "sum", wait).view(np.float64)
        return peers.sum_of_rows(rows)

    def _broadcast(self, array: NDArray[Any], root: int, wait: Wait) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        mine = torch.from_numpy(array)
        sent = mine if self._device.type == "cpu" else mine.to(self._device)
        self._watch.complete(lambda: self._group.broadcast([sent], options), wait)
        if sent is not mine:
            mine.copy_(sent)
