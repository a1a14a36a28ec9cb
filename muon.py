"""Muon: momentum whose direction is orthogonalised, for weight matrices; says which weights of a model are matrices.

Must not know of data, of files, or of the joint table's rows.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon): momentum,
Nesterov, five Newton-Schulz steps with the quintic of these coefficients, and the scale sqrt(max(1, outputs / inputs)). The other rule in
use, 0.2 sqrt(max(outputs, inputs)) (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4), makes the root mean square of an update
that of AdamW's, for one learning rate for both; here Muon has its own learning rate, and .02 is the first rule's.

A module says what a weight of it is, as shapes alone do not:
  nn.Linear(...).fused = 3: the weight is so many matrices of like shape, stacked along the outputs (query, key and value).
  matrix_stacks = {"inner": 2}: names of a module's parameters (or ParameterLists) of shape (..., inputs, outputs), used as x @ weight; the
    number as `fused`: each is so many matrices of like shape, side by side along the outputs.

Legend: P matrices of a weight, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel import run

QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7  # so that a gradient of zeros stays one


class Matrices(NamedTuple):
    """A weight that holds matrices."""

    weight: nn.Parameter
    parts: int  # P
    inputs_first: bool  # (P / fused, I, fused * O) in place of (P, O, I)
    fused: int = 1  # of inputs first alone


def find_matrices(modules: Iterable[nn.Module]) -> list[Matrices]:
    """The matrices within `modules`: weights of linear layers, and declared stacks. A weight with one input or output is a vector."""
    found = [entry for root in modules for module in root.modules() for entry in _matrices_of(module)]
    return [entry for entry in dict.fromkeys(found) if entry.weight.requires_grad]


def _matrices_of(module: nn.Module) -> Iterator[Matrices]:
    if isinstance(module, nn.Linear):
        parts = getattr(module, "fused", 1)
        if module.out_features % parts:
            raise ValueError(f"{module}: {module.out_features} outputs are not {parts} matrices of like shape")
        if min(module.out_features // parts, module.in_features) > 1:
            yield Matrices(module.weight, parts, inputs_first=False)
    for name, fused in getattr(module, "matrix_stacks", {}).items():
        held = getattr(module, name)
        for weight in held if isinstance(held, nn.ParameterList) else [held]:
            if weight.dim() >= 2 and min(weight.shape[-2], weight.shape[-1] // fused) > 1 and weight.numel():
                yield Matrices(weight, fused * weight.shape[:-2].numel(), inputs_first=True, fused=fused)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Each of the matrices (P, rows, columns) with its singular values brought near 1: U S V^T -> about U V^T.

    Singular values above .003 of the matrix's norm end between .68 and 1.21; smaller ones grow to 3.4^5 of what they were at most.
    float32 on CPU, bfloat16 on CUDA, as published; the norm is float32 on both. A matrix of zeros stays one.
    """
    x = matrices.float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the shorter side
    a, b, c = QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay (a weight shrinks by lr * weight_decay an update); state: one moment a weight.

    The groups carry schedule "muon", by which the trainer knows their learning rate.
    """

    def __init__(self, matrices: list[Matrices], *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        kinds = dict.fromkeys(entry[1:] for entry in matrices)
        groups = [
            {"params": [entry.weight for entry in matrices if entry[1:] == kind]} | dict(zip(Matrices._fields[1:], kind)) for kind in kinds
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "schedule": "muon"})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient; the gradients are left as they are."""
        jobs = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    jobs.append(partial(_update, weight, weight.grad, state["momentum"], group))
        run(jobs)


def _update(weight: Tensor, grad: Tensor, moment: Tensor, group: dict) -> None:
    momentum, parts, fused = group["momentum"], group["parts"], group["fused"]
    moment.lerp_(grad, 1 - momentum)
    last = weight.shape[-1] // fused
    shape = (parts // fused, weight.numel() // last // parts, fused, last)  # what is fused lies side by side in a row
    apart = torch.lerp(grad, moment, momentum).reshape(shape).transpose(1, 2)  # (P / fused, fused, rows, columns)
    direction = orthogonalise(apart.flatten(0, 1)).view(apart.shape).transpose(1, 2)
    outputs, inputs = (last, shape[1]) if group["inputs_first"] else (shape[1], last)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(direction.reshape(weight.shape), alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)


class MuonAdamW:
    """Muon for a model's matrices and AdamW for the rest, together as one torch optimiser; AdamW's groups come first."""

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon) -> None:
        self.adamw, self.muon = adamw, muon

    @property
    def param_groups(self) -> list[dict]:
        return [*self.adamw.param_groups, *self.muon.param_groups]

    def step(self) -> None:
        self.adamw.step()
        self.muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adamw.zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])
