"""The settings: one tree of frozen dataclasses; each key with its default, unit, limits and documentation.

Defaults live here and nowhere else. Must not import torch, open a file, read the environment (settings.py does), or act on a setting.

To add a key: one `setting(...)` line in its group. Flag, YAML key, help, checks and config.yaml's comment follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from errors import UserError
from setting_keys import Key, Unfit, nearest, setting, show

DEFAULT = "default"


class SettingError(UserError):
    """Values that do not fit; `problems` lists (names of the keys concerned, message)."""

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("\n".join(text for _, text in problems))
        self.problems = problems


class _Group:
    """What every sub-tree shares: each value checked against its key, then the group's conflicts, all reported at once."""

    def __post_init__(self) -> None:
        problems = []
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            try:
                object.__setattr__(self, name, KEYS[name].read(getattr(self, name)))
            except Unfit as unfit:
                problems.append(((name,), f"{KEYS[name].path} {unfit}"))
        problems = problems or [(names, f"{self._found(names)}; {expected}") for names, expected in self._conflicts()]
        if problems:
            raise SettingError(problems)

    def _found(self, names: tuple[str, ...]) -> str:
        return " and ".join(f"{KEYS[name].path} is {show(getattr(self, name))}" for name in names)

    def _conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Pairs of (keys that do not go together, what is expected)."""
        yield from ()


@dataclass(frozen=True)
class ModelConfig(_Group):
    """The sequence model and its item tower."""

    backbone: str = setting("transformer", "Sequence encoder: attention and feed-forward, or hstu: pointwise attention with a gate.",
                            choices=("transformer", "hstu"))  # fmt: skip
    hidden_units: int = setting(64, "Width of the model; a multiple of num_heads.", minimum=1, env="HIDDEN_UNITS")
    num_blocks: int = setting(2, "Blocks of attention and feed-forward.", minimum=1, env="NUM_BLOCKS")
    num_heads: int = setting(2, "Attention heads of a block.", minimum=1, env="NUM_HEADS")
    max_seq_length: int = setting(100, "Newest events of a user that are read; the user token is extra.", unit="events", minimum=1,
                                  aliases=("maxlen",))  # fmt: skip
    embedding_dim: int = setting(0, "Width of the joint table of ids and features; 0 = hidden_units.", minimum=0)
    feature_width: str = setting(
        "same", "Width of each feature's vectors: embedding_dim for all, or auto: the power of two at or above 4 times the fourth root of"
        " its number of rows, embedding_dim at most.", choices=("same", "auto"))  # fmt: skip
    hash_rows: tuple[()] | tuple[int, ...] = setting((), "Rows of the hash tables that stand for each of hashed_features; several are"
                                                     " summed, none = a row a value.", unit="rows", minimum=2)  # fmt: skip
    hashed_features: tuple[str, ...] = setting(("item_id",), "What is hashed where hash_rows is given: item_id, user_id, ids of features.")
    dropout_rate: float = setting(
        0.0,
        "Dropout on embeddings, residual branches and feed-forward: for small data that are passed over many times.",
        unit="probability",
        minimum=0,
        below=1,
    )
    attention_dropout: float = setting(0.0, "Dropout on attention weights; above 0 it leaves the fast flash kernel on CPU.",
                                       unit="probability", minimum=0, below=1)  # fmt: skip
    norm: str = setting("layernorm", "Normalisation in and after the blocks.", choices=("layernorm", "rmsnorm"))
    norm_first: bool = setting(True, "Normalisation before each branch (pre-norm); false = after it (post-norm).")
    activation: str = setting("gelu", "Activation of the feed-forward layers.", choices=("gelu", "relu", "swiglu"))
    ffn_multiplier: float = setting(4.0, "Inner width of the feed-forward layers.", unit="times hidden_units", above=0)
    position: str = setting("rope", "Positions: rotary; learned vectors; relative: a learnt bias of attention's scores for each distance"
                            " and head, which leaves the flash kernel on CPU; or none.",
                            choices=("rope", "learned", "relative", "none"))  # fmt: skip
    time_bias: bool = setting(False, "A learnt bias of attention's scores for each head and log2 bucket of the seconds between two events;"
                              " off by itself where the data has no times. It leaves the flash kernel on CPU.")  # fmt: skip
    num_experts: int = setting(0, "Experts that a block's feed-forward is made of (hstu: gets one of); 0 = one plain feed-forward.",
                               unit="experts", minimum=0)  # fmt: skip
    active_experts: int = setting(2, "Experts that each token is sent to.", unit="experts", minimum=1)
    shared_experts: int = setting(1, "Experts besides, that every token goes through.", unit="experts", minimum=0)
    expert_multiplier: float = setting(1.0, "Inner width of an expert.", unit="times hidden_units", above=0)
    embedding_norm: bool = setting(True, "LayerNorm on the token embeddings before the first block.")
    item_tower: str = setting("linear", "How an item's vectors become one: one linear layer on their concatenation, or their plain sum.",
                              choices=("linear", "sum"))  # fmt: skip
    item_activation: str = setting("none", "Activation of the item tower's output in the sequence.", choices=("none", "relu", "gelu"))
    candidate_activation: bool = setting(False, "item_activation on candidates too.")
    user_id: bool = setting(False, "A vector of its own for each user, in the user token.")
    action_embedding: bool = setting(True, "A vector for each event's action type.")
    action_conditioning: str = setting("none", "Tells the query which action is wanted of the next event (in training the target's): film:"
                                       " by scale and shift; gate: by query and action.", choices=("none", "film", "gate"))  # fmt: skip
    action_dropout: float = setting(0.1, "action_conditioning: share of the training tokens whose wanted action is hidden, for answers"
                                    " without one.", unit="probability", minimum=0, below=1)  # fmt: skip
    time_features: bool = setting(True, "Vectors for time_fields of each event; off by itself where the data has no times.")
    time_fields: tuple[str, ...] = setting(
        ("gap", "hour", "weekday"), "What of an event's time: gap (since the previous event), hour, weekday, day (since 1970, modulo 1024),"
        " fourier (waves of a day, week, month, year).", choices=("gap", "hour", "weekday", "day", "fourier"))  # fmt: skip
    similarity: str = setting("cosine", "Score of an item for a user.", choices=("cosine", "dot"))
    init_std: float = setting(0.02, "Standard deviation of the initial embeddings.", above=0)
    id_init: str = setting("normal", "Initial vectors of item ids and all hash tables: as the others, or zero.", choices=("normal", "zero"))
    event_dropout: float = setting(0.0, "Share of the events of a history whose items the sequence encoder is not shown in training; their"
                                   " times and actions it is.", minimum=0, below=1)  # fmt: skip
    id_dropout: float = setting(0.0, "Share of a training batch's items whose ids are left out for one learnt vector, which items without"
                                " training events get for good; 0 = off.", unit="probability", minimum=0, below=1)  # fmt: skip

    def _conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.hidden_units % self.num_heads:
            yield ("hidden_units", "num_heads"), "expected hidden_units to be a multiple of num_heads."
        elif self.position == "rope" and self.hidden_units // self.num_heads % 2:
            yield ("position", "hidden_units", "num_heads"), "expected an even hidden_units / num_heads, or another position than rope."
        if self.num_experts and self.active_experts > self.num_experts:
            yield ("active_experts", "num_experts"), "expected at most num_experts."
        if self.item_tower == "sum" and self.embedding_dim not in (0, self.hidden_units):
            yield ("item_tower", "embedding_dim", "hidden_units"), "expected embedding_dim 0 or hidden_units where vectors are summed."
        if self.item_tower == "sum" and self.feature_width == "auto":
            yield ("item_tower", "feature_width"), "expected feature_width same where vectors are summed."


@dataclass(frozen=True)
class TrainingConfig(_Group):
    """Optimiser, schedule, precision, and what is kept."""

    batch_size: int = setting(128, "Users in a training batch.", unit="users", minimum=1, env="BATCH_SIZE")
    num_epochs: int = setting(3, "Passes over the training users.", unit="epochs", minimum=1, env="NUM_EPOCHS")
    learning_rate: float = setting(3e-3, "Highest learning rate.", above=0, env="LEARNING_RATE", aliases=("lr",))
    optimizer: str = setting("muon", "Optimiser of all weights but the joint table; muon: of the matrices of sequence encoder and towers,"
                             " adamw for the rest.", choices=("adam", "adamw", "muon"))  # fmt: skip
    muon_learning_rate: float = setting(0.02, "muon: highest learning rate of the matrices; times the root of outputs / inputs where"
                                        " a matrix has more outputs.", above=0)  # fmt: skip
    muon_momentum: float = setting(0.95, "muon: decay of the momentum.", minimum=0, below=1)
    weight_decay: float = setting(1e-5, "Weight decay of adamw and muon; in the joint table it acts on the rows touched by a step only.",
                                  minimum=0)  # fmt: skip
    l2_emb: float = setting(0.0, "L2 penalty of the joint table; it acts on the rows touched by a step only.", minimum=0)
    adam_beta1: float = setting(0.9, "Adam's decay of the first moment.", minimum=0, below=1)
    adam_beta2: float = setting(0.98, "Adam's decay of the second moment.", minimum=0, below=1)
    table_optimizer: str = setting("rowwise_adam", "Optimiser of the joint table, touched rows only: rowwise_ keeps one state value a"
                                   " row, adam two for each weight.", choices=("rowwise_adagrad", "rowwise_adam", "adam"))  # fmt: skip
    table_learning_rate: float = setting(0.0, "Highest learning rate of the joint table; 0 = learning_rate.", minimum=0)
    lr_scheduler: str = setting("cosine", "Course of the learning rate after the warm-up; none = constant.",
                                choices=("cosine", "step", "constant"), value_aliases={"none": "constant"})  # fmt: skip
    warmup_steps: int = setting(0, "Steps over which the learning rate rises at the start.", unit="steps", minimum=0)
    table_lr_scheduler: str = setting("same", "lr_scheduler of the joint table.", choices=("same", "cosine", "step", "constant"))
    table_warmup_steps: int = setting(-1, "warmup_steps of the joint table; -1 = the same.", unit="steps", minimum=-1)
    muon_lr_scheduler: str = setting("same", "lr_scheduler of muon's matrices.", choices=("same", "cosine", "step", "constant"))
    muon_warmup_steps: int = setting(-1, "warmup_steps of muon's matrices; -1 = the same.", unit="steps", minimum=-1)
    min_lr_ratio: float = setting(0.1, "Where cosine ends, relative to the highest learning rate.", minimum=0, maximum=1)
    lr_step_epochs: int = setting(1, "step: epochs between drops.", unit="epochs", minimum=1)
    lr_gamma: float = setting(0.5, "step: factor of each drop.", above=0, maximum=1)
    accumulate_steps: int = setting(1, "Batches whose gradients make one update, each target counting the same; steps count updates.",
                                    unit="batches", minimum=1)  # fmt: skip
    ema_decay: float = setting(0.0, "Decay of an average of the weights over the updates, which is evaluated and saved in model.pt; .999"
                               " spans some 1,000 updates. It needs a second joint table, a third while evaluating or saving. 0 = off.",
                               minimum=0, below=1)  # fmt: skip
    max_skipped_steps: int = setting(0, "Updates with a loss or gradient that is not finite that are left out, each with a warning, before"
                                     " such a one stops the run; fp16 has its own count.", minimum=0)  # fmt: skip
    gradient_clip: float = setting(1.0, "Largest norm of the gradient, all weights and touched rows together; 0 = off.", minimum=0,
                                   aliases=("grad_clip",))  # fmt: skip
    precision: str = setting("fp32", "Arithmetic of the forward pass.", choices=("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, "Compute blocks again in the backward pass: less memory, more time.")
    compile: bool = setting(False, "Compile the sequence encoder with torch.compile: a minute or more at the start for less time a step;"
                            " needs a C++ compiler on CPU.")  # fmt: skip
    patience: int = setting(0, "Stop after so many evaluations without improvement of best_metric; 0 = off.", unit="evaluations", minimum=0)
    max_steps: int = setting(0, "Exactly so many updates in all, over as many epochs as that takes; num_epochs and patience are then"
                             " ignored. 0 = off.", unit="steps", minimum=0)  # fmt: skip
    save_every_steps: int = setting(0, "A checkpoint every so many steps inside an epoch too; 0 = off.", unit="steps", minimum=0)
    keep_last_k: int = setting(3, "Newest checkpoints kept, besides the best; 0 = all.", unit="checkpoints", minimum=0)

    def schedule(self, group: str) -> tuple[str, int]:
        """(scheduler, warm-up steps) of a group of weights: dense, table or muon."""
        scheduler, warmup = (getattr(self, f"{group}_{key}", default) for key, default in (("lr_scheduler", "same"), ("warmup_steps", -1)))
        return self.lr_scheduler if scheduler == "same" else scheduler, self.warmup_steps if warmup < 0 else warmup

    def schedules(self) -> set[str]:
        """The schedulers that some group of weights follows."""
        return {self.schedule(group)[0] for group in ("dense", "table", "muon") if group != "muon" or self.optimizer == "muon"}


@dataclass(frozen=True)
class LossConfig(_Group):
    """The training loss and its negatives."""

    name: str = setting("sampled_softmax", "Training loss.", choices=("bce", "sampled_softmax", "full_softmax"), aliases=("loss",))
    num_negatives: int = setting(1024, "Uniform negatives: shared by the batch (sampled_softmax), or of each position (bce; 1 is usual).",
                                 unit="items", minimum=0)  # fmt: skip
    in_batch_negatives: bool = setting(True, "The batch's other targets as negatives too (sampled_softmax).")
    max_in_batch: int = setting(2048, "Of how many of the batch's targets, drawn anew each step, in-batch negatives are made; 0 = all.",
                                unit="targets", minimum=0)  # fmt: skip
    temperature: float = setting(0.05, "Scores are divided by it before the loss.", above=0)
    logq: bool = setting(True, "Correct for how often each negative is drawn (sampled_softmax).")
    learn_temperature: bool = setting(False, "Learn the temperature, from temperature on; it stays within .01 and 1.")
    logq_source: str = setting("counts", "logq: how often a target is drawn, from the training events' counts, or streaming: estimated from"
                               " the steps between its last times.", choices=("counts", "streaming"))  # fmt: skip
    logq_rate: float = setting(0.05, "logq_source streaming: weight of an item's newest gap in its mean.", above=0, maximum=1)
    popularity_negatives: int = setting(0, "Negatives drawn by popularity besides, shared by the batch (sampled_softmax).", unit="items",
                                        minimum=0)  # fmt: skip
    popularity_power: float = setting(0.75, "popularity_negatives: an item's training events to this power.", above=0)
    memory_bank: int = setting(0, "Item vectors of past batches' targets that serve as negatives of the queries too, beside others"
                               " (sampled_softmax).", unit="items", minimum=0)  # fmt: skip
    mask_seen_negatives: bool = setting(False, "Items of a user's own window are no negatives of that user (softmax losses).")
    hard_negatives: int = setting(0, "Only so many of a token's negatives count, the highest scoring ones (softmax losses); 0 = all.",
                                  unit="items", minimum=0)  # fmt: skip
    label_smoothing: float = setting(0.0, "Share of the wanted probability that is spread over all candidates (softmax losses).", minimum=0,
                                     below=1)  # fmt: skip
    action_weights: tuple[float, ...] = setting((1.0, 1.0, 1.0), "Weights in the loss of targets that are exposures, clicks, conversions.",
                                                minimum=0)  # fmt: skip
    action_head_weight: float = setting(0.0, "Weight of an auxiliary loss: cross-entropy of the target event's action type, from the query"
                                        " and the target item; 0 = off.", minimum=0)  # fmt: skip
    expert_balance_weight: float = setting(
        0.01, "Weight of an auxiliary loss that keeps the experts used alike (model.num_experts).", minimum=0
    )
    chunk_size: int = setting(0, "Positions whose scores are held at once; 0 = automatic.", unit="positions", minimum=0)

    def _conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.num_negatives == 0 and self.name == "bce":
            yield ("name", "num_negatives"), "expected at least 1 negative."
        sources = ("num_negatives", "in_batch_negatives", "popularity_negatives")  # a memory bank alone would leave items without gradients
        if self.name == "sampled_softmax" and not any(getattr(self, source) for source in sources):
            yield sources, "expected negatives from one of them."
        if self.label_smoothing and (self.mask_seen_negatives or self.hard_negatives):
            yield ("label_smoothing", "mask_seen_negatives", "hard_negatives"), "expected label_smoothing without the other two."
        if len(self.action_weights) != 3 or not sum(self.action_weights) > 0:
            yield ("action_weights",), "expected three weights, one above 0 at least."


@dataclass(frozen=True)
class DataConfig(_Group):
    """What is read, and the threads that build batches."""

    num_workers: int = setting(1, "Background threads that build batches; 0 = in the training thread.", unit="threads", minimum=0)
    prefetch_batches: int = setting(4, "Batches built ahead.", unit="batches", minimum=1)
    multimodal_features: str | tuple[str, ...] = setting("auto", "Embedding features: auto (81 where present), none or a list: [81, 82].",
                                                         aliases=("mm_emb_id",))  # fmt: skip
    max_bad_lines: int = setting(0, "Unreadable lines that are tolerated; they are counted and listed in a file.", unit="lines", minimum=0)
    length_buckets: bool = setting(True, "Users of like length share a batch: less padding.")
    targets_per_sample: int = setting(0, "0 = a sample a user: each event of its window is a target. Above, users are taken apart into "
                                      "samples of so many targets, encoded from all events before them; batch_size counts samples.",
                                      unit="targets", minimum=0)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig(_Group):
    """Splits, candidates and metrics."""

    protocol: str = setting("holdout", "holdout = users never trained on; leave_one_out = last event tests, last but one validates.",
                            choices=("holdout", "leave_one_out"))  # fmt: skip
    holdout_fraction: float = setting(0.1, "holdout: share of the users held out, halved into validation and test.", above=0, below=1)
    target: str = setting("last", "holdout: the event to find.", choices=("last", "last_click"))
    candidates: str = setting("all", "What is ranked: all items, or a path to predict_set.jsonl, candidate/ or a folder that holds one.",
                              expects="all or a path", pattern=r"(?s).+")  # fmt: skip
    top_k: tuple[int, ...] = setting((10,), "Cut-offs of HR and NDCG; 10 is always reported.", unit="items", minimum=1)
    remove_seen: bool = setting(True, "Leave out what the user has seen already.")
    wanted_action: str = setting("any", "action_conditioning: the action asked for where user_action_type.json names none; target: the"
                                 " held-out event's own.", choices=("any", "exposure", "click", "conversion", "target"))  # fmt: skip
    cold_candidates: str = setting("rank", "Candidates not in training (with id_dropout: known items without training events too): rank as"
                                   " others, drop, or take a penalty off.", choices=("rank", "drop", "penalty"))  # fmt: skip
    cold_penalty: float = setting(0.1, "cold_candidates penalty: what is taken off a score (cosine or inner product).", minimum=0)
    transition_weight: float = setting(
        0.0, "Weight in the ranking of item-to-item transition counts of the training events (transitions.py); 0 = off.", minimum=0
    )
    test: bool = setting(True, "Test the best checkpoint on the test split at the end; false = on the validation split, so that settings"
                         " can be chosen without a look at the test.")  # fmt: skip
    max_eval_users: int = setting(0, "Users evaluated of each split; 0 = all.", unit="users", minimum=0)
    eval_batch_size: int = setting(512, "Users ranked at once.", unit="users", minimum=1)
    eval_every_epochs: int = setting(1, "Epochs between evaluations.", unit="epochs", minimum=1)
    baselines: bool = setting(True, "Evaluate popularity, most-recent and item-to-item beside the model.")
    score_round: int = setting(1, "The competition's round whose weights of actions the score takes.", choices=(1, 2))
    best_metric: str = setting("ndcg@10", "What chooses the best checkpoint, on validation.", choices=("hr@10", "ndcg@10", "score", "loss"))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "top_k", tuple(sorted({*self.top_k, 10})))


@dataclass(frozen=True)
class SystemConfig(_Group):
    """Device, seed, logs and checkpoints."""

    device: str = setting("auto", "Where to compute; auto = cuda where there is one.", choices=("auto", "cpu", "cuda", "cuda:N"),
                          pattern=r"auto|cpu|cuda(:[0-9]+)?", env="DEVICE")  # fmt: skip
    seed: int = setting(42, "Seed of everything random.", minimum=0, maximum=2**63 - 1)
    num_threads: int = setting(0, "CPU threads of torch; 0 = torch's choice.", unit="threads", minimum=0)
    save_frequency: int = setting(1, "Epochs between checkpoints.", unit="epochs", minimum=1, aliases=("save_freq",))
    log_every_steps: int = setting(10, "Steps between log lines.", unit="steps", minimum=1)
    tensorboard: bool = setting(True, "Write TensorBoard event files.")
    tensorboard_histograms: bool = setting(False, "Histograms of all weights in TensorBoard at each evaluation.")
    tensorboard_figures: bool = setting(True, "Pictures of quality by slice and of the targets' places in TensorBoard at each evaluation.")
    projector_items: int = setting(2000, "Most popular items whose vectors TensorBoard's projector gets at the end; 0 = none.",
                                   unit="items", minimum=0)  # fmt: skip
    run_name: str = setting("", "Name of the run, in the name of its folder.", expects="text without '/' that does not begin with '.'",
                            pattern=r"(?!\.)[^/\\\x00-\x1f]*")  # fmt: skip


@dataclass(frozen=True)
class PathsConfig(_Group):
    """Where data lies and where results go."""

    data_path: str = setting("", "Data folder; empty = the demo data, made on first use.", env="TRAIN_DATA_PATH")
    log_path: str = setting("", "Run folder; empty = ./logs/<time>-<name>.", env="TRAIN_LOG_PATH")
    tensorboard_path: str = setting("", "TensorBoard event files; empty = ./tb_logs/<time>-<name>.", env="TRAIN_TF_EVENTS_PATH")
    checkpoint_path: str = setting("", "Checkpoints; empty = ./checkpoints/<time>-<name>.", env="TRAIN_CKPT_PATH")
    cache_path: str = setting("./cache", "Writable folder of compiled data, kept between runs.", env="USER_CACHE_PATH", expects="a path",
                              pattern=r"(?s).+")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def get(self, name: str) -> object:
        """The value of the key `name` (leaf names are unique in the tree)."""
        return getattr(getattr(self, KEYS[name].group), name)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """{group: {key: value}} of plain values; tuples as lists. JSON and YAML take it."""
        tree: dict[str, dict[str, object]] = {group: {} for group in GROUPS}
        for name, key in KEYS.items():
            value = self.get(name)
            tree[key.group][name] = list(value) if isinstance(value, tuple) else value
        return tree

    @classmethod
    def from_dict(cls, tree: object, where: str) -> Config:
        """The settings of `to_dict`'s form; missing keys take their default. UserError lists all that is wrong in `where`."""
        problems: list[str] = []
        if not isinstance(tree, Mapping):
            raise UserError(f"{where}: expected groups of settings ({', '.join(GROUPS)}), found {show(tree)}.")
        rows = Rows(Row(group, Rows(map(Row, keys, keys.values())) if isinstance(keys, Mapping) else keys) for group, keys in tree.items())
        return resolve(place(rows, where, problems), problems)[0]


