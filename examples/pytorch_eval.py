#!/usr/bin/env python3
"""Evaluates the LeNet-5 of a run in PyTorch, on IDX files.

    python3 examples/pytorch_eval.py runs/mine dataset/mnist-10k [first row]

The last argument is the first image that counts; 8000 is where the test
images of MNIST-10k begin. safetensors.torch.load_file reads the model file
too; here ten lines do, so that PyTorch is all that is needed.
"""

import gzip
import json
import pathlib
import struct
import sys

import torch
from torch import nn


def load(path):
    """The tensors and the metadata of a safetensors file."""
    raw = pathlib.Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).reshape(t["shape"])
    return tensors, metadata


def idx(folder, kind):
    (path,) = pathlib.Path(folder).glob(f"*{kind}*idx*")
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    dims = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).reshape(dims)


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


def main():
    run, folder, first = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    tensors, metadata = load(pathlib.Path(run) / "model.safetensors")
    model = LeNet5()
    model.load_state_dict(tensors)
    x = idx(folder, "images")[first:].float() * float(metadata["spirt.scale"]) + float(metadata["spirt.offset"])
    labels = idx(folder, "labels")[first:].long()
    with torch.no_grad():
        out = model(x.unsqueeze(1))
    print(json.dumps({
        "accuracy": (out.argmax(1) == labels).float().mean().item(),
        "loss": nn.functional.cross_entropy(out, labels).item(),
        "samples": len(labels),
    }))


if __name__ == "__main__":
    main()
