"""Flax NNX's BatchNorm, whose statistics are those of all ranks: `sync_batch_norm` as a module."""

from __future__ import annotations

from typing import Any

from flax import nnx

from bnlayer.adapters.jax import sync_batch_norm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` with the arguments, parameters and running statistics of Flax, synchronized over the ranks.

    Args:
        num_features: C.
        name: how the ranks know the layer.
        rngs: for the initializers.
        **settings: Flax's, but for `axis_name` and `axis_index_groups`, which are about devices of one process.

    Raises:
        ValueError: one of these two was given.
    """

    def __init__(self, num_features: int, *, name: str, rngs: nnx.Rngs, **settings: Any) -> None:
        if settings.get("axis_name") is not None or settings.get("axis_index_groups") is not None:
            raise ValueError("axis_name and axis_index_groups are about devices of one process: leave them out.")
        super().__init__(num_features, rngs=rngs, **settings)
        self.name = name

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """Normalize a batch.

        Args:
            x: cast to the module's dtype where it has one.
            use_running_average: True: inference; nothing is exchanged.
            mask: bool, of one dimension less than x; False keeps a position out of the statistics.

        Returns:
            y, of the dtype of x.

        Raises:
            As `bnlayer.adapters.jax.sync_batch_norm`.
        """
        inference = self.use_running_average if use_running_average is None else use_running_average
        y, mean, variance = sync_batch_norm(
            x if self.dtype is None else x.astype(self.dtype),
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
            self.mean[...],
            self.var[...],
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            training=not inference,
            mask=mask,
            name=self.name,
        )
        if not inference:
            self.mean[...], self.var[...] = mean, variance
        return y
