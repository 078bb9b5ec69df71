#!/usr/bin/env python3
"""Times PyTorch on the models of package nn, to compare with
`go test -bench Step ./nn`. Prints one JSON object: for LeNet-5 forward,
backward and SGD step, and for the wider CNN forward and backward, the median
and the minimum in ms of a batch of 64 on one thread. gemm512_gflops tells how
good the BLAS library is that PyTorch found: Debian's reference BLAS reaches 5,
OpenBLAS on the same machine 90. Compare with the latter."""

import argparse
import json
import statistics
import time

import torch
from torch import nn


def lenet5():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))


def measure(net, batch, steps, sgd):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01) if sgd else None
    loss_of = nn.CrossEntropyLoss()
    x = torch.randn(batch, 1, 28, 28)
    labels = torch.randint(10, (batch,))
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        net.zero_grad()
        loss_of(net(x), labels).backward()
        if optimizer:
            optimizer.step()
        times.append((time.perf_counter() - start) * 1000)
    times = times[3:]
    return {"median_ms": round(statistics.median(times), 3), "min_ms": round(min(times), 3), "steps": steps}


def gemm(n=512, times=30):
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return round(2 * n ** 3 / best / 1e9, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="LeNet-5 steps; the CNN takes a fifth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print(json.dumps({
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "gemm512_gflops": gemm(),
        "lenet5": measure(lenet5(), args.batch, args.steps, True),
        "cnn": measure(cnn(), args.batch, max(1, args.steps // 5), False),
    }))


if __name__ == "__main__":
    main()
