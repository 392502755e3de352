"""A trained layer elsewhere: in Keras, in torch, in a file, or inside the kernel next to it.

| module | holds |
|---|---|
| `keras.py` | a Keras layer's weights, in Keras's order |
| `torch.py` | the state dict of torch's `BatchNorm1d/2d/3d` and `SyncBatchNorm` |
| `files.py` | safetensors and `.npz`, written atomically; `contents.py` says what is in them, `containers.py` how |
| `folding.py` | inference without the layer: its affine map inside a dense or convolution kernel |

Nothing here imports a framework: layers and tensors are taken by the methods they have.
"""

from bnlayer.interchange.files import load, load_into, save
from bnlayer.interchange.folding import fold, fold_following
from bnlayer.interchange.keras import from_keras, to_keras
from bnlayer.interchange.torch import from_torch, to_torch, torch_arguments

__all__ = [
    "fold",
    "fold_following",
    "from_keras",
    "from_torch",
    "load",
    "load_into",
    "save",
    "to_keras",
    "to_torch",
    "torch_arguments",
]
