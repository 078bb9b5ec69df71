"""Writes golden.json: parameters after each of some steps of torch.optim.

Run with a Python that has PyTorch (1.13 wrote the file that is kept here):

    python3 optim/testdata/golden.py > optim/testdata/golden.json

Hyperparameters are rounded to float32 first, as package optim holds them.
"""

import json

import numpy as np
import torch

N, STEPS = 13, 6


def rounded(**kwargs):
    return {k: float(np.float32(v)) for k, v in kwargs.items()}


CASES = [
    ("sgd", rounded(lr=0.1)),
    ("sgd", rounded(lr=0.05, weight_decay=0.01)),
    ("sgd", rounded(lr=0.05, momentum=0.9)),
    ("sgd", rounded(lr=0.05, momentum=0.9, weight_decay=0.02)),
    ("adam", rounded(lr=0.002)),
    ("adam", rounded(lr=0.01, weight_decay=0.05)),
    ("adam", rounded(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-3)),
]

torch.manual_seed(1)
params = torch.randn(N)
grads = torch.randn(STEPS, N) * torch.logspace(-3, 1, N)
out = {"params": params.tolist(), "grads": grads.tolist(), "cases": []}
for name, hyper in CASES:
    p = params.clone().requires_grad_()
    if name == "sgd":
        opt = torch.optim.SGD([p], **hyper)
    else:
        betas = (hyper.get("beta1", float(np.float32(0.9))), hyper.get("beta2", float(np.float32(0.999))))
        rest = {k: v for k, v in hyper.items() if not k.startswith("beta")}
        rest.setdefault("eps", float(np.float32(1e-8)))
        opt = torch.optim.Adam([p], betas=betas, **rest)
    steps = []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        state = opt.state[p]
        if name == "adam":
            flat = torch.cat([state["exp_avg"], state["exp_avg_sq"]])
        elif hyper.get("momentum"):
            flat = state["momentum_buffer"]
        else:
            flat = torch.zeros(0)
        steps.append({"params": p.detach().tolist(), "state": flat.tolist()})
    out["cases"].append({"config": {"name": name, **hyper}, "steps": steps})
print(json.dumps(out))