def keys_of(group: str, cls: type) -> list[Key]:
    return [Key(group, f.name, str(f.type), f.default, **f.metadata) for f in fields(cls)]


GROUPS: dict[str, type] = {f.name: f.default_factory for f in fields(Config)}  # type: ignore[misc]
KEYS: dict[str, Key] = {key.name: key for group, cls in GROUPS.items() for key in keys_of(group, cls)}
assert len(KEYS) == sum(len(fields(cls)) for cls in GROUPS.values()), "leaf names are unique in the tree"
ALIASES: dict[str, Key] = {alias: key for key in KEYS.values() for alias in key.aliases}


# ------------------------------------------------------------------------------------------------ from values to a tree


class Row(NamedTuple):
    """A key of a settings file with its value (for a group: rows) and line; line 0 = unknown."""

    name: object
    value: object
    line: int = 0


class Rows(tuple):
    """The rows of a mapping; any other value of a group is a mistake."""


class Given(NamedTuple):
    """A value for a key, and where it came from in words: "config.yaml:12", "flag --lr"."""

    key: Key
    value: object
    origin: str


def place(groups: Rows, where: str, problems: list[str]) -> list[Given]:
    """The keys of a settings file or dictionary, found in the tree; unknown, misplaced and repeated ones go to `problems`."""
    given: list[Given] = []
    seen: dict[str, Row] = {}

    def at(row: Row) -> str:
        return f"{where}:{row.line}" if row.line else where

    def is_new(path: str, row: Row) -> bool:
        first = seen.setdefault(path, row)
        if first is not row:
            spelled = "" if first.name == row.name else f" (as {first.name} and {row.name})"
            spelled += f", first on line {first.line}" if first.line else ""
            problems.append(f"{at(row)}: {path} is given twice{spelled}; give it once.")
        return first is row

    for group in groups:
        if group.name not in GROUPS:
            problems.append(f"{at(group)}: {unknown('group', group.name, {**GROUPS, **KEYS, **ALIASES})}")
        elif is_new(str(group.name), group) and not isinstance(group.value, Rows | None):
            problems.append(f"{at(group)}: group {group.name} is {show(group.value)}; expected its keys, indented, one a line.")
        for row in group.value if group.name in GROUPS and isinstance(group.value, Rows) else ():
            key = (KEYS | ALIASES).get(row.name) if isinstance(row.name, str) else None
            if key is None or key.group != group.name:
                problems.append(f"{at(row)}: {unknown(f'key in group {group.name}', row.name, KEYS | ALIASES)}")
            elif is_new(key.path, row):
                given.append(Given(key, row.value, at(row)))
    return given


