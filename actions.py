"""What a query is told of the action that is wanted next, and a head that predicts the next action. Past actions are the model's input.

Action types are schema.py's codes; ANY_ACTION stands for a wanted action that is not known. Must not decide which action is wanted.

Legend: N tokens, M unique items, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schema import ANY_ACTION, NUM_ACTION_TYPES


class ActionConditioning(nn.Module):
    """Modulates each query by the action that is wanted of the next event, as PinRec's outcome conditioning does.

    film: query * (1 + scale[action]) + shift[action]. gate: query * 2 sigmoid(query @ weight + bias[action]), so that what is let through
    depends on the query too. Both start as the identity: the model begins as the one without conditioning. ANY_ACTION has a row of its own,
    trained where the action is hidden.
    Sources: Perez et al., FiLM, 2018, equation 2; Badrinath et al., PinRec, 2025 (outcome-conditioned generation).
    """

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        assert kind in ("film", "gate"), kind
        rows = ANY_ACTION + 1
        self.kind = kind
        self.scale = nn.Parameter(torch.zeros(rows, width)) if kind == "film" else None
        self.shift = nn.Parameter(torch.zeros(rows, width))  # gate: its bias
        self.weight = nn.Parameter(torch.zeros(width, width)) if kind == "gate" else None

    def forward(self, query: Tensor, actions: Tensor) -> Tensor:
        """query: (N, D) float32. actions: (N,) int64 in 0..ANY_ACTION. Result (N, D) float32."""
        shift = self.shift.index_select(0, actions)
        if self.kind == "film":
            return query * (1 + self.scale.index_select(0, actions)) + shift
        return query * (2 * torch.sigmoid((query @ self.weight).float() + shift))


def wanted_in_training(target_actions: Tensor, hidden_share: float) -> Tensor:
    """What training tells the queries: each target's action (N,), or ANY_ACTION for a share of the tokens, drawn at random."""
    if not hidden_share:
        return target_actions
    hidden = torch.rand(target_actions.shape, device=target_actions.device) < hidden_share
    return target_actions.masked_fill(hidden, ANY_ACTION)


class ActionHead(nn.Module):
    """The next event's action type from the query and the item of that event: a linear layer on both and on their product.

    The item is given, as the loss asks what a user does with what he is shown: from the query alone the answer is hardly more than the base
    rate, and the items would learn nothing of what is clicked. The query must be the one before conditioning, which knows the answer.
    It serves the loss alone; the answers of inference do not use it. It starts at zero: every action is as likely as any other.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * width, NUM_ACTION_TYPES))
        self.bias = nn.Parameter(torch.zeros(NUM_ACTION_TYPES))

    def forward(self, query: Tensor, items: Tensor) -> Tensor:
        """Logits (N, NUM_ACTION_TYPES) of queries (N, D) and items (N, D)."""
        return torch.cat((query, items, query * items), dim=1) @ self.weight + self.bias

    def loss(self, query: Tensor, item_emb: Tensor, target_index: Tensor, target_actions: Tensor) -> Tensor:
        """Mean cross-entropy over tokens. query: (N, D); item_emb: (M, D); target_index: (N,) into item_emb; target_actions: (N,)."""
        return F.cross_entropy(self(query, item_emb.index_select(0, target_index)), target_actions)
