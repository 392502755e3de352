"""One rank of the torch adapter's tests under torchrun: runs every scenario, and writes what it saw.

torchrun --nproc-per-node=N torch_rank.py FOLDER

Layers find the ranks by themselves: torch.distributed is initialized, and no world is joined.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from bnlayer import BatchNormalization, CollectiveError
from bnlayer.adapters.torch import SyncBatchNorm, convert_sync_batchnorm
from bnlayer.collective import current
from bnworker.process_groups import world_over
from support.adapters import batch, one_training, shard

Scenario = Callable[[slice], Any]
SCENARIOS: list[Scenario] = []


def scenario(run: Scenario) -> Scenario:
    """Put a function into the list; it gets the rows that this rank has of the union's."""
    SCENARIOS.append(run)
    return run


def _pulled(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


@scenario
def the_layer_alone(rows: slice) -> Any:
    """Every dtype and layout, three steps: outputs and input gradients of this rank's rows, and running statistics."""
    seen = {}
    for kind in ("float32", "float64", "bfloat16", "float16"):
        for shape in ((12, 3), (12, 3, 5), (12, 3, 4, 4), (12, 3, 2, 3, 2)):
            for last in (False, True) if len(shape) > 3 else (False,):
                dtype = getattr(torch, kind)
                form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
                layer = SyncBatchNorm(3, dtype=torch.float64 if kind == "float64" else torch.float32)
                for step in range(3):
                    x, dy = (batch(shape, dtype, seed)[rows] for seed in (step, 10 + step))
                    if last:
                        x = x.contiguous(memory_format=form)
                    pulled = _pulled(layer, x, dy)
                    if last and x.numel():
                        assert all(t.is_contiguous(memory_format=form) for t in pulled)
                    seen[f"{kind} {shape} {last} {step}"] = [
                        *pulled,
                        layer.running_mean.clone(),
                        layer.running_var.clone(),
                    ]
    return seen


@scenario
def momentum_none(rows: slice) -> Any:
    """The average of all batches."""
    layer = SyncBatchNorm(3, momentum=None)
    for step in range(3):
        layer(batch((12, 3, 4), torch.float32, step)[rows])
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


@scenario
def used_twice_and_accumulated(rows: slice) -> Any:
    """Two uses of a module in one graph, and two backward passes before the gradients are used."""
    layer = SyncBatchNorm(3)
    grads = []
    for step in range(2):
        x = batch((12, 3, 4), torch.float32, step)[rows].requires_grad_()
        (layer(layer(x) * 2) * batch((12, 3, 4), torch.float32, 9)[rows]).sum().backward()
        grads.append(x.grad)
    return [*grads, layer.running_mean, layer.running_var]


@scenario
def interleaved(rows: slice) -> Any:
    """A discriminator's batches before their gradients, one of them twice: a handle per call."""
    layer = SyncBatchNorm(3)
    xs = [batch((12, 3, 4), torch.float32, step)[rows].requires_grad_() for step in range(3)]
    losses = [(layer(x) ** 3).sum() for x in xs]
    for index in (1, 0, 2):
        losses[index].backward(retain_graph=True)
    losses[1].backward()
    return [x.grad for x in xs]


@scenario
def no_grad_and_eval(rows: slice) -> Any:
    """Without gradients the statistics are updated; eval exchanges nothing."""
    layer = SyncBatchNorm(3)
    with torch.no_grad():
        y = layer(batch((12, 3, 4), torch.float32, 0)[rows])
    assert not y.requires_grad
    world: Any = current()
    before = world.statistics.bytes_sent if dist.get_world_size() > 1 else 0
    layer.eval()
    evaluated = layer(batch((12, 3, 4), torch.float32, 1)[rows])
    after = world.statistics.bytes_sent if dist.get_world_size() > 1 else 0
    assert before == after
    return [y, evaluated, layer.running_mean, layer.running_var]


@scenario
def frozen_parameters(rows: slice) -> Any:
    """requires_grad=False: the input's gradient alone."""
    layer = SyncBatchNorm(3)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    pulled = _pulled(layer, batch((12, 3, 4), torch.float32, 0)[rows], batch((12, 3, 4), torch.float32, 1)[rows])
    assert all(parameter.grad is None for parameter in layer.parameters())
    return pulled


@scenario
def no_running_statistics(rows: slice) -> Any:
    """track_running_stats=False: no buffers; eval uses the batch's own statistics, and exchanges nothing."""
    layer = SyncBatchNorm(3, track_running_stats=False, affine=False)
    assert not layer.state_dict()
    pulled = _pulled(layer, batch((12, 3, 4), torch.float32, 0)[rows], batch((12, 3, 4), torch.float32, 1)[rows])
    layer.eval()
    x = batch((12, 3, 4), torch.float32, 2)[rows]
    if x.numel():
        torch.testing.assert_close(layer(x), torch.nn.functional.batch_norm(x, None, None, training=True))
    return pulled


@scenario
def checkpointed(rows: slice) -> Any:
    """A forward that is computed once more exchanges, and updates nothing: all is as without."""
    runs = []
    for how in (None, True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), SyncBatchNorm(4), torch.nn.ReLU(), SyncBatchNorm(4))
        x = torch.empty(0)
        for step in range(2):
            x = batch((12, 3, 4), torch.float32, step)[rows].requires_grad_()
            y = model(x) if how is None else checkpoint(model, x, use_reentrant=how)
            (y * batch((12, 4, 4), torch.float32, 9)[rows]).sum().backward()
        assert x.grad is not None
        runs.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    return runs[0][:1]


