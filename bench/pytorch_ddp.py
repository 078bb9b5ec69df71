#!/usr/bin/python3
"""One round of data-parallel training in PyTorch: the yardstick of `spirt train`.

LeNet-5 on MNIST-10k in several processes over gloo, with
DistributedDataParallel, Adam and one thread each. Every process draws its
minibatches from a shard of its own that lies in memory as normalised floats.
Prints one line of JSON; a step is zero_grad, forward, backward with the
all-reduce, and the optimizer, timed in the first process.

    python3 bench/pytorch_ddp.py [--processes 4] [--steps 200]
"""

import argparse
import gzip
import json
import os
import pathlib
import statistics
import tempfile
import time

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

MNIST = pathlib.Path(__file__).resolve().parent.parent / "dataset" / "mnist-10k"


def lenet5():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )


def mnist():
    """Normalised images and labels: 7,000 to train, 2,000 to test."""
    images = torch.frombuffer(bytearray(gzip.open(MNIST / "images-idx3-ubyte.gz").read()[16:]), dtype=torch.uint8)
    labels = torch.frombuffer(bytearray(gzip.open(MNIST / "labels-idx1-ubyte.gz").read()[8:]), dtype=torch.uint8)
    x, y = images.reshape(-1, 1, 28, 28).float(), labels.long()
    x = (x - x[:7000].mean()) / x[:7000].std()
    return (x[:7000], y[:7000]), (x[8000:], y[8000:])


def train(rank, args, meeting, result):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.processes)
    (x, y), test = mnist()
    per = len(x) // args.processes
    x, y = x[rank * per:(rank + 1) * per], y[rank * per:(rank + 1) * per]

    plain = lenet5()
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    cross_entropy = nn.CrossEntropyLoss()
    order = torch.Generator().manual_seed(args.seed * 1000 + rank)
    rows = torch.empty(0, dtype=torch.long)
    times = []
    for step in range(args.warmup + args.steps):
        start = time.perf_counter()
        while len(rows) < args.batch_size:
            rows = torch.cat([rows, torch.randperm(per, generator=order)])
        batch, rows = rows[:args.batch_size], rows[args.batch_size:]
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        if step >= args.warmup:
            times.append(time.perf_counter() - start)

    if rank == 0:
        with torch.no_grad():
            accuracy = (plain(test[0]).argmax(1) == test[1]).float().mean().item()
        ms = sorted(1000 * t for t in times)
        result.write_text(json.dumps({
            "what": "lenet5-ddp", "torch": torch.__version__, "processes": args.processes, "threads": 1,
            "batch_size": args.batch_size, "steps": args.steps, "warmup": args.warmup,
            "ms_per_step": round(statistics.median(ms), 3), "ms_mean": round(statistics.fmean(ms), 3),
            "ms_p99": round(ms[int(0.99 * (len(ms) - 1))], 3), "loss": round(loss.item(), 4), "accuracy": round(accuracy, 4),
        }))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--processes", type=int, default=4)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--warmup", type=int, default=20)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--lr", type=float, default=2e-3)
    flags.add_argument("--seed", type=int, default=1)
    args = flags.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result"
        torch.multiprocessing.spawn(train, (args, f"{folder}/meeting", result), nprocs=args.processes)
        print(result.read_text())


if __name__ == "__main__":
    main()
