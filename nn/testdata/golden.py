#!/usr/bin/env python3
"""Writes golden.json: losses and gradients by PyTorch, which golden_test.go
compares with. Needs torch and numpy; made with PyTorch 1.13 and run as

    python3 golden.py > golden.json

Parameters, inputs and labels come from a small generator that the test has
too, so the file only holds results: of every gradient its sum, its sum of
absolute values and some samples, evenly spaced."""

import json
import math

import numpy as np
import torch
from torch import nn

SAMPLES = 24
MASK = (1 << 64) - 1


def splitmix(seed, count):
    """SplitMix64's first outputs, vectorised."""
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(seed)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed, count, levels):
    """Numbers in [-1, 1); if levels is positive, one of that many."""
    top = splitmix(seed, count) >> np.uint64(40)
    if levels:
        k = (top % np.uint64(levels)).astype(np.int64)
        return (k - levels // 2).astype(np.float32) / np.float32(levels // 2)
    return ((top.astype(np.int64) - (1 << 23)) / (1 << 23)).astype(np.float32)


def build(spec):
    layers, c, h, w = [], *spec["input"]
    for l in spec["layers"]:
        k, s, p = l.get("kernel", 0), l.get("stride", 0), l.get("padding", 0)
        kind = l["kind"]
        if kind == "conv2d":
            s = s or 1
            layers.append(nn.Conv2d(c, l["out"], k, s, p))
            c = l["out"]
        elif kind == "maxpool":
            s = s or k
            layers.append(nn.MaxPool2d(k, s, p))
        elif kind == "relu":
            layers.append(nn.ReLU())
        elif kind == "flatten":
            layers.append(nn.Flatten())
            c, h, w = c * h * w, 1, 1
        elif kind == "linear":
            layers.append(nn.Linear(c, l["out"]))
            c = l["out"]
        if kind in ("conv2d", "maxpool"):
            h, w = (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1
    return nn.Sequential(*layers)


def run(spec, batch, levels):
    net = build(spec)
    for i, p in enumerate(net.parameters()):
        fan_in = math.prod(p.shape[1:]) if p.dim() > 1 else 1
        values = uniform(1000 + i, p.numel(), levels)
        if not levels:
            values = values * np.float32(1 / math.sqrt(fan_in))
        p.data = torch.from_numpy(values.reshape(tuple(p.shape)))
    x = torch.from_numpy(uniform(1, batch * math.prod(spec["input"]), levels)).reshape(batch, *spec["input"])
    labels = torch.from_numpy((splitmix(2, batch) >> np.uint64(40)).astype(np.int64) % spec["classes"])
    logits = net(x)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    gradients = []
    for p in net.parameters():
        g = p.grad.flatten().double()
        step = max(1, g.numel() // SAMPLES)
        gradients.append({
            "sum": g.sum().item(),
            "abs": g.abs().sum().item(),
            "step": step,
            "samples": [float(f"{v:.9g}") for v in g[::step].tolist()],
        })
    return {
        "spec": spec,
        "batch": batch,
        "levels": levels,
        "loss": loss.item(),
        "correct": int((logits.argmax(1) == labels).sum()),
        "gradients": gradients,
    }


def conv(out, kernel, padding=0, stride=0):
    return {"kind": "conv2d", "out": out, "kernel": kernel, "padding": padding, "stride": stride}


def pool(kernel, stride=0, padding=0):
    return {"kind": "maxpool", "kernel": kernel, "stride": stride, "padding": padding}


def linear(out):
    return {"kind": "linear", "out": out}


RELU, FLATTEN = {"kind": "relu"}, {"kind": "flatten"}
MNIST = [1, 28, 28]


def spec(name, size, classes, *layers):
    return {"name": name, "input": size, "classes": classes, "layers": [{k: v for k, v in l.items() if v} for l in layers]}


CASES = [
    (spec("linear", [2, 3, 3], 5, FLATTEN, linear(5)), 7, 0),
    (spec("conv", [3, 9, 8], 4, conv(5, 3), FLATTEN, linear(4)), 5, 0),
    (spec("conv-padded", [2, 7, 6], 4, conv(3, 3, 1), conv(18, 5, 2), FLATTEN, linear(4)), 5, 0),
    (spec("conv-strided", [3, 11, 12], 4, conv(4, 3, 1, 2), RELU, conv(7, 2, 1, 3), FLATTEN, linear(4)), 5, 0),
    (spec("pool", [2, 8, 8], 3, conv(4, 3, 1), pool(2), FLATTEN, linear(3)), 4, 0),
    (spec("pool-overlapping", [2, 9, 10], 3, conv(4, 3, 1), pool(3, 2, 1), conv(5, 3), RELU, pool(2, 1), FLATTEN, linear(3)), 4, 0),
    (spec("pool-twice", [1, 12, 12], 3, pool(2, 1), conv(20, 3, 1), RELU, pool(2), pool(3, 1, 1), RELU, FLATTEN, linear(3)), 4, 0),
    (spec("pool-ties", [2, 10, 10], 3, conv(3, 2), RELU, pool(2), conv(2, 2), pool(3, 1, 1), FLATTEN, linear(3)), 6, 4),
    (spec("relu", [1, 4, 4], 6, RELU, FLATTEN, linear(9), RELU, linear(6)), 8, 0),
    (spec("logistic", MNIST, 10, FLATTEN, linear(10)), 8, 0),
    (spec("mlp", MNIST, 10, FLATTEN, linear(256), RELU, linear(128), RELU, linear(10)), 8, 0),
    (spec("lenet5", MNIST, 10, conv(6, 5, 2), RELU, pool(2), conv(16, 5), RELU, pool(2), FLATTEN, linear(120), RELU, linear(84), RELU, linear(10)), 8, 0),
    (spec("cnn", MNIST, 10, conv(32, 5, 2), RELU, pool(2), conv(64, 5, 2), RELU, pool(2), FLATTEN, linear(128), RELU, linear(10)), 4, 0),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(over="ignore")
    print("[")
    print(",\n".join(json.dumps(run(*case)) for case in CASES))
    print("]")