@scenario
def autocast(rows: slice) -> Any:
    """bfloat16 activations beside float32 parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), SyncBatchNorm(4))
    x = batch((12, 3, 4), torch.float32, 0)[rows].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.backward(batch((12, 4, 4), torch.bfloat16, 1)[rows])
    assert model[1].weight.grad.dtype == torch.float32
    return [y.detach(), x.grad, model[1].running_mean, model[1].running_var]


@scenario
def masked(rows: slice) -> Any:
    """Masked positions are out of the statistics."""
    layer = SyncBatchNorm(3)
    x = batch((12, 3, 4), torch.float32, 0)[rows].requires_grad_()
    y = layer(x, batch((12, 4), torch.float32, 5)[rows] > 0)
    y.backward(batch((12, 3, 4), torch.float32, 1)[rows])
    return [y.detach(), x.grad, layer.running_mean, layer.running_var]


@scenario
def copied(rows: slice) -> Any:
    """A copy of a module is another layer; its state comes along."""
    layer = SyncBatchNorm(3)
    layer(batch((12, 3, 4), torch.float32, 0)[rows])
    other = copy.deepcopy(layer)
    assert other.name != layer.name
    return [other(batch((12, 3, 4), torch.float32, 1)[rows]).detach(), *other.buffers()]


@scenario
def set_by_hand(rows: slice) -> Any:
    """What load_state_dict puts into the buffers is trained on from."""
    layer = SyncBatchNorm(3)
    layer(batch((12, 3, 4), torch.float32, 0)[rows])
    layer.load_state_dict({**layer.state_dict(), "running_mean": torch.full((3,), 7.0)})
    layer(batch((12, 3, 4), torch.float32, 1)[rows])
    return list(layer.buffers())


@scenario
def compiled(rows: slice) -> Any:
    """torch.compile breaks the graph at the module, and says why; the values are the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), SyncBatchNorm(4), torch.nn.ReLU())
    x, dy = batch((12, 3, 4), torch.float32, 0), batch((12, 4, 4), torch.float32, 1)
    plain = _pulled(copy.deepcopy(model), x[rows], dy[rows])
    if not x[rows].numel():
        return _pulled(model, x[rows], dy[rows])[:1]  # a tracer needs values; the others' exchanges need us
    traced = _pulled(torch.compile(model, backend="eager"), x[rows], dy[rows])
    torch.testing.assert_close(plain, traced)
    as_one_graph = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="an exchange with other ranks is no part of a graph"):
        as_one_graph(x[rows])
    return plain[:1]


@scenario
def a_smaller_group(rows: slice) -> Any:
    """process_group=: the layer's ranks are those of the group."""
    group = dist.new_group([0]) if dist.get_world_size() > 1 else None
    if dist.get_rank():
        return None
    layer = SyncBatchNorm(3, process_group=group, name="of a smaller group")  # made here alone: not counted
    y = layer(batch((12, 3, 4), torch.float32, 0))
    return [y.detach(), *layer.buffers()]


@scenario
def of_one_value(rows: slice) -> Any:
    """Only the global count matters: all ranks refuse a batch of one value a channel, alike."""
    layer = SyncBatchNorm(3)
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.ones(1 if dist.get_rank() == 0 else 0, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, over all ranks"):
        layer(x)
    assert torch.equal(before[0], layer.running_mean)
    return list(layer.buffers())[:2]


@scenario
def mixed_with_numpy(rows: slice) -> Any:
    """One job: a NumPy layer on even ranks, torch's on the others, with Keras's variance."""
    x, dy = (batch((12, 3, 4), torch.float32, seed)[rows] for seed in (0, 1))
    if dist.get_rank() % 2 == 0:
        bn = BatchNormalization(axis=1, momentum=0.9, epsilon=1e-5, synchronized=True, name="mixed")
        y, pullback = bn.vjp(x.numpy(), training=True)
        moving = [torch.from_numpy(v.value) for v in bn.weights[2:]]
        return [torch.from_numpy(y), torch.from_numpy(pullback(dy.numpy())[0]), *moving]
    layer = SyncBatchNorm(3, eps=1e-5, momentum=1 - 0.9, name="mixed", unbiased=False)
    return [*_pulled(layer, x, dy), layer.running_mean, layer.running_var]


@scenario
def twenty_steps(rows: slice) -> Any:
    """A small network with two parallel synchronized branches and a layer that is used twice, under DDP."""
    seen = {}
    for dtype in (torch.float32, torch.float64):
        seen[str(dtype)] = one_training(dtype, rows, lambda model: _parallel(convert_sync_batchnorm(model)))
    return seen


def _parallel(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model


def main(folder: Path) -> None:
    """Run the scenarios in order; after a CollectiveError none can follow."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size > 1:
        assert current() is world_over()
    seen: dict[str, Any] = {}
    for run in SCENARIOS:
        try:
            seen[run.__name__] = run(shard(rank, world_size))
        except CollectiveError:
            raise
        except Exception:  # noqa: BLE001 - the outcome of a scenario, whatever it is
            seen[run.__name__] = traceback.format_exc()
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
