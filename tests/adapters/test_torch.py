"""The torch adapter under torchrun on one to three ranks, uneven and with an empty shard, beside torch's own layers."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from bnlayer.adapters import torch_alone, torch_tensors
from bnlayer.adapters.torch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from bnlayer.adapters.torch_alone import AloneCore
from bnlayer.moving import Moving
from support.adapters import SIZES, batch, network, one_training, shard, torchrun

Outcomes = dict[int, list[dict[str, Any]]]

_ROWS = 12
_BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
_NORMS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What every rank saw in every scenario, by the number of ranks; one start of torchrun for each number."""
    seen = {}
    for world_size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{world_size}-")
        ended = torchrun(world_size, Path(__file__).with_name("torch_rank.py"), folder)
        assert ended.code == 0, ended.out + ended.err
        seen[world_size] = [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
    return seen


SCENARIOS = (
    "the_layer_alone", "momentum_none", "used_twice_and_accumulated", "interleaved", "no_grad_and_eval",
    "frozen_parameters", "no_running_statistics", "checkpointed", "autocast", "masked", "copied", "set_by_hand",
    "compiled", "of_one_value", "mixed_with_numpy",
)  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*SCENARIOS, "a_smaller_group", "twenty_steps"])
def test_scenario(outcomes: Outcomes, name: str) -> None:
    """Each passes on every rank; and what has rows, or is everybody's, has the same bits as on one rank."""
    for world_size, ranks in outcomes.items():
        for rank, seen in enumerate(ranks):
            assert not isinstance(seen[name], str), f"rank {rank} of {world_size}: {seen[name]}"
    if name == "twenty_steps":
        return
    one = outcomes[1][0][name]
    if name == "a_smaller_group":
        assert all(_same(one, outcomes[world_size][0][name]) for world_size in SIZES)
        return
    for world_size, ranks in outcomes.items():
        for rank, seen in enumerate(ranks):
            mine = seen[name]
            for key in one if isinstance(one, dict) else ("",):
                expected, part = (one[key], mine[key]) if key else (one, mine)
                rows = shard(rank, world_size)
                assert _same([t[rows] if t.shape[:1] == (_ROWS,) else t for t in expected], part), (
                    rank,
                    world_size,
                    key,
                )


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_a_missing_exchange_changes_the_result(outcomes: Outcomes) -> None:
    """What a rank computes from its own rows alone is something else."""
    rows = shard(0, 2)
    y = SyncBatchNorm(3)(batch((12, 3), torch.float32, 0)[rows])
    assert not torch.equal(y.detach(), outcomes[2][0]["the_layer_alone"]["float32 (12, 3) False 0"][0])


def test_outputs_and_gradients_are_torchs(outcomes: Outcomes) -> None:
    """Those of torch's own layer on the union, float32 and float64, of 2 to 5 dimensions and both memory formats."""
    checked = 0
    for key, seen in outcomes[1][0]["the_layer_alone"].items():
        kind, rest = key.split(" ", 1)
        shape = ast.literal_eval(rest.partition(")")[0] + ")")
        dtype, step = getattr(torch, kind), int(key[-1])
        if dtype not in _BOUNDS:
            continue
        theirs = _NORMS[len(shape)](3, dtype=dtype)
        y = dx = None
        for before in range(step + 1):
            x = batch(shape, dtype, before).requires_grad_()
            y = theirs(x)
            y.backward(batch(shape, dtype, 10 + before))
            dx = x.grad
        bound = _BOUNDS[dtype]
        for got, want in zip(seen, (y, dx, theirs.running_mean, theirs.running_var), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=bound, atol=bound)
        checked += 1
    assert checked == 2 * 6 * 3


def test_training_is_torchs_on_the_union(outcomes: Outcomes) -> None:
    """Twenty steps under DDP: all weights, running statistics and the input's gradient, on one to three ranks."""
    for dtype, bound in _BOUNDS.items():
        want = one_training(dtype, slice(0, _ROWS), lambda model: model)
        for world_size, ranks in outcomes.items():
            for rank, seen in enumerate(ranks):
                for name, got in seen["twenty_steps"][str(dtype)].items():
                    expected = want[name][shard(rank, world_size)] if name == "input gradient" else want[name]
                    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


