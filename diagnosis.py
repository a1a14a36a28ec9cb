"""Why a step was not finite: the first bad number among the inputs, the forward pass and the gradients, and whose it is.

It runs only after such a step, so it may take as long as many steps. It computes the update's batches anew, with the generators as
they were then, and changes nothing: weights, gradients, generators and what the loss keeps stay. Must not decide whether training goes on.

Legend: B users, N packed tokens, T targets, M unique items, R unique rows of the joint table, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Config
from dataset import Batch
from embedding import Touched
from experts import Experts
from features import FeatureInputs, SideInputs, TableLayout
from model import Encoded, Recommender
from training_loss import TrainingLoss

NAMED = 5  # users, items or tensors that a message lists; of the others it says how many
SEARCH_SECONDS = 30.0  # for the users by whom a gradient is not finite: each try is a forward and a backward pass
DATA = "Lower learning_rate, set gradient_clip, or look at these users' data; max_skipped_steps leaves some of such steps out."
WEIGHTS = "Go on from an earlier checkpoint (--resume_path) with a lower learning_rate or a gradient_clip."
VECTORS = "The cache is damaged: remove {path}; the next start compiles it anew."


class Finding(NamedTuple):
    """what: the first thing that is not finite. users: raw ids of those concerned; more: there may be others. number: of the batch."""

    what: str
    users: list[str]
    number: int
    remedy: str = DATA
    more: bool = False

    def where(self, num_batches: int) -> str:
        """Batch and users, for a message."""
        whose = f"user {self.users[0]}" if len(self.users) == 1 else f"users {listed(self.users)}"
        whose = f"{whose}{' and perhaps others' if self.more else ''}" if self.users else "in no event of the batch's users"
        return f"{self.what}; batch {self.number + 1} of {num_batches}, {whose}"


class Generators(NamedTuple):
    """The states of torch's generators."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Generators:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def put(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class Suspect(NamedTuple):
    """A batch of the update. number: within the epoch, from 0. generators: before its forward pass. finite: whether its losses were."""

    number: int
    generators: Generators
    finite: bool = True


class Update(NamedTuple):
    """What the update was made with."""

    config: Config
    store: object
    layout: TableLayout
    embeddings: tuple[str, ...]
    model: Recommender
    loss: TrainingLoss
    device: torch.device
    build: Callable[[int], tuple[Batch, FeatureInputs]]  # the epoch's batch of a number, on the device
    autocast: Callable[[], AbstractContextManager]
    scale: float  # of a float16 loss


def find_cause(update: Update, suspects: Sequence[Suspect], touched: Sequence[Touched]) -> Finding:
    """The first thing that is not finite. touched: the update's rows of the table, with gradients; the others stand in the model."""
    search, worst = _Search(update), next((suspect for suspect in suspects if not suspect.finite), suspects[-1])
    try:
        with search.unchanged():
            for stage in (search.in_inputs, search.in_forward, search.in_backward):
                for suspect in suspects:
                    if found := stage(suspect):
                        return found
        return search.in_gradients(worst, touched)
    except RuntimeError as error:  # out of memory, say: the step's own error must come up all the same
        batch, _ = update.build(worst.number)
        what = f"not known, the search for it failed ({' '.join(str(error).split())[:120]})"
        return Finding(what, search.users(batch, range(len(batch.users))), worst.number)


def bad_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite, the table's among them."""
    return [name for name, parameter in model.named_parameters() if not _finite(parameter)]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _bad_rows(tensor: Tensor) -> list[int]:
    """Rows (R, ...) that hold a number that is not finite."""
    return (~tensor.detach().reshape(len(tensor), -1).isfinite().all(1)).nonzero()[:, 0].tolist() if tensor.numel() else []


