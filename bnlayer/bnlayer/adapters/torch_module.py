"""`SyncBatchNorm`, the module: what of torch's it takes over, the layer behind it, and its place in autograd.

Tensors on the CPU are computed on in their own memory, by the layer's kernels; those of other devices where they are
(`torch_passes.py`), and only sums of a few numbers a channel visit the host.

Shape suffixes: C channels; batches are (A, C, B).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from bnlayer.adapters.torch_alone import AloneCore, SavedByAddress
from bnlayer.adapters.torch_tensors import HALF, Contents, array_of, flattened, layout_of, restored, tensor_of, view_of
from bnlayer.base import automatic_name
from bnlayer.collective import Collective
from bnlayer.discovery import discovered
from bnlayer.dtypes import Policy
from bnlayer.membership import STATE_LOCK
from bnlayer.pullback import SavedTraining
from bnlayer.view import View

_NAMES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip
_POLICIES = {
    (data, weights): Policy(_NAMES[data] if data == weights else f"mixed_{_NAMES[data]}")
    for data in _NAMES
    for weights in _NAMES
    if data == weights or (weights == torch.float32 and data in (torch.float16, torch.bfloat16))
}


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over (N, C, …) whose statistics are those of all ranks' batches.

        training    y = weight·(x − μ)/√(v + eps) + bias
                    running_mean ← (1 − momentum)·running_mean + momentum·μ
                    running_var  ← (1 − momentum)·running_var  + momentum·v·N/(N − 1)
        eval        y = weight·(x − running_mean)/√(running_var + eps) + bias          nothing is exchanged

    μ, v and N are those of the union of all ranks' batches. All ranks must call the same layers in the same order,
    with any number of rows, 0 included; going back, autograd does the same.

    Arguments, parameters, buffers and `state_dict` are `torch.nn.SyncBatchNorm`'s: `momentum=None` is the average of
    all batches, `track_running_stats=False` keeps none. A forward that `torch.utils.checkpoint` repeats exchanges
    again, and updates nothing. `torch.compile` breaks its graph at this module, and says why.

    Args:
        num_features: C.
        eps: added to the variance before the root.
        momentum: weight of the new value in the running update; None: the average of all batches.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without, eval too uses those of its batch, locally.
        process_group: of torch.distributed, whose ranks to synchronize with; None: the world that was joined,
            otherwise all ranks of torch.distributed.
        device, dtype: of parameters and buffers.
        name: how the ranks know the layer; made up where None, alike on ranks that build the same model.
        unbiased: whether running_var is torch's, N/(N − 1) times the batch's; False: Keras's, as ranks of other
            frameworks in the same job have it.

    Raises in forward and backward:
        ValueError: the input has another shape or dtype than the module takes; or the batches of all ranks together
            hold one value a channel.
        RuntimeError: several ranks are announced, but there is neither a joined world nor an initialized
            torch.distributed.
        CollectiveError: an exchange could not complete.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        name: str | None = None,
        unbiased: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group
        self.unbiased = unbiased
        self.name = automatic_name("sync_batch_norm") if name is None else name
        self.core: _Core | None = None

    def forward(self, input: Any, mask: Any = None) -> Any:  # noqa: A002 - torch's name
        """Normalize a batch.

        Args:
            input: (N, C) or (N, C, …), of 2 to 5 dimensions.
            mask: bool, (N, …), the input's shape without C; False keeps a position out of the statistics, but not out
                of the output. Its counts have Keras's 1e-7 added.

        Returns:
            Of the input's shape, dtype and memory format.
        """
        self._check_input_dim(input)
        if not self.training and self.track_running_stats:
            return torch.nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if torch.compiler.is_compiling():
            return _outside_graphs(self, input, mask)
        return _Normalize.apply(input, self.weight, self.bias, mask, self)

    def _check_input_dim(self, input: Any) -> None:  # noqa: A002
        if not 2 <= input.dim() <= 5 or input.shape[1] != self.num_features:
            raise ValueError(
                f"Expected an input of 2 to 5 dimensions, (N, {self.num_features}, …), received {tuple(input.shape)}."
            )

    def extra_repr(self) -> str:
        """As torch's, and the name by which ranks know the layer."""
        return f"{super().extra_repr()}, name={self.name!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the ranks: a copy enrolls anew."""
        return {**self.__dict__, "core": None, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy, with a name of its own: layers are known by name."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        new.name, new.process_group = automatic_name(f"{self.name}_copy"), self.process_group
        return new

    # ---- the running statistics ----

    def normalize(self, view: View, dtype: Any, weight: Any, bias: Any) -> tuple[Any, SavedTraining]:
        """A training call of a batch: exchange, update the running statistics, and normalize."""
        weights = weight.dtype if self.affine else torch.float32 if dtype in HALF else dtype
        policy = _POLICIES.get((dtype, weights))
        if policy is None:
            raise ValueError(
                f"Layer {self.name!r}: expected an input of the weights' dtype {weights}, or of float16 or bfloat16 "
                f"beside float32 weights; received {dtype}."
            )
        core = self.core
        if core is None or (core.dtype_policy is not policy and not core.suits(policy)):
            if core is not None:
                core._replaced()  # noqa: SLF001 - outputs whose gradients are due may still hold it
            core = self.core = _Core(self, policy)
        updates = self.training and self.track_running_stats and not _within_backward()
        buffers = core.prepare(self, policy, updates, weight, bias)
        y, saved = core.train(view, updates, synchronized=self.training)
        few = view.x.shape[0] * view.x.shape[2] <= 1
        if few and saved.statistics.count.size and saved.statistics.count[0] == 1.0 and view.mask is None:
            raise ValueError(
                f"Expected more than 1 value per channel when training, over all ranks; this rank's input is "
                f"{view.shape}."
            )
        if updates:
            core.write_back(self, buffers)
        return y, saved


class _Core(AloneCore):
    """The layer behind a module: its arithmetic, its grids and its enrolment with the ranks."""

    def __init__(self, module: SyncBatchNorm, policy: Policy) -> None:
        super().__init__(
            axis=1, epsilon=module.eps, center=module.affine, scale=module.affine, synchronized=True,
            name=module.name, dtype=policy.name, grad_reduction="local",
        )  # fmt: skip
        self.unbiased = module.unbiased
        self.build((None, module.num_features, None))
        self._written: list[bytes] = []
        self._contents = Contents()
        if module.track_running_stats:
            self._read([array_of(module.running_mean), array_of(module.running_var)])

    def suits(self, policy: Policy) -> bool:
        """Whether the state that is kept here is of a policy's dtypes."""
        mine = self.dtype_policy
        return (mine.arithmetic, mine.variable_dtype) == (policy.arithmetic, policy.variable_dtype)

    def prepare(self, module: SyncBatchNorm, policy: Policy, updates: bool, weight: Any, bias: Any) -> list[Any]:
        """Take over the module's settings, and what of its parameters and buffers was set since the last call.

        Returns:
            The running mean and variance as arrays.
        """
        self.catch_up()
        self.dtype_policy, self.epsilon = policy, module.eps
        if module.process_group is not None:
            self.collective = _collective_of(module.process_group)
        mean, variance = module._buffers["running_mean"], module._buffers["running_var"]  # noqa: SLF001 - 1 µs less
        gamma, beta, *moving = self._contents.arrays(weight, bias, mean, variance)
        if self.gamma is not None and self.beta is not None:
            assert gamma is not None
            assert beta is not None
            self.gamma.take(np.ascontiguousarray(gamma))
            self.beta.take(np.ascontiguousarray(beta))
        if updates:
            batches, momentum = module._buffers["num_batches_tracked"], module.momentum  # noqa: SLF001
            assert batches is not None
            batches.add_(1)
            self.momentum = 1.0 - (1.0 / float(batches) if momentum is None else momentum)
        if module.track_running_stats:
            self._read(moving)
        return moving

    def catch_up(self) -> None:
        """Make the calls known to the state, whose statistics they have written into the module's buffers."""
        with STATE_LOCK:
            written = self._calls
            super().catch_up()
            if written:
                self._written = [variable.value.tobytes() for variable in self._moving]

    def _read(self, arrays: list[Any]) -> None:
        """Take over the buffers, where they are not those that were written last: all ranks must have set them."""
        contents = [array.tobytes() for array in arrays]
        if contents != self._written:
            for variable, array in zip(self._moving, arrays, strict=True):
                variable.assign(array)
            self._written = contents

    def write_back(self, module: SyncBatchNorm, buffers: list[Any]) -> None:
        """The updated statistics, written into the module's buffers, of which `prepare` has made arrays."""
        arrays = [variable.value for variable in self._moving]
        tensors = module._buffers["running_mean"], module._buffers["running_var"]  # noqa: SLF001
        for tensor, buffer, array in zip(tensors, buffers, arrays, strict=True):
            assert tensor is not None
            if tensor.is_cpu:
                buffer[...] = array  # in the tensor's own memory
            else:
                tensor.copy_(tensor_of(array))
        self._written = [array.tobytes() for array in arrays]

    def train(self, view: View, updates: bool, *, synchronized: bool) -> tuple[Any, SavedTraining]:
        """A training call; in eval, without running statistics, by those of this rank's batch, and without exchange."""
        if synchronized:
            return self._train(self._joined(), view, updates)
        driver, self._driver, self.synchronized = self._driver, None, False
        try:
            return self._train(self._joined(), view, updates)
        finally:
            self._driver, self.synchronized = driver, True

    @np.errstate(all="ignore")
    def pull(self, saved: SavedTraining, dy: Any) -> tuple[Any, NDArray[Any] | None, NDArray[Any] | None]:
        """The backward pass of a training call."""
        return self._pull_training(saved, dy)


class _Normalize(torch.autograd.Function):
    """A training call, and its backward pass; the input is saved as autograd saves tensors, nothing else is large."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, mask: Any, module: SyncBatchNorm) -> Any:
        core = module.core
        if (
            core is not None
            and mask is None
            and module.training
            and module.track_running_stats
            and not _within_backward()
        ):
            done = core.forward_alone(module, x, weight, bias)
            if done is not None:
                ctx.save_for_backward(x, None)
                ctx.core, ctx.layout = core, torch.contiguous_format
                y, ctx.saved = done
                return y
        layout = layout_of(x)
        view = view_of(x, mask, layout)
        y, saved = module.normalize(view, x.dtype, weight, bias)
        saved.view = None  # type: ignore[assignment]  # until it is pulled back
        ctx.save_for_backward(x, mask)
        ctx.core, ctx.saved, ctx.layout = module.core, saved, layout
        return restored(y, x, layout)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        # Gradients are recorded where second derivatives are asked for: they are refused, and nobody else pays 3 µs.
        pulled = _Normalize.pulled_once if torch.is_grad_enabled() else _Normalize.pulled
        gradients: tuple[Any, ...] = pulled(ctx, dy)
        return gradients

    @staticmethod
    def pulled(ctx: Any, dy: Any) -> tuple[Any, ...]:
        x, mask = ctx.saved_tensors
        core: _Core = ctx.core
        saved: SavedTraining | SavedByAddress = ctx.saved
        if isinstance(saved, SavedByAddress):
            done = core.backward_alone(saved, x, dy)
            if done is not None:
                return *done, None, None
            saved = saved.general(core, view_of(x, None, ctx.layout))
        saved.view = view_of(x, mask, ctx.layout)
        try:
            dx, dgamma, dbeta = core.pull(saved, flattened(dy, ctx.layout))
        finally:
            saved.view = None  # type: ignore[assignment]
        weight, bias = (None if g is None else tensor_of(g) for g in (dgamma, dbeta))
        if weight is not None and bias is not None and weight.device != x.device:
            weight, bias = weight.to(x.device), bias.to(x.device)
        return restored(dx, x, ctx.layout), weight, bias, None, None

    pulled_once = staticmethod(once_differentiable(pulled))


@torch.compiler.disable(reason="bnlayer: an exchange with other ranks is no part of a graph")
def _outside_graphs(module: SyncBatchNorm, x: Any, mask: Any) -> Any:
    return _Normalize.apply(x, module.weight, module.bias, mask, module)


def _within_backward() -> bool:
    """Whether the autograd engine runs in this thread: a forward pass there is a checkpoint's repetition."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - as torch.utils.checkpoint asks it


def _collective_of(group: Any) -> Collective:
    collective = discovered(group)
    if collective is None:
        raise RuntimeError("process_group= was given, but torch.distributed is not initialized any more.")
    return collective
