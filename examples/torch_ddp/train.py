"""ResNet-18 on the handwritten digits, data-parallel on CPUs, with synchronized batch normalization.

    torchrun --nproc-per-node=2 examples/torch_ddp/train.py

A script for DistributedDataParallel as any other: one line was changed for the synchronized layers, below. torch's own
`SyncBatchNorm` ends here with "SyncBatchNorm layers only work with GPU modules".
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.distributed as dist
from resnet import ResNet18
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import bnlayer.adapters.torch

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--epochs", type=int, default=4)
arguments.add_argument("--batch", type=int, default=16, help="rows a rank and step")
arguments.add_argument("--width", type=int, default=8, help="64 is the paper's")
arguments.add_argument("--save", default="resnet18.pt")
options = arguments.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
dist.init_process_group("gloo")

images, labels = load_digits(return_X_y=True)
images = torch.from_numpy((images / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
labels = torch.from_numpy(labels)
train, test = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])
sampler = DistributedSampler(train, shuffle=True)
loader = DataLoader(train, options.batch, sampler=sampler)

model = ResNet18(width=options.width)
# The line that was changed. It was: model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
model = bnlayer.adapters.torch.convert_sync_batchnorm(model)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

for epoch in range(options.epochs):
    ddp.train()
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(ddp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ddp.eval()
    with torch.no_grad():
        accuracy = (ddp(test[0]).argmax(1) == test[1]).float().mean().item()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.3f}", flush=True)

if dist.get_rank() == 0:
    torch.save(model.state_dict(), options.save)
    plain = ResNet18(width=options.width)
    plain.load_state_dict(torch.load(options.save))  # the names are torch's own: it loads into the plain model
    plain.eval()
    with torch.no_grad():
        same = torch.equal(plain(test[0]), ddp(test[0]))
    print(f"saved {options.save}; the plain model gives the same answers: {same}")
dist.destroy_process_group()
