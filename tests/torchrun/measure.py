"""Sharpness of a network, by as many processes as there are.

python measure.py
torchrun --nproc-per-node 2 measure.py
"""

import os

import torch
from torch import distributed

import sharpkit as sk

device = "cpu"
if "RANK" in os.environ:  # torchrun started this process
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)

train, _ = sk.load_dataset("embedded")
model = sk.build_architecture("vgg-4x1", (1, 14, 14), 10, seed=0).to(device).eval()
data = sk.DistributedData(train)  # each process measures its share

sharp = sk.m_sharpness(model, data, m=8, rho=0.05, n=512)
H = sk.HessianOperator(model, data, n=512)
top = sk.top_eigenvalues(H, k=2)
trace = sk.trace(H, products=30)
density = sk.spectral_density(H, steps=20, probes=2)

if data.team.rank == 0:  # every process has the same numbers
    print(f"m-sharpness {sharp.value:.6f} +- {sharp.std_error:.6f}")
    print(f"eigenvalues {top.values[0]:.5f} {top.values[1]:.5f}, trace {trace.value:.4f}")
    print(f"trace of the density {density.trace:.4f}")

if distributed.is_initialized():
    distributed.destroy_process_group()
