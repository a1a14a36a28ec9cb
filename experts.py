"""Mixture-of-experts feed-forward: a router sends each token to a few of many small feed-forward layers. Packed tokens in and out.

Source: Shazeer et al. 2017 and Fedus et al., Switch Transformer, 2021 (router, load balance); Dai et al., DeepSeekMoE, 2024 (shared
experts).

Legend: N packed tokens, D width, E experts, K experts a token, I inner width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from layers import Dropout, FeedForward, activate, inner_size, is_exporting


class Experts(nn.Module):
    """K of E routed experts a token, weighted by the router, and experts that every token goes through.

    config: the model group of the settings. Forward: (N, D) -> ((N, D), balance). balance: a scalar, E sum_e share_e probability_e over the
    tokens at hand (on CPU those of a piece of the batch): 1 where all experts are used alike, E where one gets all.
    `counts` collects the tokens of each expert, (E,) int64 a call in training, until someone takes them.
    """

    def __init__(self, config) -> None:
        super().__init__()
        width, num = config.hidden_units, config.num_experts
        self.activation, self.active = config.activation, config.active_experts
        inner, fused = inner_size(width * config.expert_multiplier, config.activation)
        self.matrix_stacks = {"inner": fused, "outer": 1}  # muon.py
        self.router = nn.Linear(width, num, bias=False)
        self.inner = nn.Parameter(torch.empty(num, width, fused * inner).normal_(0.0, width**-0.5))
        self.outer = nn.Parameter(torch.empty(num, inner, width).normal_(0.0, (inner * 2 * config.num_blocks) ** -0.5))
        multiplier = config.expert_multiplier * config.shared_experts
        self.shared = FeedForward(width, multiplier, config.activation, config.dropout_rate) if config.shared_experts else None
        self.dropout = Dropout(config.dropout_rate)
        self.counts: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.router(x).float().softmax(-1)  # (N, E)
        weight, chosen = probability.topk(self.active)  # (N, K)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        if is_exporting():
            return self._by_all(x, weight, chosen), probability.new_ones(())
        flat = chosen.view(-1)
        order = flat.argsort(stable=True)  # places n * K + k, an expert's together
        sizes, share = self._sizes(flat)
        rows = x.index_select(0, order // self.active)  # (N K, D)
        found = [self._expert(*part) for part in zip(rows.split(sizes), self.inner.unbind(), self.outer.unbind())]
        # Back in the order of the tokens by the inverse permutation, not by adding into rows: CUDA would add in any order.
        found = torch.cat(found).index_select(0, order.argsort()).view(len(x), self.active, -1)
        out = (found * weight[..., None]).sum(1)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, self.router.out_features * (share * probability.mean(0)).sum()

    def _by_all(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on every token, weighted by 0 where it was not chosen: for torch.export, which cannot sort tokens by expert."""
        share = x.new_zeros(x.shape[0], self.router.out_features).scatter(1, chosen, weight)  # (N, E)
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for expert, parts in enumerate(zip(self.inner.unbind(), self.outer.unbind())):
            out = out + share[:, expert, None] * self._expert(x, *parts)
        return out

    def _expert(self, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return self.dropout(activate(x @ inner.to(x.dtype), self.activation)) @ outer.to(x.dtype)

    def _sizes(self, flat: Tensor) -> tuple[list[int], Tensor]:
        """Tokens of each expert: as numbers, and as shares (E,)."""
        num = self.router.out_features
        if isinstance(flat, FakeTensor):  # --estimate: no values, so all alike
            return [len(flat) * (e + 1) // num - len(flat) * e // num for e in range(num)], flat.new_zeros(num, dtype=torch.float32)
        counts = torch.bincount(flat, minlength=num)
        if self.training and torch.is_grad_enabled():
            self.counts.append(counts)  # pieces run in threads: a list's append is safe, and sums of counts do not depend on their order
        return counts.tolist(), counts.float() / max(1, len(flat))


def take_usage(model: nn.Module) -> dict[str, Tensor]:
    """Share of the tokens since the last call, (E,) float32, by the name of each Experts module; {} without, or before any training."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.counts:
            counts, module.counts = torch.stack(module.counts).sum(0), []
            found[name] = counts.float() / counts.sum()
    return found
