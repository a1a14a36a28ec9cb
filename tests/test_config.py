"""config.py: defaults, checks, dictionaries, conflicts, warnings."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from config import (
    ALIASES,
    GROUPS,
    KEYS,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    warnings_for,
    with_values,
)
from errors import UserError
from setting_keys import KINDS, nearest

ROOT = Path(__file__).resolve().parents[1]


def lines_of(make) -> list[str]:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value).splitlines()


def test_tree_is_frozen_and_hashable() -> None:
    config = Config()
    assert hash(config) == hash(Config()) and config == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_units = 3


def test_every_key_is_documented_and_unique() -> None:
    assert list(GROUPS) == ["model", "training", "loss", "data", "eval", "system", "paths"]
    assert len(KEYS) == sum(len(dataclasses.fields(cls)) for cls in GROUPS.values())
    assert not set(ALIASES) & set(KEYS)
    for key in KEYS.values():
        assert key.doc.endswith(".") and key.kind in KINDS and len(key.describe()) > len(key.doc) - 1
        assert key.read(key.default) == key.default


def test_import_needs_no_torch() -> None:
    code = "import sys, config, settings; config.Config(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- one value at a time ----

IDS = "auto, none or a list of different feature ids, as [81, 82]"
ROWS = "none or a list of different whole numbers, at least 2"
NAMES = "none or a list of different names, as [item_id, 121]"
BAD_VALUES = [
    ("hidden_units", "64", "model.hidden_units is '64'; expected a whole number, at least 1."),
    ("hidden_units", 64.0, "model.hidden_units is 64.0; expected a whole number, at least 1."),
    ("hidden_units", True, "model.hidden_units is true; expected a whole number, at least 1."),
    ("num_blocks", 0, "model.num_blocks is 0; expected a whole number, at least 1."),
    ("num_blocks", None, "model.num_blocks is empty (null); expected a whole number, at least 1."),
    ("learning_rate", "1e-3", "training.learning_rate is '1e-3'; expected a number, above 0."),
    ("learning_rate", 0, "training.learning_rate is 0; expected a number, above 0."),
    ("learning_rate", float("nan"), "training.learning_rate is nan; expected a number, above 0."),
    ("learning_rate", float("inf"), "training.learning_rate is inf; expected a number, above 0."),
    ("learning_rate", False, "training.learning_rate is false; expected a number, above 0."),
    ("dropout_rate", 1.0, "model.dropout_rate is 1.0; expected a number, at least 0, below 1."),
    ("dropout_rate", -0.1, "model.dropout_rate is -0.1; expected a number, at least 0, below 1."),
    ("min_lr_ratio", 1.5, "training.min_lr_ratio is 1.5; expected a number, at least 0, at most 1."),
    ("holdout_fraction", 0, "eval.holdout_fraction is 0; expected a number, above 0, below 1."),
    ("norm_first", 1, "model.norm_first is 1; expected true or false."),
    ("norm_first", "true", "model.norm_first is 'true'; expected true or false."),
    ("activation", "gelo", "model.activation is 'gelo'; expected one of gelu, relu, swiglu (did you mean gelu?)."),
    ("activation", "x", "model.activation is 'x'; expected one of gelu, relu, swiglu."),
    ("score_round", 3, "eval.score_round is 3; expected one of 1, 2."),
    ("score_round", True, "eval.score_round is true; expected one of 1, 2."),
    ("best_metric", "hr@5", "eval.best_metric is 'hr@5'; expected one of hr@10, ndcg@10, score, loss."),
    ("device", "gpu", "system.device is 'gpu'; expected one of auto, cpu, cuda, cuda:N."),
    ("device", "cuda:x", "system.device is 'cuda:x'; expected one of auto, cpu, cuda, cuda:N (did you mean cuda:N?)."),
    ("seed", -1, "system.seed is -1; expected a whole number, at least 0, at most 9223372036854775807."),
    ("seed", 2**63, "system.seed is 9223372036854775808; expected a whole number, at least 0, at most 9223372036854775807."),
    ("run_name", "a/b", "system.run_name is 'a/b'; expected text without '/' that does not begin with '.'."),
    ("run_name", "..", "system.run_name is '..'; expected text without '/' that does not begin with '.'."),
    ("run_name", 7, "system.run_name is 7; expected text without '/' that does not begin with '.'."),
    ("data_path", 7, "paths.data_path is 7; expected text (in quotes where YAML takes it for something else)."),
    ("cache_path", "", "paths.cache_path is ''; expected a path."),
    ("candidates", "", "eval.candidates is ''; expected all or a path."),
    ("top_k", [], "eval.top_k is []; expected a list of different whole numbers, at least 1."),
    ("top_k", 10, "eval.top_k is 10; expected a list of different whole numbers, at least 1."),
    ("top_k", [10, 0], "eval.top_k is [10, 0]; expected a list of different whole numbers, at least 1."),
    ("top_k", [10, 10], "eval.top_k is [10, 10]; expected a list of different whole numbers, at least 1."),
    ("top_k", [True], "eval.top_k is [True]; expected a list of different whole numbers, at least 1."),
    ("multimodal_features", "81", f"data.multimodal_features is '81'; expected {IDS}."),
    ("multimodal_features", [81, "81"], f"data.multimodal_features is [81, '81']; expected {IDS}."),
    ("multimodal_features", [81, "auto"], f"data.multimodal_features is [81, 'auto']; expected {IDS}."),
    ("feature_width", "fourth", "model.feature_width is 'fourth'; expected one of same, auto."),
    ("time_fields", ["hour", "month"], "model.time_fields is ['hour', 'month']; expected one of gap, hour, weekday, day, fourier."),
    ("time_fields", "day", "model.time_fields is 'day'; expected one of gap, hour, weekday, day, fourier (did you mean day?)."),
    ("action_conditioning", "films", "model.action_conditioning is 'films'; expected one of none, film, gate (did you mean film?)."),
    ("id_dropout", 1, "model.id_dropout is 1; expected a number, at least 0, below 1."),
    ("cold_penalty", -1, "eval.cold_penalty is -1; expected a number, at least 0."),
    ("hash_rows", 50, f"model.hash_rows is 50; expected {ROWS}."),
    ("hash_rows", "auto", f"model.hash_rows is 'auto'; expected {ROWS}."),
    ("hash_rows", [50, 1], f"model.hash_rows is [50, 1]; expected {ROWS}."),
    ("hash_rows", [50, 50], f"model.hash_rows is [50, 50]; expected {ROWS}."),
    ("hashed_features", "item_id", f"model.hashed_features is 'item_id'; expected {NAMES}."),
    ("hashed_features", "auto", f"model.hashed_features is 'auto'; expected {NAMES}."),
    ("hashed_features", [121, "121"], f"model.hashed_features is [121, '121']; expected {NAMES}."),
    ("hashed_features", [""], f"model.hashed_features is ['']; expected {NAMES}."),
    ("multimodal_features", [1.5], f"data.multimodal_features is [1.5]; expected {IDS}."),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_named(name: str, value: object, message: str) -> None:
    assert lines_of(lambda: GROUPS[KEYS[name].group](**{name: value})) == [message]
    assert lines_of(lambda: with_values(Config(), **{name: value})) == [f"with_values: {message}"]


GOOD_VALUES = [
    ("learning_rate", 1, 1.0), ("dropout_rate", 0, 0.0), ("min_lr_ratio", 1, 1.0), ("seed", 2**63 - 1, 2**63 - 1),
    ("device", "cuda:11", "cuda:11"),
    ("top_k", [5, 10], (5, 10)), ("multimodal_features", [81, "82"], ("81", "82")), ("multimodal_features", "none", ()),
    ("multimodal_features", [], ()),
    ("hash_rows", "none", ()), ("hash_rows", [], ()), ("hash_rows", [50, 2], (50, 2)), ("hashed_features", "none", ()),
    ("hashed_features", ["item_id", 121], ("item_id", "121")),
    ("lr_scheduler", "none", "constant"), ("run_name", "try 1 中", "try 1 中"), ("data_path", Path("/data"), "/data"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), GOOD_VALUES)
def test_a_value_takes_the_keys_own_type(name: str, value: object, expected: object) -> None:
    found = with_values(Config(), **{name: value}).get(name)
    assert found == expected and type(found) is type(expected)


def test_long_values_are_cut() -> None:
    (line,) = lines_of(lambda: ModelConfig(hidden_units="x" * 500))
    assert len(line) < 150


# ---- several at once, and values that do not go together ----


def test_all_mistakes_of_a_group_at_once() -> None:
    lines = lines_of(lambda: ModelConfig(hidden_units=0, activation="tanh", norm_first="no"))
    assert [line.split()[0] for line in lines] == ["model.hidden_units", "model.norm_first", "model.activation"]


def test_all_mistakes_of_a_tree_at_once() -> None:
    tree = {"model": {"hidden_units": -3, "num_heads": 3}, "training": {"bach_size": 3}, "losses": {}, "eval": {"top_k": 3}, "data": [1]}
    assert lines_of(lambda: Config.from_dict(tree, "meta.json")) == [
        "meta.json: unknown key in group training: 'bach_size'; the nearest is training.batch_size.",
        "meta.json: unknown group: 'losses'; the nearest is loss.name.",
        "meta.json: group data is [1]; expected its keys, indented, one a line.",
        "meta.json: model.hidden_units is -3; expected a whole number, at least 1.",
        "meta.json: eval.top_k is 3; expected a list of different whole numbers, at least 1.",
    ]


@pytest.mark.parametrize(("cls", "values", "message"), [
    (ModelConfig, {"hidden_units": 64, "num_heads": 3},
     "model.hidden_units is 64 and model.num_heads is 3; expected hidden_units to be a multiple of num_heads."),
    (ModelConfig, {"hidden_units": 6, "num_heads": 2, "position": "rope"},
     ("model.position is 'rope' and model.hidden_units is 6 and model.num_heads is 2; "
      "expected an even hidden_units / num_heads, or another position than rope.")),
    (ModelConfig, {"item_tower": "sum", "embedding_dim": 8},
     ("model.item_tower is 'sum' and model.embedding_dim is 8 and model.hidden_units is 64; "
      "expected embedding_dim 0 or hidden_units where vectors are summed.")),
    (ModelConfig, {"item_tower": "sum", "feature_width": "auto"},
     "model.item_tower is 'sum' and model.feature_width is 'auto'; expected feature_width same where vectors are summed."),
    (LossConfig, {"name": "bce", "num_negatives": 0}, "loss.name is 'bce' and loss.num_negatives is 0; expected at least 1 negative."),
    (LossConfig, {"num_negatives": 0, "in_batch_negatives": False},
     ("loss.num_negatives is 0 and loss.in_batch_negatives is false and loss.popularity_negatives is 0; "
      "expected negatives from one of them.")),
])  # fmt: skip
def test_conflicts(cls: type, values: dict, message: str) -> None:
    assert lines_of(lambda: cls(**values)) == [message]


def test_what_does_go_together() -> None:
    ModelConfig(hidden_units=6, num_heads=2, position="learned")
    ModelConfig(item_tower="sum", embedding_dim=64)
    ModelConfig(item_tower="sum", hash_rows=[50, 30], hashed_features=["item_id", 121])
    ModelConfig(feature_width="auto", embedding_dim=32)
    LossConfig(name="full_softmax", num_negatives=0)
    LossConfig(num_negatives=0, in_batch_negatives=True)
    LossConfig(num_negatives=0, in_batch_negatives=False, popularity_negatives=1)


# ---- dictionaries ----


def test_dictionary_round_trip() -> None:
    config = with_values(Config(), multimodal_features=["81"], top_k=[1, 10], learning_rate=3e-5, data_path="/d", num_heads=4)
    tree = config.to_dict()
    assert tree["eval"]["top_k"] == [1, 10] and tree["data"]["multimodal_features"] == ["81"]
    assert Config.from_dict(tree, "there") == config
    assert list(tree) == list(GROUPS) and [name for keys in tree.values() for name in keys] == list(KEYS)


def test_missing_keys_take_their_default() -> None:
    assert Config.from_dict({}, "x") == Config()
    assert Config.from_dict({"training": {"lr": 5e-4}, "model": None}, "x") == with_values(Config(), learning_rate=5e-4)


def test_from_dict_refuses_what_is_no_tree() -> None:
    assert lines_of(lambda: Config.from_dict([1], "meta.json")) == [
        "meta.json: expected groups of settings (model, training, loss, data, eval, system, paths), found [1]."
    ]


def test_key_and_alias_at_once() -> None:
    assert lines_of(lambda: Config.from_dict({"training": {"lr": 1, "learning_rate": 2}}, "meta.json")) == [
        "meta.json: training.learning_rate is given twice (as lr and learning_rate); give it once."
    ]


def test_misplaced_keys_name_their_group() -> None:
    assert lines_of(lambda: Config.from_dict({"model": {"lr": 1}, "batch_size": 3}, "f")) == [
        "f: unknown key in group model: 'lr'; the nearest is training.learning_rate.",
        "f: unknown group: 'batch_size'; the nearest is training.batch_size.",
    ]


def test_with_values_refuses_an_unknown_name() -> None:
    assert lines_of(lambda: with_values(Config(), batchsize=3)) == ["unknown key: 'batchsize'; the nearest is training.batch_size."]


def test_nearest() -> None:
    assert nearest("Hidden-Units", KEYS) == "hidden_units"
    assert nearest("zzzz", KEYS) is None


# ---- warnings ----


def test_default_settings_warn_of_nothing() -> None:
    assert warnings_for(Config()) == []


@pytest.mark.parametrize(("values", "starts"), [
    ({"name": "bce", "num_negatives": 1, "temperature": 0.1}, ["loss.temperature 0.1 has no effect with loss.name bce."]),
    ({"name": "bce", "num_negatives": 1}, []),
    ({"name": "bce"}, ["loss.num_negatives 1024 are drawn for each position"]),
    ({"name": "bce", "num_negatives": 1, "logq": False}, ["loss.logq false has no effect with loss.name bce."]),
    ({"name": "bce", "num_negatives": 1, "max_in_batch": 7}, ["loss.max_in_batch 7 has no effect with loss.name bce."]),
    ({"in_batch_negatives": False, "max_in_batch": 7}, ["loss.max_in_batch 7 has no effect with loss.in_batch_negatives false."]),
    ({"name": "full_softmax", "num_negatives": 5, "in_batch_negatives": False},
     ["loss.num_negatives 5 ", "loss.in_batch_negatives false "]),
    ({"lr_step_epochs": 2}, ["training.lr_step_epochs 2 has no effect with training.lr_scheduler cosine."]),
    ({"lr_step_epochs": 2, "table_lr_scheduler": "step"}, []),
    ({"lr_scheduler": "constant", "min_lr_ratio": 0.5, "optimizer": "muon", "muon_lr_scheduler": "cosine"}, []),
    ({"muon_momentum": 0.5, "optimizer": "adamw"}, ["training.muon_momentum 0.5 has no effect with training.optimizer adamw."]),
    ({"muon_lr_scheduler": "step", "lr_gamma": 0.1, "optimizer": "adamw"},
     ["training.muon_lr_scheduler 'step' has no effect with training.optimizer adamw.",
      "training.lr_gamma 0.1 has no effect with training.lr_scheduler cosine."]),
    ({"lr_scheduler": "step", "lr_step_epochs": 2, "lr_gamma": 0.1}, []),
    ({"lr_scheduler": "constant", "min_lr_ratio": 0.0}, ["training.min_lr_ratio 0.0 "]),
    ({"candidate_activation": True}, ["model.candidate_activation true has no effect with model.item_activation none."]),
    ({"candidate_activation": True, "item_activation": "relu"}, []),
    ({"action_dropout": 0.2, "wanted_action": "click"}, ["model.action_dropout 0.2 has no effect with model.action_conditioning none.",
                                                         "eval.wanted_action 'click' has no effect"]),
    ({"action_dropout": 0.2, "wanted_action": "click", "action_conditioning": "gate"}, []),
    ({"time_fields": ["day"], "time_features": False}, ["model.time_fields ['day'] has no effect with model.time_features false."]),
    ({"cold_penalty": 0.2, "cold_candidates": "drop"}, ["eval.cold_penalty 0.2 has no effect with eval.cold_candidates drop."]),
    ({"cold_penalty": 0.2, "cold_candidates": "penalty"}, []),
    ({"hashed_features": ["121"]}, ["model.hashed_features ['121'] has no effect with model.hash_rows []."]),
    ({"hashed_features": ["121"], "hash_rows": [50]}, []),
    ({"hashed_features": [], "hash_rows": [50]}, ["model.hash_rows [50] has no effect with model.hashed_features []."]),
    ({"optimizer": "adam", "weight_decay": 0.1}, ["training.weight_decay 0.1 "]),
    ({"optimizer": "adam", "weight_decay": 0.0}, []),
    ({"max_steps": 5, "num_epochs": 9, "patience": 2}, ["training.num_epochs 9 ", "training.patience 2 "]),
    ({"num_workers": 0, "prefetch_batches": 2}, ["data.prefetch_batches 2 "]),
    ({"protocol": "leave_one_out", "holdout_fraction": 0.2, "target": "last_click"},
     ["eval.holdout_fraction 0.2 ", "eval.target 'last_click' "]),
    ({"tensorboard": False, "tensorboard_path": "/tb"}, ["paths.tensorboard_path '/tb' "]),
    ({"attention_dropout": 0.1}, ["model.attention_dropout 0.1 leaves the flash kernel"]),
])  # fmt: skip
def test_values_without_effect_are_named(values: dict, starts: list[str]) -> None:
    lines = warnings_for(with_values(Config(), **values))
    assert len(lines) == len(starts) and all(map(str.startswith, lines, starts))


def test_limits_reach_the_documentation() -> None:
    assert KEYS["dropout_rate"].describe().endswith("Unit: probability. At least 0, below 1.")
    assert KEYS["learning_rate"].describe() == "Highest learning rate. Above 0. Also: lr. Variable: LEARNING_RATE."
    assert "rows touched" in KEYS["l2_emb"].doc and "rows touched" in KEYS["weight_decay"].doc


def test_groups_can_be_made_alone() -> None:
    assert TrainingConfig(batch_size=4).batch_size == 4
    assert DataConfig(multimodal_features=[81]).multimodal_features == ("81",)
    assert EvalConfig(top_k=[30, 3]).top_k == (3, 10, 30)  # 10 is always reported


def test_the_schedule_of_each_group() -> None:
    training = TrainingConfig(lr_scheduler="step", warmup_steps=5, table_lr_scheduler="constant", muon_warmup_steps=0)
    assert training.schedule("dense") == ("step", 5)
    assert training.schedule("table") == ("constant", 5) and training.schedule("muon") == ("step", 0)
    assert training.schedules() == {"step", "constant"}
    assert TrainingConfig(optimizer="adamw", muon_lr_scheduler="step").schedules() == {"cosine"}  # no muon
