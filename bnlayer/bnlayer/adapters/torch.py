"""Synchronized batch normalization for torch, on any device, over any world: `torch.nn.SyncBatchNorm`'s counterpart.

    model = bnlayer.adapters.torch.convert_sync_batchnorm(model)      # the one line that changes
    model = torch.nn.parallel.DistributedDataParallel(model)

The ranks are those of the world that was joined, or of `torch.distributed`, where none was. The statistics, and the
gradient of the inputs, are those of the union of all ranks' batches, exactly: whatever their number and sizes, an empty
one included, they have the same bits. Gradients of weight and bias are this rank's share, as torch's own module gives
them, for DistributedDataParallel to reduce.
"""

from bnlayer.adapters.torch_conversion import BatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from bnlayer.adapters.torch_module import SyncBatchNorm

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "revert_sync_batchnorm"]

# Known by where users find them: torch.save(model, …) writes down the classes of its modules by their paths.
for _public in (BatchNorm, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm):
    _public.__module__ = __name__
