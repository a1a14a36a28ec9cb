"""The recommender: unique items -> item vectors, sequences of them -> query vectors. Receives tensors, gives tensors.

Opens no file, reads no environment, moves nothing between devices, computes no metric and no loss.

Legend: B users, N packed tokens, Q of them query tokens, M unique items, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_tokens
import fused_tower
from actions import ActionConditioning, ActionHead, wanted_in_training
from backbones import BACKBONES
from blas import linear
from dataset import Batch
from embedding import JointTable, RowProjection
from features import ITEM_ID, Dense, FeatureInputs, SideInputs, TableLayout
from layers import Dropout, Packing, Queries, gather_tokens, gelu, packed_pieces, pick
from parallel import in_pieces, piece_generators, row_pieces
from schema import ANY_ACTION, NUM_ACTION_TYPES
from time_features import TimeFeatures

TEMPERATURES = math.log(0.01), math.log(1.0)  # of a learnt one, so that it cannot run away
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": gelu}


class ItemVectors(NamedTuple):
    """One encoding of M items, seen from both sides."""

    history: Tensor  # (M, D) as inputs of the sequence
    candidate: Tensor  # (M, D) as answers, float32; normalised where similarity is cosine


class Encoded(NamedTuple):
    """A batch, encoded."""

    query: Tensor  # (Q, D) float32; normalised where similarity is cosine
    item_emb: Tensor  # (M, D) float32, candidate side; likewise
    state: Tensor  # (Q, D) the queries before the wanted action modulates them; `query` itself where it does not
    balance: Tensor | None  # how evenly the experts are used, a scalar, see experts.Experts; None without


class _OfTokens(NamedTuple):
    """What a piece of a batch's tokens gives; None where the model has no such thing."""

    query: Tensor  # (Q, D) float32
    state: Tensor | None  # (Q, D) of a model with both a conditioning and an action head; else it is the query, or nobody asks for it
    balance: Tensor | None  # (Q,) the piece's, a row a query, so that the pieces' mean weighs them by these


class DenseProjection(nn.Module):
    """Projects a multimodal vector; where an item has none, a learnt vector stands in.

    The input is scaled to a root mean square of 1: published vectors differ in norm by orders of magnitude.
    """

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_width, width)
        self.missing = nn.Parameter(torch.zeros(width))

    def forward(self, dense: Dense) -> Tensor:
        values = dense.values.float()
        scale = torch.rsqrt(torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(values.shape[1]).add_(1e-6))
        present = dense.present[:, None].to(values.dtype)
        return linear(torch.cat((values * scale, present, 1 - present), dim=1), self.joint_weight())

    def joint_weight(self) -> Tensor:
        """(D, K + 2): two more columns choose between the bias and the missing vector (the values are zeros there): one product, and no
        torch.where."""
        return torch.cat((self.projection.weight, self.projection.bias[:, None], self.missing[:, None]), dim=1)


def heads_of(loss) -> dict[str, object]:
    """What of a model the loss group of the settings decides: options of Recommender."""
    learnt = loss.learn_temperature and loss.name != "bce"
    return {"action_head": loss.action_head_weight > 0, "temperature": loss.temperature if learnt else 0.0}


