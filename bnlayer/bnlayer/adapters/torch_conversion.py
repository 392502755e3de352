"""Whole torch models: their normalizations replaced by `SyncBatchNorm`, and back.

The new modules have the old ones' tensors, so that an optimizer, or another module that shares them, sees no change.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnlayer.adapters.torch_module import SyncBatchNorm
from bnlayer.base import automatic_name


def convert_sync_batchnorm(module: Any, process_group: Any = None) -> Any:
    """Replace every `BatchNorm1d/2d/3d` and `torch.nn.SyncBatchNorm` of a model by a `SyncBatchNorm`.

    Parameters and buffers are the same tensors as before, so an optimizer may be made before or after. Each layer is
    named for its place in the model, e.g. "layer1.0.bn1". A subclass with a `forward` of its own does more than
    normalize: it is left alone, unsynchronized, with a warning.

    Args:
        module: the model, or a normalization itself.
        process_group: of the new modules.

    Returns:
        The model; the new module where it was a normalization itself.

    Raises:
        ValueError: a lazy normalization does not know its number of features yet.
    """
    return _replaced(module, "", lambda old, name: _converted(old, process_group, name))


def revert_sync_batchnorm(module: Any) -> Any:
    """Replace every `SyncBatchNorm` of a model by torch's own `BatchNorm` for any number of dimensions.

    Parameters and buffers are the same tensors as before.

    Returns:
        The model; the new module where it was a `SyncBatchNorm` itself.
    """
    return _replaced(module, "", lambda old, _: _reverted(old))


class BatchNorm(_BatchNorm):
    """torch's local batch normalization, for inputs of 2 to 5 dimensions: what a `SyncBatchNorm` is reverted to."""

    def _check_input_dim(self, input: Any) -> None:  # noqa: A002
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"Expected an input of 2 to 5 dimensions, received {input.dim()}.")


def _replaced(module: Any, path: str, replace: Any, done: dict[int, Any] | None = None) -> Any:
    """A model with some of its modules replaced; one that stands in several places by the same new one in each."""
    done = {} if done is None else done
    if id(module) in done:
        return done[id(module)]
    new = done[id(module)] = replace(module, path)
    if new is module:
        for name, child in list(module._modules.items()):  # noqa: SLF001 - named_children() passes a module once
            if child is None:
                continue
            changed = _replaced(child, f"{path}.{name}" if path else name, replace, done)
            if changed is not child:
                module.add_module(name, changed)
    return new


def _converted(old: Any, process_group: Any, name: str) -> Any:
    if not isinstance(old, _BatchNorm) or isinstance(old, SyncBatchNorm):
        return old
    kind = type(old).__name__
    if isinstance(old, LazyModuleMixin):
        raise ValueError(
            f"Expected normalizations that know their number of features, received {kind} at {name!r}. Run the model "
            "on one batch first, then convert it."
        )
    if type(old).forward not in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward):
        warnings.warn(
            f"{kind} at {name!r} stays unsynchronized: its forward is not BatchNorm's. Replace it by a SyncBatchNorm "
            "and what else it does.",
            stacklevel=3,
        )
        return old
    new = SyncBatchNorm(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, process_group, device="meta",
        name=automatic_name(name or "sync_batch_norm"),
    )  # fmt: skip
    return _with_contents(new, old)


def _reverted(old: Any) -> Any:
    if not isinstance(old, SyncBatchNorm):
        return old
    new = BatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    return _with_contents(new, old)


def _with_contents(new: Any, old: Any) -> Any:
    for name in ("weight", "bias"):
        setattr(new, name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    if hasattr(old, "qconfig"):
        new.qconfig = old.qconfig
    return new