class _Search:
    """The stages of find_cause; each gives a Finding, or None where all is finite."""

    def __init__(self, update: Update) -> None:
        self.update, self.store, self.model, self.loss = update, update.store, update.model, update.loss

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Puts back what a forward pass changes."""
        before = Generators.now(self.update.device)
        counts = [(module, list(module.counts)) for module in self.model.modules() if isinstance(module, Experts)]
        try:
            yield
        finally:
            before.put(self.update.device)
            self.model.table.pop_touched()
            for module, was in counts:
                module.counts = was

    # ---- names ----

    def users(self, batch: Batch, rows) -> list[str]:
        """Raw ids of rows of the batch's users."""
        rows = sorted(set(rows))
        return self.store.raw_user_ids.take(batch.users.cpu().numpy()[rows]) if rows else []

    def owners(self, batch: Batch, targets: Sequence[int]) -> list[str]:
        return self.users(batch, self._of_targets(batch, batch.owner)[list(targets)].tolist())

    @staticmethod
    def _of_targets(batch: Batch, column: Tensor) -> Tensor:
        """From a column of the tokens (N,) to that of the targets (T,), on the CPU."""
        return column[batch.querying()].cpu()

    def users_of_items(self, batch: Batch, items: Sequence[int]) -> list[str]:
        """Those with one of these unique items (places in unique_ids) among their events, as input or as target."""
        wanted = torch.zeros(len(batch.unique_ids), dtype=torch.bool)
        wanted[list(items)] = True
        # The user token's item_index is 0, which is no item.
        inputs = wanted[batch.item_index.cpu()] & (batch.positions.cpu() > 0)
        targets = wanted[batch.target_index.cpu()]
        return self.users(batch, batch.owner.cpu()[inputs].tolist() + self._of_targets(batch, batch.owner)[targets].tolist())

    def items(self, batch: Batch, places: Sequence[int]) -> str:
        ids = batch.unique_ids.cpu().numpy()[list(places[:NAMED])]
        raw = self.store.raw_item_ids
        names = [str(name) for name in (raw[ids].tolist() if hasattr(raw, "tolist") else raw.take(ids))]
        return f"item{'s' if len(places) > 1 else ''} {listed([*names, *places[NAMED:]])}"

    # ---- inputs ----

    def in_inputs(self, suspect: Suspect) -> Finding | None:
        """Multimodal vectors, rows of the table that the batch looks up, the other weights."""
        batch, features = self.update.build(suspect.number)
        for name, dense in zip(self.update.embeddings, features.items.dense):
            if bad := _bad_rows(dense.values):
                remedy = VECTORS.format(path=getattr(self.store, "path", "cache_path"))
                what = f"multimodal vectors {name} of {self.items(batch, bad)}"
                return Finding(what, self.users_of_items(batch, bad), suspect.number, remedy)
        for side, inputs in (("item", features.items), ("user", features.users)):
            if found := self.named_rows("weights of the table's rows", side, self._bad_table_rows(inputs.rows), batch, inputs):
                return Finding(*found, suspect.number, WEIGHTS)
        if bad := [name for name in bad_weights(self.model) if not name.startswith("table.")]:
            return Finding(f"weights of {listed(bad)}", self.users(batch, range(len(batch.users))), suspect.number, WEIGHTS)
        return None

    def _bad_table_rows(self, rows: Tensor) -> list[int]:
        """Those of the joint table's rows (R,) whose weights are not finite."""
        found, begin = [], 0
        for part in self.model.table.parts:
            own = rows[(rows >= begin) & (rows < begin + len(part))]
            found += own[_bad_rows(part.index_select(0, own - begin))].tolist()
            begin += len(part)
        return found

    def named_rows(self, what: str, side: str, bad: list[int], batch: Batch, inputs: SideInputs) -> tuple[str, list[str]] | None:
        """Rows of the joint table by feature and value, and the users they concern; None where none is of this side."""
        fields = [
            (field, [row - field.offset for row in bad if 0 < row - field.offset <= field.size]) for field in self.update.layout.side(side)
        ]
        names = [f"{field.label} ({listed([str(value) for value in values])})" for field, values in fields if values]
        if not names:
            return None
        wanted = torch.isin(inputs.rows.cpu(), torch.tensor(bad))
        bags = inputs.bags
        uses = wanted[bags.index.cpu().long()].nonzero()[:, 0]
        things = torch.searchsorted(bags.offsets.cpu().long(), uses, right=True) - 1  # whose bag each use is in
        things = things.unique().tolist()
        return f"{what} of {listed(names)}", self.users(batch, things) if side == "user" else self.users_of_items(batch, things)

    # ---- forward pass ----

    def in_forward(self, suspect: Suspect) -> Finding | None:
        """Vectors of the items, queries and losses of the targets."""
        batch, features = self.update.build(suspect.number)
        modules: list[str] = []
        suspect.generators.put(self.update.device)
        with self._watched(modules), self.update.autocast():
            items = self.model.encode_items(features.items)
            for side, vectors in zip(("history", "candidate"), items):
                if bad := [place for place in _bad_rows(vectors) if place]:
                    what = f"{side} vectors of {self.items(batch, bad)}{self._first(modules)}"
                    return Finding(what, self.users_of_items(batch, bad), suspect.number)
            query, state, balance = self.model.encode_sequence(items.history, batch, features.users)
            encoded = Encoded(query, items.candidate, state, balance)
        for name, vectors in (("query", encoded.query), ("state", encoded.state)):
            if bad := _bad_rows(vectors):
                return Finding(f"{name} of {self._tokens(batch, bad)}{self._first(modules)}", self.owners(batch, bad), suspect.number)
        if balance is not None and not _finite(balance):
            what = f"the experts' balance{self._first(modules)}"
            return Finding(what, self.users(batch, range(len(batch.users))), suspect.number)
        with torch.no_grad():
            return self._in_losses(suspect, batch, encoded)

    def _in_losses(self, suspect: Suspect, batch: Batch, encoded: Encoded) -> Finding | None:
        owner = batch.owner[batch.querying()]
        every = torch.arange(len(owner), device=owner.device)
        for name, loss_of in self._losses(encoded, batch):
            if _finite(loss_of(every)):
                continue
            users = [user for user in range(len(batch.users)) if not _finite(loss_of(every[owner == user]))]
            bad = [place for user in users for place in every[owner == user].tolist() if not _finite(loss_of(every[place : place + 1]))]
            if not bad:
                return Finding(f"the {name} of all targets together", self.users(batch, range(len(batch.users))), suspect.number)
            return Finding(f"{name} of {self._tokens(batch, bad)}", self.owners(batch, bad), suspect.number)
        return None

    def _losses(self, encoded: Encoded, batch: Batch) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name, the mean over some targets (n,)) of each loss of single targets."""
        temperature = self.model.temperature()
        found = [("loss", lambda targets: self.loss.of_targets(encoded.query, encoded.item_emb, batch, targets, temperature))]
        if self.model.action_head is not None:
            inputs = encoded.state, batch.target_index, batch.target_actions

            def of_head(targets: Tensor) -> Tensor:
                state, target, actions = (column.index_select(0, targets) for column in inputs)
                return self.model.action_head.loss(state, encoded.item_emb, target, actions)

            found.append(("loss of the action head", of_head))
        return found

    def _tokens(self, batch: Batch, targets: list[int]) -> str:
        """The token that predicts the first of these targets by its place in the user's window, and the target; how many more."""
        first = targets[0]
        target = self.items(batch, [int(batch.target_index[first])])
        rest = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        return f"token{'s' if rest else ''} {int(self._of_targets(batch, batch.positions)[first])} (target {target}){rest}"

    @contextmanager
    def _watched(self, modules: list[str]) -> Iterator[None]:
        """Within it, names of modules are collected whose output is not finite, the first to run first. Not with compiled blocks."""

        def watch(name: str) -> Callable:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                tensors = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
                if not all(_finite(tensor) for tensor in tensors if tensor.is_floating_point()):
                    modules.append(name)

            return hook

        watched = [] if self.update.config.training.compile else [named for named in self.model.named_modules() if named[0]]
        handles = [module.register_forward_hook(watch(name)) for name, module in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _first(modules: list[str]) -> str:
        return f", from the output of {modules[0]} on" if modules else ""

    # ---- gradients ----

    def in_backward(self, suspect: Suspect) -> Finding | None:
        """The batch's gradients, computed anew; the users without whose targets they are finite."""
        batch, features = self.update.build(suspect.number)
        every = torch.arange(len(batch.users), device=batch.owner.device)
        names, rows = self._bad_gradients(suspect, batch, features, every)
        if not names:
            return self._in_rows(suspect, batch, features, rows)
        end, guilty, more, groups = time.monotonic() + SEARCH_SECONDS, [], False, [every]
        while groups:
            users = groups.pop(0)
            if len(users) < len(every) and not self._bad_gradients(suspect, batch, features, users)[0]:
                continue
            if len(users) == 1:
                guilty.append(int(users))
            elif time.monotonic() > end:
                more = True
            else:
                groups = [*users.chunk(2), *groups]
        return Finding(f"gradient of {listed(names)}", self.users(batch, guilty or every.tolist()), suspect.number, more=more)

    def _in_rows(self, suspect: Suspect, batch: Batch, features: FeatureInputs, rows: list[int]) -> Finding | None:
        """rows: of the joint table, those whose gradients are not finite."""
        for side, inputs in (("item", features.items), ("user", features.users)):
            if found := self.named_rows("gradient of the table's rows", side, rows, batch, inputs):
                return Finding(*found, suspect.number)
        return None

    def _bad_gradients(self, suspect: Suspect, batch: Batch, features: FeatureInputs, users: Tensor) -> tuple[list[str], list[int]]:
        """Weights, the last layers first, and rows of the table whose gradient is not finite when only these users' targets have a loss.

        users: rows of the batch.
        """
        owner = batch.owner[batch.querying()]
        targets = torch.isin(owner, users).nonzero()[:, 0]
        suspect.generators.put(self.update.device)
        self.model.table.pop_touched()
        with self.update.autocast():
            encoded = self.model.encode(batch, features)
        config, total = self.update.config.loss, 0.0
        for (_, loss_of), weight in zip(self._losses(encoded, batch), (1.0, config.action_head_weight)):
            total = total + weight * loss_of(targets)
        if encoded.balance is not None:
            total = total + config.expert_balance_weight * encoded.balance
        total = total * (self.update.scale * len(targets) / len(owner))
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        touched = self.model.table.pop_touched()
        inputs = [*(parameter for _, parameter in named), *(entry.leaf for entry in touched)]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        names = [name for (name, _), grad in zip(named, grads) if grad is not None and not _finite(grad)]
        return names[::-1], self._rows(zip(touched, grads[len(named) :]))

    def _rows(self, gradients: Iterable[tuple[Touched, Tensor | None]]) -> list[int]:
        """Rows of the joint table whose gradients are not finite."""
        begins = [part.begin for part in self.update.layout.parts]
        return [begins[e.part] + row for e, grad in gradients if grad is not None for row in e.rows[_bad_rows(grad)].tolist()]

    def in_gradients(self, suspect: Suspect, touched: Sequence[Touched]) -> Finding:
        """The update's own gradients, where computing it anew gave none that are not finite: what is bad in them, without a cause."""
        batch, features = self.update.build(suspect.number)
        names = [name for name, parameter in self.model.named_parameters() if parameter.grad is not None and not _finite(parameter.grad)]
        if not names and (found := self._in_rows(suspect, batch, features, self._rows((entry, entry.leaf.grad) for entry in touched))):
            return found
        if suspect.finite and not names:
            what = "the norm of all gradients together, each of which is finite"
        else:
            what = f"gradient of {listed(names[::-1])}" if suspect.finite else "the loss"
            what += ", though not when the batch was computed again (the machine's memory may be at fault)"
        return Finding(what, self.users(batch, range(len(batch.users))), suspect.number)