class Recommender(nn.Module):
    """Item tower, user token and causal sequence encoder over one joint table.

    config: the model group of the settings. layout: fields of the joint table. embedding_widths: {feature id: width} of the
    multimodal features in use. has_time: whether the data's timestamps are times. action_head: with the head of loss.action_head_weight.
    temperature: where a learnt one starts; 0 = it is not learnt.
    """

    def __init__(
        self,
        config,
        layout: TableLayout,
        embedding_widths: dict[str, int],
        has_time: bool,
        *,
        action_head: bool = False,
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        width = config.hidden_units
        self.config = config
        project = config.item_tower == "linear"
        self.table = JointTable(layout, config.init_std, config.id_init)
        self.item_projection = RowProjection(layout, "item", width, project)
        self.user_projection = RowProjection(layout, "user", width, project)
        self.item_bias = nn.Parameter(torch.zeros(width)) if project else None
        self.dense = nn.ModuleDict({name: DenseProjection(size, width) for name, size in embedding_widths.items()})
        self.user_token = nn.Parameter(torch.empty(width).normal_(0.0, config.init_std))
        self.actions = nn.Embedding(NUM_ACTION_TYPES + 1, width) if config.action_embedding else None
        self.positions = nn.Embedding(config.max_seq_length + 1, width) if config.position == "learned" else None
        with_time = config.time_features and has_time and config.time_fields
        self.time = TimeFeatures(width, config.init_std, config.time_fields) if with_time else None
        self.embedding_norm = nn.LayerNorm(width) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.dropout_rate)
        self.backbone = BACKBONES[config.backbone](replace(config, time_bias=config.time_bias and has_time))
        self.conditioning = ActionConditioning(config.action_conditioning, width) if config.action_conditioning != "none" else None
        self.action_head = ActionHead(width) if action_head else None
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if temperature else None
        self.unknown_id = nn.Parameter(torch.zeros(width)) if config.id_dropout else None
        if config.id_dropout:  # which items' ids have been trained on, (items + 1,): the others get unknown_id for good
            num_items = next(field.values for field in layout.fields if field.name == ITEM_ID)
            self.register_buffer("trained_items", torch.zeros(num_items + 1, dtype=torch.bool))
        # A zero vector's gradient through a cosine is its upstream over this: with torch's 1e-12 one such item would rule the step.
        self.smallest_norm = config.init_std if config.id_init == "zero" else 1e-12
        self._initialise(config)

    def _initialise(self, config) -> None:
        """Linear layers: normal of variance 1 / fan-in, those that end a residual branch smaller by sqrt(2 blocks); the rest init_std."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(".out"):
                    std /= (2 * config.num_blocks) ** 0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.dense.values():
            # The projected vector starts at the scale of the ids' vectors, so that neither drowns the other.
            nn.init.normal_(module.projection.weight, std=config.init_std * module.projection.in_features**-0.5)
        for table in (self.actions, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=config.init_std)

    def temperature(self) -> Tensor | None:
        """The learnt one, a scalar; None where it is fixed."""
        return None if self.log_temperature is None else self.log_temperature.clamp(*TEMPERATURES).exp()

    @torch.no_grad()
    def keep_within_bounds(self) -> None:
        """After each update: a learnt temperature beyond its bounds would have no gradient that brings it back."""
        if self.log_temperature is not None:
            self.log_temperature.clamp_(*TEMPERATURES)

    def encode_items(self, inputs: SideInputs) -> ItemVectors:
        """Vectors of M unique items."""
        vectors = self.item_projection(self.table.lookup("item", inputs), inputs)  # (M, D)
        if vectors.is_cuda or not torch.is_grad_enabled():
            return ItemVectors(*self._finish_items(vectors, inputs.dense, inputs.no_id))
        if self.unknown_id is None and fused_tower.takes(self.config, self.dense, vectors):
            weights = [projection.joint_weight() for projection in self.dense.values()]
            return ItemVectors(*fused_tower.finish(self.config, vectors, self.item_bias, inputs.dense, weights, self.smallest_norm))
        pieces = row_pieces(len(vectors))

        def body(number: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
            begin, end = pieces[number]
            no_id = None if inputs.no_id is None else inputs.no_id[begin:end]
            dense = tuple(Dense(dense.values[begin:end], dense.present[begin:end]) for dense in inputs.dense)
            return self._finish_items(vectors, dense, no_id)

        parameters = [*self.dense.parameters(), *(p for p in (self.item_bias, self.unknown_id) if p is not None)]
        unused = [torch.Generator()] * len(pieces)  # nothing is drawn: which way items go leaves the tokens' masks as they are
        return ItemVectors(*in_pieces(body, pieces, (vectors,), parameters, generators=unused))

    def _finish_items(self, vectors: Tensor, all_dense: tuple[Dense, ...], no_id: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the sum over features (M, D) to what ItemVectors holds."""
        if self.unknown_id is not None:
            assert no_id is not None, "id_dropout: the items' features must say whose ids are left out (FeatureColumns.trained)"
            vectors = vectors + no_id[:, None] * self.unknown_id
        for projection, dense in zip(self.dense.values(), all_dense):
            vectors = vectors + projection(dense)
        if self.item_bias is not None:
            vectors = vectors + self.item_bias
        history = ACTIVATIONS[self.config.item_activation](vectors)
        candidate = (history if self.config.candidate_activation else vectors).float()
        return history, F.normalize(candidate, dim=-1, eps=self.smallest_norm) if self.config.similarity == "cosine" else candidate

    def encode_sequence(
        self, history: Tensor, batch: Batch, users: SideInputs, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query vectors and states (Q, D) each, float32, one a query token, and the experts' balance: see Encoded.

        history: (M, D) vectors of the batch's unique items. wanted: (B,) int64 action that is asked for of each user's next event; None =
        in a training batch the target's, else ANY_ACTION.
        """
        user = self.user_token.expand(batch.users.shape[0], -1)
        if self.user_projection.num_fields:
            user = user + self.user_projection(self.table.lookup("user", users), users)
        hides_events = self.training and self.config.event_dropout
        parts = fused_tokens.Parts(self.actions, self.positions, self.time, self.embedding_norm, self.dropout)
        in_loops = not hides_events and fused_tokens.takes(parts, history, user)
        if not in_loops:
            # Token n stands for unique item item_index[n], or for the user owner[n]: one gather from both.
            source = torch.where(batch.positions == 0, batch.owner + history.shape[0], batch.item_index)
            x = gather_tokens(history, user, source)  # (N, D)
        if hides_events:
            hidden = torch.rand(x.shape[0], device=x.device) < self.config.event_dropout
            x = x * (~hidden | (batch.positions == 0))[:, None]
        actions = self._wanted_actions(batch, wanted)
        if history.is_cuda or not torch.is_grad_enabled():
            packing, queries = Packing.from_batch(batch), Queries.from_batch(batch)
            return self._parts_of(self._encode_tokens(x, batch.action_types, batch.timestamps, packing, actions, queries))
        pieces = packed_pieces(batch)
        tokens, results = [piece.tokens for piece in pieces], [piece.results for piece in pieces]
        generators = piece_generators(len(pieces))
        if in_loops:
            x = fused_tokens.embed(parts, history, user, batch, tokens, generators)  # (N, D)

        def body(number: int, x: Tensor) -> _OfTokens:
            piece = pieces[number]
            part, times = slice(*piece.tokens), batch.timestamps[piece.tokens.begin : piece.tokens.end]
            of_piece = None if actions is None else actions[slice(*piece.results)]
            if in_loops:
                return self._encode_vectors(x, times, piece.packing, of_piece, piece.queries)
            return self._encode_tokens(x, batch.action_types[part], times, piece.packing, of_piece, piece.queries)

        return self._parts_of(_OfTokens(*in_pieces(body, tokens, (x,), self._sequence_parameters(in_loops), results, generators)))

    def _parts_of(self, found: _OfTokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, state and balance, as in Encoded."""
        query, state, balance = found
        return query, query if state is None else state, None if balance is None else balance.mean()

    def _wanted_actions(self, batch: Batch, wanted: Tensor | None) -> Tensor | None:
        """(Q,) the action that each query is asked for; None without conditioning."""
        if self.conditioning is None:
            return None
        if wanted is not None:
            return wanted.index_select(0, batch.owner.index_select(0, batch.querying()))
        if not batch.target_actions.numel():
            return torch.full_like(batch.querying(), ANY_ACTION)
        return wanted_in_training(batch.target_actions, self.config.action_dropout if self.training else 0.0)

    def _sequence_parameters(self, in_loops: bool) -> list[nn.Parameter]:
        """All that `_encode_tokens` uses. in_loops: `_encode_vectors`."""
        embedding = () if in_loops else (self.actions, self.positions, self.time, self.embedding_norm)
        modules = (*embedding, self.backbone, self.conditioning)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def _encode_tokens(
        self, x: Tensor, action_types: Tensor, timestamps: Tensor, packing: Packing, wanted: Tensor | None, queries: Queries | None
    ) -> _OfTokens:
        """From vectors of items and users (N, D). wanted: (Q,) actions. queries: None = all N."""
        if self.actions is not None:
            x = x + pick(self.actions, action_types)
        if self.positions is not None:
            x = x + pick(self.positions, packing.positions)
        if self.time is not None:
            x = x + self.time(timestamps, packing.positions)
        return self._encode_vectors(self.dropout(self.embedding_norm(x)), timestamps, packing, wanted, queries)

    def _encode_vectors(self, x: Tensor, timestamps: Tensor, packing: Packing, wanted: Tensor | None, queries: Queries | None) -> _OfTokens:
        """From what the sequence encoder is given (N, D)."""
        state, balance = self.backbone(x, packing, timestamps, queries)
        state = query = state.float()
        if self.conditioning is not None:
            query = self.conditioning(state, wanted)
        kept = self._normalised(state) if query is not state and self.action_head is not None else None
        if balance is not None:
            balance = balance.expand(state.shape[0])  # not len(state): torch.export would take it for a constant
        return _OfTokens(self._normalised(query), kept, balance)

    def _normalised(self, query: Tensor) -> Tensor:
        return F.normalize(query, dim=-1) if self.config.similarity == "cosine" else query

    def encode(self, batch: Batch, features: FeatureInputs, wanted: Tensor | None = None) -> Encoded:
        """All that a loss takes of a batch. wanted: as in `encode_sequence`."""
        items = self.encode_items(features.items)
        query, state, balance = self.encode_sequence(items.history, batch, features.users, wanted)
        return Encoded(query, items.candidate, state, balance)

    def forward(self, batch: Batch, features: FeatureInputs, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Query vectors (Q, D) and candidate vectors (M, D) of a batch."""
        return self.encode(batch, features, wanted)[:2]