def unknown(what: str, name: object, valid: Mapping[str, object]) -> str:
    """The message for a name that is not in `valid`: "unknown key in group model: 'hiden_units'; the nearest is model.hidden_units."."""
    close = nearest(str(name), valid)
    if close is None:
        return f"unknown {what}: {show(name)}; `python main.py --help` lists all."
    found = valid[close]
    return f"unknown {what}: {show(name)}; the nearest is {found.path if isinstance(found, Key) else close}."


def resolve(given: Iterable[Given], problems: list[str]) -> tuple[Config, dict[str, str]]:
    """The tree made of `given`, later ones first, and each key's origin; UserError lists `problems` and all that is found here."""
    values: dict[str, object] = {}
    origins = dict.fromkeys(KEYS, DEFAULT)
    wrong: set[str] = set()
    for key, value, origin in given:
        try:
            values[key.name] = key.read(value)
            origins[key.name] = origin
        except Unfit as unfit:
            problems.append(f"{origin}: {key.path} {unfit}")
            wrong.add(key.name)
    groups = {}
    for group, cls in GROUPS.items():
        try:
            groups[group] = cls(**{name: value for name, value in values.items() if KEYS[name].group == group})
        except SettingError as error:
            for names, text in error.problems:
                who = ", ".join(dict.fromkeys(origins[name] for name in names if origins[name] != DEFAULT))
                if not wrong.intersection(names):
                    problems.append(f"{who}: {text}" if who else text)
    if problems:
        raise UserError("\n".join(problems))
    return Config(**groups), origins


