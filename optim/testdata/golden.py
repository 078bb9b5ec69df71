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
    ("sgd", {**rounded(lr=0.05, momentum=0.9), "nesterov": True}),
    ("sgd", {**rounded(lr=0.05, momentum=0.8, weight_decay=0.02), "nesterov": True}),
    ("adamw", rounded(lr=0.002)),
    ("adamw", rounded(lr=0.01, weight_decay=0.1)),
    ("adamw", rounded(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.5)),
    ("rmsprop", rounded(lr=0.01)),
    ("rmsprop", rounded(lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.05)),
    ("rmsprop", rounded(lr=0.01, momentum=0.9)),
    ("rmsprop", rounded(lr=0.01, alpha=0.9, momentum=0.8, weight_decay=0.05)),
    ("adagrad", rounded(lr=0.1)),
    ("adagrad", rounded(lr=0.1, eps=1e-3, weight_decay=0.05)),
]

# The vectors of a state, in package optim's order.
STATES = {
    "sgd": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "adamw": ["exp_avg", "exp_avg_sq"],
    "rmsprop": ["square_avg", "momentum_buffer"],
    "adagrad": ["sum"],
}


def optimizer(name, p, hyper):
    if name == "sgd":
        return torch.optim.SGD([p], **hyper)
    if name == "rmsprop":
        return torch.optim.RMSprop([p], **{**rounded(alpha=0.99, eps=1e-8), **hyper})
    if name == "adagrad":
        return torch.optim.Adagrad([p], **{**rounded(eps=1e-10), **hyper})
    hyper = {**rounded(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0), **hyper}
    betas = (hyper.pop("beta1"), hyper.pop("beta2"))
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]([p], betas=betas, **hyper)


torch.manual_seed(1)
params = torch.randn(N)
grads = torch.randn(STEPS, N) * torch.logspace(-3, 1, N)
out = {"params": params.tolist(), "grads": grads.tolist(), "cases": []}
for name, hyper in CASES:
    p = params.clone().requires_grad_()
    opt = optimizer(name, p, hyper)
    steps = []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        state = opt.state[p]
        vectors = [state[k] for k in STATES[name] if k != "momentum_buffer" or hyper.get("momentum")]
        flat = torch.cat([torch.zeros(0), *vectors])
        steps.append({"params": p.detach().tolist(), "state": flat.tolist()})
    out["cases"].append({"config": {"name": name, **hyper}, "steps": steps})
print(json.dumps(out))