def test_momentum_none_is_torchs(outcomes: Outcomes) -> None:
    """The cumulative average."""
    theirs = torch.nn.BatchNorm1d(3, momentum=None)
    for step in range(3):
        theirs(batch((12, 3, 4), torch.float32, step))
    torch.testing.assert_close(outcomes[3][1]["momentum_none"], list(theirs.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_passes_of_other_devices_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool
) -> None:
    """They are tensor operations, here on CPU tensors: values, far means, tiny gradients, NaN, an empty batch."""

    def run(on_host: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(torch_tensors, "_on_host", lambda x: on_host)
        if not on_host:
            monkeypatch.setattr(AloneCore, "forward_alone", lambda *_: None)
        seen = []
        for shape in ((8, 3, 4, 4), (8, 3), (0, 3, 2), (70, 3, 30)):
            for scale, mean in ((1.0, 0.0), (1e-3, 1000.0)):
                layer = SyncBatchNorm(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                for step in range(3):
                    x = (batch(shape, torch.float64, step) * scale + mean).to(dtype)
                    if step == 2 and x.numel():
                        x[0, 1] = torch.nan
                    x.requires_grad_()
                    mask = batch((shape[0], *shape[2:]), torch.float32, 5) > 2 if masked else None
                    y = layer(x, mask)
                    y.backward(batch(shape, dtype, 7) * 10.0 ** (-3 * step))
                    seen += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
                    seen += [buffer.clone() for buffer in layer.buffers()]
        return [torch.nan_to_num(tensor, nan=12345.0) for tensor in seen]

    assert _same(run(True), run(False))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (9, 3, 5), (4, 1, 3, 3), (2, 7, 1, 2, 3)])
def test_the_short_way_of_a_world_of_one_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], affine: bool
) -> None:
    """By the tensors' addresses, or as the layer goes, whatever happens between two calls, and to their tensors."""
    taken: list[bool] = []
    forward_alone = AloneCore.forward_alone

    def counted(core: AloneCore, *arguments: Any) -> Any:
        done = forward_alone(core, *arguments)
        taken.append(done is not None)
        return done

    def run(short: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(AloneCore, "forward_alone", counted if short else lambda *_: None)
        layer, seen = SyncBatchNorm(shape[1], affine=affine), []
        for step, (what, scale, tiny) in enumerate(_STEPS):
            x = batch(shape, torch.float32, step) * scale
            _change(layer, x, what)
            if what == "not contiguous":
                x = x.movedim(0, -1).contiguous().movedim(-1, 0)
            elif what == "bfloat16":
                x = x.bfloat16()
            x.requires_grad_()
            if what == "no gradient":
                with torch.no_grad():
                    seen.append(layer(x))
                continue
            other = layer(x * 2) if what == "twice" else None
            y = layer(x)
            y.backward(batch(y.shape, y.dtype, 7) * tiny, retain_graph=what == "again")
            if what == "again":
                y.backward(batch(y.shape, y.dtype, 8))
            if other is not None:
                other.sum().backward()
            seen += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
            seen += [buffer.clone() for buffer in layer.buffers()]
            if layer.core is not None and what == "looked at":
                seen += [torch.from_numpy(array) for array in layer.core.state.arrays().values()]
        assert layer.core is not None
        state = layer.core.state
        return [*seen, *(torch.from_numpy(array) for array in state.arrays().values())]

    with_it = run(True)
    without = run(False)
    nan = [[torch.nan_to_num(tensor, nan=12345.0) for tensor in side] for side in (with_it, without)]
    assert _same(*nan)
    # Not the two whose data leave the grid, those that find other buffers, memory or dtypes, and the one after these.
    assert (len(taken), sum(taken)) == (len(_STEPS), 17)


# What is done before or in each step, the scale of its data, and that of its gradients.
_STEPS = [
    *[("", 1, 1), ("", 1, 1), ("", 1, 1e-9), ("", 1e6, 1), ("", 1, 1), ("no gradient", 1, 1), ("twice", 1, 1)],
    *[("again", 1, 1), ("buffers written", 1, 1), ("", 1, 1), ("buffers replaced", 1, 1), ("", 1, 1)],
    *[("weights written", 1, 1), ("weights replaced", 1, 1), ("not contiguous", 1, 1), ("", 1, 1), ("bfloat16", 1, 1)],
    *[("", 1, 1), ("looked at", 1, 1), ("", 1, 1), ("not a number", 1, 1), ("", 1, 1), ("epsilon", 1, 1), ("", 1, 1)],
]


def _change(layer: SyncBatchNorm, x: torch.Tensor, what: str) -> None:
    with torch.no_grad():
        if what == "buffers written":
            layer.running_mean.add_(1)
        elif what == "buffers replaced":
            layer.running_var = layer.running_var.clone() * 2
        elif what == "weights written" and layer.affine:
            layer.weight.mul_(3)
        elif what == "weights replaced" and layer.affine:
            layer.weight.data = layer.weight.data.clone() + 1
        elif what == "not a number":
            x.view(-1)[0] = torch.nan
        elif what == "epsilon":
            layer.eps = 1e-3


def test_a_converted_model_is_the_same_model() -> None:
    """Names, tensors, modes and the way back; the checkpoint loads into the plain model."""
    model = network(torch.float32).train()
    before = dict(model.named_parameters())
    converted = convert_sync_batchnorm(model)
    assert converted is model
    assert [type(m) for m in (model.first, model.second, model.twice)] == [SyncBatchNorm] * 3
    assert dict(model.named_parameters()) == before
    assert model.first.name.startswith("first")
    second = convert_sync_batchnorm(network(torch.float32))
    assert second.first.name != model.first.name, "two models' layers have names of their own"
    model(batch((4, 2, 6, 6), torch.float32, 0))
    network(torch.float32).load_state_dict(model.state_dict())
    model.eval()
    x = batch((4, 2, 6, 6), torch.float32, 1)
    evaluated = model(x)
    reverted = revert_sync_batchnorm(model)
    assert not any(isinstance(m, SyncBatchNorm) for m in reverted.modules())
    assert torch.equal(reverted(x), evaluated)
    paths = {type(module).__module__ for module in (model.first, SyncBatchNorm(3))}
    assert paths == {"bnlayer.adapters.torch"}, "models that are saved whole name the public path"
    shared = torch.nn.BatchNorm1d(3)
    twice = convert_sync_batchnorm(torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared), "c": shared}))
    assert twice["a"] is twice["b"][0] is twice["c"], "a module that stands in two places is still one"
    single = torch.nn.BatchNorm2d(3, eps=0.5, momentum=None, affine=False)
    one = convert_sync_batchnorm(single)
    assert (one.eps, one.momentum, one.affine, one.track_running_stats) == (0.5, None, False, True)
    assert convert_sync_batchnorm(torch.nn.SyncBatchNorm(3)).weight is not None