def with_values(config: Config, **values: object) -> Config:
    """`config` with some keys changed, by leaf name: with_values(config, batch_size=4, position="learned"). Checked as ever."""
    tree = config.to_dict()
    for name, value in values.items():
        if name not in KEYS:
            raise UserError(unknown("key", name, KEYS))
        tree[KEYS[name].group][name] = value
    return Config.from_dict(tree, "with_values")


def idle_keys(config: Config) -> dict[str, str]:
    """{key: why} of those that have no effect under the other settings, at their defaults or not."""
    t, loss, ev, model = config.training, config.loss, config.eval, config.model
    by_name = f"with loss.name {loss.name}"
    of_tensorboard = ("tensorboard_path", "tensorboard_histograms", "tensorboard_figures", "projector_items")
    idle = [
        (loss.name == "full_softmax", ("num_negatives",), by_name),
        (loss.name != "sampled_softmax", ("in_batch_negatives", "max_in_batch", "logq"), by_name),
        (loss.name == "sampled_softmax" and not loss.in_batch_negatives, ("max_in_batch",), "with loss.in_batch_negatives false"),
        (loss.name == "bce", ("temperature", "learn_temperature", "mask_seen_negatives", "hard_negatives", "label_smoothing"), by_name),
        (loss.name != "sampled_softmax", ("logq_source", "popularity_negatives", "memory_bank"), by_name),
        (loss.logq_source != "streaming" or not loss.logq, ("logq_rate",), "without loss.logq and loss.logq_source streaming"),
        (not loss.logq, ("logq_source",), "with loss.logq false"),
        (not loss.popularity_negatives, ("popularity_power",), "with loss.popularity_negatives 0"),
        (model.item_activation == "none", ("candidate_activation",), "with model.item_activation none"),
        (model.action_conditioning == "none", ("action_dropout", "wanted_action"), "with model.action_conditioning none"),
        (not model.time_features, ("time_fields",), "with model.time_features false"),
        (
            not model.num_experts,
            ("active_experts", "shared_experts", "expert_multiplier", "expert_balance_weight"),
            "with model.num_experts 0",
        ),
        (model.num_experts > 0, ("ffn_multiplier",), "with model.num_experts above 0"),
        (
            model.backbone == "hstu" and not model.num_experts,
            ("norm_first", "activation", "ffn_multiplier"),
            "with model.backbone hstu and model.num_experts 0",
        ),
        (ev.cold_candidates != "penalty", ("cold_penalty",), f"with eval.cold_candidates {ev.cold_candidates}"),
        (not model.hash_rows, ("hashed_features",), "with model.hash_rows []"),
        (not model.hashed_features, ("hash_rows",), "with model.hashed_features []"),
        (t.optimizer == "adam" and t.weight_decay > 0, ("weight_decay",), "with training.optimizer adam"),
        (
            t.optimizer != "muon",
            ("muon_learning_rate", "muon_momentum", "muon_lr_scheduler", "muon_warmup_steps"),
            f"with training.optimizer {t.optimizer}",
        ),
        ("cosine" not in t.schedules(), ("min_lr_ratio",), f"with training.lr_scheduler {t.lr_scheduler}"),
        ("step" not in t.schedules(), ("lr_step_epochs", "lr_gamma"), f"with training.lr_scheduler {t.lr_scheduler}"),
        (t.max_steps > 0, ("num_epochs", "patience"), "with training.max_steps above 0"),
        (config.data.num_workers == 0, ("prefetch_batches",), "with data.num_workers 0"),
        (ev.protocol == "leave_one_out", ("holdout_fraction", "target"), "with eval.protocol leave_one_out"),
        (not config.system.tensorboard, of_tensorboard, "with system.tensorboard false"),
    ]
    found: dict[str, str] = {}
    for holds, names, why in idle:
        for name in names if holds else ():
            found.setdefault(name, why)  # of several reasons the first
    return found


def warnings_for(config: Config) -> list[str]:
    """A line for each value that differs from its default and has no effect under the other settings, or a costly one."""
    loss, model = config.loss, config.model
    lines = [f"{KEYS[name].path} {show(config.get(name))} has no effect {why}."
             for name, why in idle_keys(config).items() if config.get(name) != KEYS[name].default]  # fmt: skip
    if loss.name == "bce" and loss.num_negatives > 64:
        lines.append(f"loss.num_negatives {loss.num_negatives} are drawn for each position with loss.name bce; 1 is usual.")
    if model.attention_dropout > 0:
        lines.append(f"model.attention_dropout {model.attention_dropout} leaves the flash kernel on CPU: more time, more memory.")
    return lines
