"""A training by DistributedDataParallel that all processes follow together.

torchrun --nproc-per-node 2 train.py
"""

import gc

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import sharpkit as sk

distributed.init_process_group("gloo")
rank = distributed.get_rank()
train, _ = sk.load_dataset("embedded")

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.BatchNorm1d(32), nn.ReLU())
model = DistributedDataParallel(model.append(nn.Linear(32, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(train, batch_size=64, sampler=DistributedSampler(train, seed=0))

tracker = sk.Tracker(sk.DistributedData(train), every=5, n=256, out="tracking.csv")
tracker(model, optimizer, step=0)
for step, (images, labels) in enumerate(loader, start=1):
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    tracker(model, optimizer, step=step)  # on every rank
    if step == 15:
        break
if rank == 0:
    print(tracker.frame()[["step", "loss", "lambda_max", "threshold"]])
del model, tracker
gc.collect()  # if the model outlives its process group, both may wait for ever
distributed.destroy_process_group()