def test_what_can_not_be_converted_is_said() -> None:
    """A subclass that does more than normalize would lose it; a lazy module would stay as it is."""

    class WithActivation(torch.nn.BatchNorm2d):
        def forward(self, x: Any) -> Any:
            return torch.relu(super().forward(x))

    class Renamed(torch.nn.BatchNorm2d):
        pass

    model = torch.nn.Sequential(WithActivation(3), Renamed(3))
    with pytest.warns(UserWarning, match="WithActivation at '0' stays unsynchronized: its forward is not BatchNorm's"):
        convert_sync_batchnorm(model)
    assert [type(module) for module in model] == [WithActivation, SyncBatchNorm]
    lazy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"received LazyBatchNorm1d at '1'\. Run the model on one batch first"):
        convert_sync_batchnorm(lazy)
    lazy(torch.ones(4, 3))
    assert type(convert_sync_batchnorm(lazy)[1]) is SyncBatchNorm


def test_errors_name_what_was_expected() -> None:
    """Shapes, dtypes and masks that do not fit."""
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match=r"Expected an input of 2 to 5 dimensions, \(N, 3, …\), received \(2, 4\)"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"an input of the weights' dtype torch.float32, .* received torch.float64"):
        layer(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask.shape=\(2, 3\), input.shape=\(2, 3, 4\)"):
        layer(torch.zeros(2, 3, 4), torch.ones(2, 3))


def test_statistics_that_are_restored_count() -> None:
    """Those of any call, also where others have moved on since, by whichever way: as torch's own."""
    for saved_after in range(4):
        ours, theirs = SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
        for layer in (ours, theirs):
            saved = []
            for step in range(6):
                saved.append({name: tensor.clone() for name, tensor in layer.state_dict().items()})
                layer(batch((16, 3), torch.float32, step))
            layer.load_state_dict(saved[saved_after])
            layer(batch((16, 3), torch.float32, 9))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_look_from_within_a_look_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler does it, while the state is brought up to date."""
    layer, x = SyncBatchNorm(3), batch((16, 3), torch.float32, 0)
    for _ in range(4):
        layer(x)
    assert layer.core is not None
    core = layer.core

    def meanwhile(*vectors: Any) -> Moving:
        monkeypatch.setattr(torch_alone, "Moving", Moving)
        assert core.state.version == 4
        return Moving(*vectors)

    monkeypatch.setattr(torch_alone, "Moving", meanwhile)
    assert core.state.version == 4
    assert not core._state_set


def test_statistics_that_are_not_finite_are_refused_at_every_call() -> None:
    """Until they are finite again."""
    layer, x = SyncBatchNorm(3), batch((16, 3), torch.float32, 0)
    for _ in range(3):
        layer(x)
    layer.running_mean[1] = torch.nan
    for _ in range(3):
        with pytest.raises(ValueError, match="expected finite numbers in moving_mean, received nan in channel 1"):
            layer(x)
    layer.running_mean[1] = 0
    assert torch.isfinite(layer(x)).all()


def test_a_batch_that_comes_back_larger_is_refused() -> None:
    """From a hook on saved tensors: the gradient is not read beyond its end."""
    layer, x = SyncBatchNorm(3), batch((16, 3), torch.float32, 0)
    for _ in range(3):
        layer(x.clone().requires_grad_()).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved.repeat(1000, 1)):
        y = layer(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="cannot reshape"):
        y.sum().backward()


def test_the_dtype_of_a_module_may_change() -> None:
    """Also while an output of the old one waits for its gradients."""
    ours, theirs = SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
    x = batch((16, 3), torch.float32, 0)
    waiting = [layer(x.clone().requires_grad_()) for layer in (ours, theirs)]
    for dtype in (torch.float64, torch.float32):
        outputs = [layer.to(dtype)(x.to(dtype)) for layer in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for output in waiting:
        output.sum().backward()


def test_parameters_need_not_be_in_one_piece() -> None:
    """As for torch's own layers."""
    outputs = []
    for layer in (SyncBatchNorm(3), torch.nn.BatchNorm1d(3)):
        layer.weight = torch.nn.Parameter(torch.arange(6.0)[::2])
        layer.bias = torch.nn.Parameter(torch.arange(6.0)[1::2])
        outputs.append([layer(batch((16, 3), torch.float32, step)) for step in range(3)])
    torch.testing.assert_close(*outputs)


def test_an_input_modified_before_its_backward_pass_is_refused() -> None:
    """By autograd itself, as for torch's own layers."""
    layer = SyncBatchNorm(3)
    x = batch((4, 3), torch.float32, 0).requires_grad_()
    z = x * 1
    y = layer(z)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    """As by torch's own SyncBatchNorm."""
    layer = SyncBatchNorm(3)
    x = batch((4, 3), torch.float32, 0).requires_grad_()
    (dx,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
