"""The calls of a torch module in a world of one: one crossing into the kernels each way, by the tensors' addresses.

A batch of (32, 64) takes torch's own layer 70 µs, forward and backward; an empty `torch.autograd.Function` takes 57.
The layer's way, with an array for each tensor and a value for each step of an exchange, takes 180; this one 100. It has
the same kernels, so the same bits, and leaves to the layer whatever is not the plain case: another dtype, device or
memory format than contiguous float32 on the CPU, a mask, other ranks, a grid that does not fit, buffers that were set.

Shape suffixes: C channels.
"""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch

from bnlayer.exchange_driver import ExchangeDriver
from bnlayer.kernels import kernels
from bnlayer.kernels.results import Record
from bnlayer.layer import BatchNormalization
from bnlayer.membership import STATE_LOCK
from bnlayer.moving import Moving
from bnlayer.pullback import SavedTraining
from bnlayer.view import View, flat_shape

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class SavedByAddress(NamedTuple):
    """What such a call saves for its backward pass, beside the batch.

    Attributes:
        driver: of the world of one.
        step: the call's number.
        record: the kernels' results.
    """

    driver: ExchangeDriver
    step: int
    record: Record

    def general(self, core: AloneCore, view: View) -> SavedTraining:
        """The same as the layer saves it, for a backward pass that goes its way."""
        signature = core._signature()  # noqa: SLF001 - of the same object
        return SavedTraining(self.driver, signature, self.step, view, b"", self.record, None, None, None)


class AloneCore(BatchNormalization):
    """A layer behind a torch module that takes the short way where it can.

    The state is brought up to date when somebody looks at it, or a call goes the layer's way: `state` and `catch_up`.
    """

    _record: Record | None = None  # of the latest call
    _calls = 0  # that the state does not know of
    _tensors: tuple[Any, ...] = ()
    _held: tuple[Any, ...] = ()  # their memory, so that nothing else can come to lie at its addresses
    _addresses: tuple[int, ...] = ()

    def catch_up(self) -> None:
        """Make the calls known to the state."""
        with STATE_LOCK:
            super().catch_up()
            record, kept, calls = self._record, self._kept, self._calls
            if not calls or record is None or kept is None:
                return
            # A signal's handler that comes before the state is held does all of this, and this does the same again.
            after = kept.moved_to(Moving(record.mean, record.variance), calls)
            self._calls = 0
            self._take(after)

    def forward_alone(self, module: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, SavedByAddress] | None:
        """A training call that updates the running statistics; None: not this way, nothing has happened."""
        if self._driver is None or module.process_group is not None or module.momentum is None or not _is_plain(x):
            return None
        driver, kept, shape = self._joined(), self._kept, flat_shape(x.shape, 1)
        if not driver.alone or kept is None or not kept.forward.is_probed or shape[0] * shape[2] < 2:
            return None
        buffers = module._buffers  # noqa: SLF001 - torch looks for an attribute everywhere else first: 1 µs
        tensors = weight, bias, buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if self._state_set or self._weights_set:  # they are compared, or refused, before anything else
            return None
        if self._observer is not None or self.dtype_policy.name != "float32" or not self._are_here(tensors):
            return None
        before = self._record
        if before is None or not self._calls:
            before = Record.of_moving(*(variable.value for variable in self._moving))
        y, record = torch.empty_like(x), Record.empty(shape[1])
        done = kernels().forward_at(
            shape, x.data_ptr(), y.data_ptr(), self.scale, self._addresses, kept.forward, module.eps,
            1.0 - module.momentum, self.unbiased, before.memory, record.memory,
        )  # fmt: skip
        if not done:
            return None
        with STATE_LOCK:
            self._record = record
            self._calls += 1
        return y, SavedByAddress(driver, driver.called_alone(), record)

    def backward_alone(self, saved: SavedByAddress, x: Any, dy: Any) -> tuple[Any, Any, Any] | None:
        """The gradients of the input, the weight and the bias; None: not this way."""
        kept, dy = self._kept, dy.contiguous()
        if kept is None or not kept.backward.is_probed or not _is_plain(x) or not _is_plain(dy) or x.shape != dy.shape:
            return None
        dx, gamma, beta = torch.empty_like(x), None, None
        if self.scale:
            gamma, beta = torch.empty_like(self._held[0]), torch.empty_like(self._held[1])
        addresses = (0, 0) if gamma is None or beta is None else (gamma.data_ptr(), beta.data_ptr())
        done = kernels().backward_at(
            flat_shape(x.shape, 1), x.data_ptr(), dy.data_ptr(), dx.data_ptr(), addresses, saved.record.memory,
            kept.backward,
        )  # fmt: skip
        if not done:
            return None
        saved.driver.pulled_alone()
        return dx, gamma, beta

    def _are_here(self, tensors: tuple[Any, ...]) -> bool:
        """Whether a module's tensors lie where kernels can take them by their addresses, which are looked up."""
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        if addresses != self._addresses or not all(map(is_, tensors, self._tensors)):
            channels, *of_channels, count = self.moving_mean.shape, *tensors
            if not all(tensor is None or (_is_plain(tensor) and tensor.shape == channels) for tensor in of_channels):
                return False
            if count is None or not _is_plain(count, torch.int64) or count.numel() != 1:
                return False
            self._tensors, self._addresses = tensors, addresses
            self._held = tuple([None if tensor is None else tensor.detach() for tensor in tensors])
        return True


def _is_plain(x: Any, dtype: Any = torch.float32) -> bool:
    """Whether a tensor is what lies at its address, value by value."""
    return bool(
        x.dtype is dtype
        and type(x) in _PLAIN
        and x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and not x.is_neg()
    )
