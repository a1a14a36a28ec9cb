"""settings.py: YAML, environment and flags, their order and mistakes; config.yaml, --help, --print_config, --write_config."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, reject, settings, strategies

from config import GROUPS, KEYS, Config, keys_of, warnings_for, with_values
from errors import UserError
from setting_keys import Unfit
from settings import DEFAULT_FILE, ParsedArguments, dump_yaml, help_text, load_config, print_config, write_config

ROOT = Path(__file__).resolve().parents[1]
NO_FILE = Path("/nowhere/config.yaml")


def load(*argv: str, environ: dict | None = None, file: Path = NO_FILE) -> ParsedArguments:
    return load_config(argv, environ or {}, file)


def mistakes(*argv: str, environ: dict | None = None, file: Path = NO_FILE) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(*argv, environ=environ, file=file)
    return str(caught.value).splitlines()


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


# ---- order of the sources ----


def test_order_and_origins(write) -> None:
    file = write("training:\n  batch_size: 1\n  num_epochs: 11\n  lr: 0.1\n")
    environ = {"BATCH_SIZE": "2", "NUM_EPOCHS": "12", "DEVICE": "cpu", "NUM_HEADS": ""}
    parsed = load("--batch_size", "3", "--save_freq", "5", environ=environ, file=file)
    training = parsed.config.training
    assert (training.batch_size, training.num_epochs, training.learning_rate) == (3, 12, 0.1)
    assert parsed.config.system.device == "cpu" and parsed.config.model.num_heads == 2
    assert {k: v for k, v in parsed.origins.items() if v != "default"} == {
        "batch_size": "flag --batch_size", "num_epochs": "environment NUM_EPOCHS", "learning_rate": "config.yaml:4",
        "device": "environment DEVICE", "save_frequency": "flag --save_freq"}  # fmt: skip
    assert set(parsed.origins) == set(KEYS)
    assert parsed.flags == {"batch_size", "save_frequency"} and parsed.config_file == file


def test_nothing_given_is_the_default() -> None:
    parsed = load()
    assert parsed.config == Config() and parsed.config_file is None and set(parsed.origins.values()) == {"default"}


def test_config_takes_the_default_files_place(write) -> None:
    default, other = write("training:\n  batch_size: 1\n"), write("training:\n  num_epochs: 9\n", "other.yaml")
    parsed = load("--config", str(other), file=default)
    assert parsed.config == with_values(Config(), num_epochs=9)
    assert parsed.config_file == other and parsed.origins["num_epochs"] == f"{other}:2"


@pytest.mark.parametrize(("variable", "name", "text", "value"), [
    ("TRAIN_DATA_PATH", "data_path", "/d", "/d"), ("TRAIN_LOG_PATH", "log_path", "/l", "/l"),
    ("TRAIN_TF_EVENTS_PATH", "tensorboard_path", "/t", "/t"),
    ("TRAIN_CKPT_PATH", "checkpoint_path", "/c", "/c"), ("USER_CACHE_PATH", "cache_path", "/u", "/u"), ("BATCH_SIZE", "batch_size", "7", 7),
    ("LEARNING_RATE", "learning_rate", "3e-4", 3e-4), ("NUM_EPOCHS", "num_epochs", "7", 7), ("HIDDEN_UNITS", "hidden_units", "12", 12),
    ("NUM_BLOCKS", "num_blocks", "7", 7), ("NUM_HEADS", "num_heads", "4", 4), ("DEVICE", "device", "cuda:1", "cuda:1"),
])  # fmt: skip
def test_variables(variable: str, name: str, text: str, value: object) -> None:
    parsed = load(environ={variable: text})
    assert parsed.config == with_values(Config(), **{name: value}) and parsed.origins[name] == f"environment {variable}"
    assert load(environ={variable: ""}).config == Config()


def test_the_list_of_variables_is_complete() -> None:
    assert sum(bool(key.env) for key in KEYS.values()) == 12


def test_a_bad_variable_is_named() -> None:
    assert mistakes("--batch_size", "4", environ={"BATCH_SIZE": "many", "LEARNING_RATE": "-1"}) == [
        "environment BATCH_SIZE: training.batch_size is 'many'; expected a whole number, at least 1.",
        "environment LEARNING_RATE: training.learning_rate is -1.0; expected a number, above 0.",
    ]


# ---- flags ----


def text_of(value: object) -> list[str]:
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value).lower() if isinstance(value, bool) else str(value)]


OTHER = {
    "backbone": "hstu", "norm": "rmsnorm", "hidden_units": 32, "activation": "relu", "position": "learned", "item_tower": "sum",
    "item_activation": "gelu", "similarity": "dot", "optimizer": "adam", "table_optimizer": "adam", "lr_scheduler": "step",
    "action_conditioning": "gate", "time_fields": ("fourier",), "id_init": "zero", "wanted_action": "click", "cold_candidates": "drop",
    "table_lr_scheduler": "step", "muon_lr_scheduler": "step", "table_warmup_steps": 5, "muon_warmup_steps": 0,
    "precision": "bf16", "name": "bce", "multimodal_features": ("81", "82"), "protocol": "leave_one_out", "target": "last_click",
    "candidates": "/c", "top_k": (5, 20), "score_round": 2, "best_metric": "loss", "device": "cpu", "feature_width": "auto",
    "hash_rows": (64, 50), "logq_source": "streaming", "action_weights": (1.0, 2.5, 2.5), "hashed_features": ("user_id", "121"),
}  # fmt: skip


def other_value(name: str) -> object:
    """A valid value other than the default."""
    key = KEYS[name]
    if name in OTHER:
        return OTHER[name]
    if key.kind == "bool":
        return not key.default
    if key.kind == "str":
        return "elsewhere"
    return key.default * 2 if key.kind == "int" and key.default else 8 if key.kind == "int" else 0.25


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_a_flag_and_a_yaml_key(name: str, write) -> None:
    value = other_value(name)
    expected = with_values(Config(), **{name: value})
    assert value != KEYS[name].default
    for spelled in (name, *KEYS[name].aliases):
        assert load(f"--{spelled}", *text_of(value)).config == expected
        assert load(f"--{spelled}={','.join(text_of(value))}").config == expected
        tree = {KEYS[name].group: {spelled: list(value) if isinstance(value, tuple) else value}}
        assert load(file=write(yaml.safe_dump(tree))).config == expected


@pytest.mark.parametrize(("argv", "expected"), [
    (["--norm_first"], True), (["--norm_first", "false"], False), (["--no-norm_first"], False), (["--norm_first=False"], False),
    (["--norm_first", "1"], True), (["--norm_first", "off"], False), (["--no-norm_first", "--norm_first"], True),
    (["--norm_first", "--no-norm_first"], False),
])  # fmt: skip
def test_bool_flags(argv: list[str], expected: bool, write) -> None:
    for text in ("true", "false"):
        assert load(*argv, file=write(f"model:\n  norm_first: {text}\n")).config.model.norm_first is expected


def test_list_flags() -> None:
    assert load("--mm_emb_id", "81", "82", "--lr", "1").config.data.multimodal_features == ("81", "82")
    assert load("--mm_emb_id", "auto").config.data.multimodal_features == "auto"
    assert load("--multimodal_features", "none").config.data.multimodal_features == ()
    assert load("--top_k", "5", "10").config.eval.top_k == (5, 10)
    assert load("--hash_rows", "50").config.model.hash_rows == (50,)
    assert load("--hash_rows", "none").config.model.hash_rows == load("--hash_rows=").config.model.hash_rows == ()
    assert load("--hashed_features", "item_id,121", "user_id").config.model.hashed_features == ("item_id", "121", "user_id")
    assert load("--hashed_features", "none").config.model.hashed_features == ()


@pytest.mark.parametrize(("text", "expected"), [("none", ()), ("[]", ()), ("[50, 30]", (50, 30))])
def test_hash_rows_in_yaml(text: str, expected: tuple, write) -> None:
    assert load(file=write(f"model:\n  hash_rows: {text}\n  hashed_features: [item_id, 121]\n")).config.model.hash_rows == expected


def test_a_flag_given_twice_the_last_counts() -> None:
    assert load("--max_steps", "100", "--max_steps", "2").config.training.max_steps == 2


def test_negative_numbers_and_dashes_are_values() -> None:
    (line,) = mistakes("--dropout_rate", "-0.5")
    assert line == "flag --dropout_rate: model.dropout_rate is -0.5; expected a number, at least 0, below 1."
    assert load("--run_name=--x").config.system.run_name == "--x"
    assert load("--data_path=a=b").config.paths.data_path == "a=b"
    assert load("--run_name", "", file=NO_FILE).config.system.run_name == ""


def test_the_commands_of_the_interface() -> None:
    load("--batch_size", "64", "--lr", "0.0005", "--num_epochs", "20")
    command = "--hidden_units 128 --num_blocks 4 --num_heads 4 --optimizer adamw --lr_scheduler cosine --device cuda"
    config = load(*command.split()).config
    assert (config.model.hidden_units, config.model.num_blocks, config.system.device) == (128, 4, "cuda")
    assert load("--lr_scheduler", "none").config.training.lr_scheduler == "constant"
    assert load("--grad_clip", "0.5").config.training.gradient_clip == 0.5
    assert load("--maxlen", "101").config.model.max_seq_length == 101


FLAG_MISTAKES = [
    (["--batchsize", "3"], "unknown flag --batchsize; the nearest is --batch_size."),
    (["--batch-size", "3"], "unknown flag --batch-size; the nearest is --batch_size."),
    (["--hidden", "3"], "unknown flag --hidden; the nearest is --hidden_units."),
    (["--batch", "3"], "unknown flag --batch; the nearest is --batch_size."),
    (["--qqqq"], "unknown flag --qqqq; `python main.py --help` lists all."),
    (["--no-norm_fist"], "unknown flag --no-norm_fist; the nearest is --no-norm_first."),
    (["--no_norm_first"], "unknown flag --no_norm_first; the nearest is --no-norm_first."),
    (["--resum"], "unknown flag --resum; the nearest is --resume."),
    (["--no-batch_size"], None),
    (["64"], "unexpected argument '64'; a value follows its flag, as in --batch_size 64."),
    (["-x"], "unexpected argument '-x'; a value follows its flag, as in --batch_size 64."),
    (["--batch_size", "64", "32"], "flag --batch_size: unexpected argument '32' behind it."),
    (["--no-norm_first", "true"], "flag --no-norm_first: unexpected argument 'true' behind it."),
    (["--batch_size"], "flag --batch_size: its value is missing; expected --batch_size INT."),
    (["--top_k", "--lr", "1"], "flag --top_k: its value is missing; expected --top_k INT ...."),
    (["--top_k", "5", "x"], "flag --top_k: eval.top_k is [5, 'x']; expected a list of different whole numbers, at least 1."),
    (["--norm_first", "maybe"], "flag --norm_first: model.norm_first is 'maybe'; expected true or false."),
    (["--batch_size", "6.5"], "flag --batch_size: training.batch_size is '6.5'; expected a whole number, at least 1."),
    (["--lr", "nan"], "flag --lr: training.learning_rate is nan; expected a number, above 0."),
    (["--optimizer", "adamm"], "flag --optimizer: training.optimizer is 'adamm'; expected one of adam, adamw, muon (did you mean adam?)."),
    (
        ["--lr", "1", "--learning_rate", "1"],
        "flag --lr and flag --learning_rate are the same key, training.learning_rate; give one of them.",
    ),
    (["--hash_rows", "1"], "flag --hash_rows: model.hash_rows is [1]; expected none or a list of different whole numbers, at least 2."),
    (
        ["--hashed_features", "auto"],
        "flag --hashed_features: model.hashed_features is 'auto'; expected none or a list of different names, as [item_id, 121].",
    ),
    (["--resume_path", ""], "flag --resume_path: resume_path is ''; expected a path."),
    (["--debug", "x"], "flag --debug: debug is 'x'; expected true or false."),
    (
        ["--num_heads", "3"],
        "flag --num_heads: model.hidden_units is 64 and model.num_heads is 3; expected hidden_units to be a multiple of num_heads.",
    ),
]


@pytest.mark.parametrize(("argv", "message"), FLAG_MISTAKES)
def test_flag_mistakes(argv: list[str], message: str | None) -> None:
    lines = mistakes(*argv)
    assert len(lines) == 1 and (message is None or lines == [message])


def test_options() -> None:
    options = load("--resume", "--resume_path", "a/b", "--debug", "--overwrite").options
    assert (options.resume, options.resume_path, options.debug, options.overwrite) == (True, Path("a/b"), True, True)
    assert (options.state_dict_path, options.inference_only, options.write_config, options.print_config) == (None, False, False, False)
    assert load("--inference_only", "--state_dict_path", "x").options.state_dict_path == Path("x")
    assert load("--resume", "false").options.resume is False


def test_mistakes_of_all_sources_at_once(write) -> None:
    file = write("model:\n  hidden_unit: 3\ntraining:\n  lr: fast\n")
    assert mistakes("--batchsize", "3", "--device", "tpu", "--num_heads", "5", environ={"NUM_BLOCKS": "x"}, file=file) == [
        "unknown flag --batchsize; the nearest is --batch_size.",
        "config.yaml:2: unknown key in group model: 'hidden_unit'; the nearest is model.hidden_units.",
        "config.yaml:4: training.learning_rate is 'fast'; expected a number, above 0.",
        "environment NUM_BLOCKS: model.num_blocks is 'x'; expected a whole number, at least 1.",
        "flag --device: system.device is 'tpu'; expected one of auto, cpu, cuda, cuda:N.",
        "flag --num_heads: model.hidden_units is 64 and model.num_heads is 5; expected hidden_units to be a multiple of num_heads.",
    ]


# ---- YAML ----


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("1.0e-3", 1e-3), ("5E-4", 5e-4), (".5", 0.5), ("2", 2.0), ("2.", 2.0), ("+1", 1.0), ("010", 10.0),
])  # fmt: skip
def test_yaml_numbers(text: str, value: float, write) -> None:
    assert load(file=write(f"training:\n  lr: {text}\n")).config.training.learning_rate == value


YAML_MISTAKES = [
    ("model:\n  hiden_units: 3\n", "config.yaml:2: unknown key in group model: 'hiden_units'; the nearest is model.hidden_units."),
    ("modle:\n  hidden_units: 3\n", "config.yaml:1: unknown group: 'modle'; the nearest is model."),
    ("batch_size: 3\n", "config.yaml:1: unknown group: 'batch_size'; the nearest is training.batch_size."),
    ("\n\ntraining:\n  hidden_units: 3\n",
     "config.yaml:4: unknown key in group training: 'hidden_units'; the nearest is model.hidden_units."),
    ("training:\n  batch_size: 3\n  batch_size: 4\n", "config.yaml:3: training.batch_size is given twice, first on line 2; give it once."),
    ("training:\n  lr: 1\n  learning_rate: 1\n",
     "config.yaml:3: training.learning_rate is given twice (as lr and learning_rate), first on line 2; give it once."),
    ("training:\n  patience: 1\nmodel:\ntraining:\n  max_steps: 1\n",
     "config.yaml:4: training is given twice, first on line 1; give it once."),
    ("training:\n  batch_size: 6.0\n", "config.yaml:2: training.batch_size is 6.0; expected a whole number, at least 1."),
    ("training:\n  batch_size: '6'\n", "config.yaml:2: training.batch_size is '6'; expected a whole number, at least 1."),
    ("training:\n  batch_size: true\n", "config.yaml:2: training.batch_size is true; expected a whole number, at least 1."),
    ("training:\n  batch_size: 1:30\n", "config.yaml:2: training.batch_size is '1:30'; expected a whole number, at least 1."),
    ("training:\n  lr: .inf\n", "config.yaml:2: training.learning_rate is inf; expected a number, above 0."),
    ("training:\n  batch_size:\n", "config.yaml:2: training.batch_size is empty (null); expected a whole number, at least 1."),
    ("training:\n  batch_size: {a: 1}\n", "config.yaml:2: training.batch_size is {'a': 1}; expected a whole number, at least 1."),
    ("model:\n  norm_first: 1\n", "config.yaml:2: model.norm_first is 1; expected true or false."),
    ("system:\n  run_name: 2024\n", "config.yaml:2: system.run_name is 2024; expected text without '/' that does not begin with '.'."),
    ("training:\n  optimizer: sgd\n", "config.yaml:2: training.optimizer is 'sgd'; expected one of adam, adamw, muon."),
    ("model:\n  position: rop\n",
     "config.yaml:2: model.position is 'rop'; expected one of rope, learned, relative, none (did you mean rope?)."),
    ("training: 3\n", "config.yaml:1: group training is 3; expected its keys, indented, one a line."),
    ("training:\n  - 3\n", "config.yaml:1: group training is [3]; expected its keys, indented, one a line."),
    ("- 3\n", None), ("3\n", None), ("[]\n", None),
    ("model: {hidden_units: 3\n", None), ("model:\n\thidden_units: 3\n", None), ("a: *b\n", None),
    ("model: !!python/object:os.x {}\n", None),
    ("model:\n  hidden_units: !!int x\n", None), ("--- {}\n--- {}\n", None), (b"\xff\xfe\x00", None),
    ("a: \x01\n", None), ("? [a]\n: 3\n", None),
    ("x: " + "[" * 100_000, None), ("model:\n  hidden_units: " + "9" * 5000 + "\n", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), YAML_MISTAKES)
def test_yaml_mistakes(text: str | bytes, message: str | None, write) -> None:
    lines = mistakes(file=write(text))
    assert len(lines) == 1 and lines[0].startswith("config.yaml") and (message is None or lines == [message])


def test_a_named_file_is_named_in_full(write, tmp_path: Path) -> None:
    path = write("model:\n  hidden_unit: 1\n", "other.yaml")
    assert mistakes("--config", str(path)) == [f"{path}:2: unknown key in group model: 'hidden_unit'; the nearest is model.hidden_units."]
    missing = tmp_path / "none.yaml"
    assert mistakes("--config", str(missing)) == [f"--config {missing}: no such file; expected a YAML file like config.yaml."]
    assert mistakes("--config", str(tmp_path)) == [f"--config {tmp_path}: is a folder; expected a YAML file like config.yaml."]


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "---\n", "\ufeffmodel: {}\n"])
def test_files_that_say_nothing(text: str, write) -> None:
    assert load(file=write(text)).config == Config()


# ---- config.yaml and its writing ----


def comments_and_keys(text: str) -> list[str]:
    return [re.sub(r"^(  \w+:).*", r"\1", line) for line in text.splitlines()]


def test_the_checked_in_file_is_a_written_one() -> None:
    """Keys, order and comments; values may differ, since an edited value is the user's."""
    assert comments_and_keys(DEFAULT_FILE.read_text(encoding="utf-8")) == comments_and_keys(dump_yaml(Config()))


def test_a_written_file_holds_the_defaults_and_every_key(write) -> None:
    text = dump_yaml(Config())
    parsed = load(file=write(text))
    assert parsed.config == Config() and all(origin.startswith("config.yaml:") for origin in parsed.origins.values())
    lines = text.splitlines()
    for name, origin in parsed.origins.items():
        assert lines[int(origin.split(":")[1]) - 1].startswith(f"  {name}: ")
    assert list(yaml.safe_load(text)) == list(GROUPS)
    assert [name for group in yaml.safe_load(text).values() for name in group] == list(KEYS)


def test_comments_stand_above_their_key() -> None:
    lines = dump_yaml(Config()).splitlines()
    at = lines.index("  learning_rate: 0.003")
    assert lines[at - 1] == "  # Highest learning rate. Above 0. Also: lr. Variable: LEARNING_RATE."
    assert max(map(len, lines)) < 140


def test_other_yaml_readers_see_the_same_values() -> None:
    config = with_values(Config(), learning_rate=1e-5, run_name="no", data_path="12:30", multimodal_features=["81"], log_path="1e3", seed=8)
    assert yaml.safe_load(dump_yaml(config)) == config.to_dict()


@settings(max_examples=150, deadline=None)
@given(strategies.text(min_size=1), strategies.floats(min_value=0, exclude_min=True, allow_infinity=False), strategies.booleans())
def test_dump_round_trip(tmp_path_factory, text: str, number: float, truth: bool) -> None:
    config = with_values(Config(), data_path=text, cache_path=text, learning_rate=number, norm_first=truth)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load(file=path).config == config


PRINTED = strategies.text(strategies.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def values_of(key) -> strategies.SearchStrategy:
    """Anything that the key's own type, limits, choices and pattern allow."""
    low = key.minimum if key.minimum is not None else key.above if key.above is not None else -1000
    high = key.maximum if key.maximum is not None else key.below if key.below is not None else low + 10_000
    whole = strategies.integers(int(low), int(high))
    number = strategies.floats(low, high)
    if key.choices or key.pattern:
        options = strategies.sampled_from([*key.choices, key.default])
        one = options if key.choices else options | strategies.from_regex(key.pattern, fullmatch=True)
        return strategies.lists(one, min_size=1, max_size=4, unique=True).map(tuple) if key.is_list else one
    names = strategies.lists(PRINTED.filter(lambda text: "," not in text), max_size=3, unique=True).map(tuple)  # a comma parts them
    return {
        "bool": strategies.booleans(),
        "int": whole,
        "float": number,
        "str": PRINTED,
        "Path | None": PRINTED,
        "tuple[int, ...]": strategies.lists(whole, min_size=1, max_size=4, unique=True).map(tuple),
        "tuple[float, ...]": strategies.lists(number, min_size=3, max_size=3).map(tuple),
        "tuple[()] | tuple[int, ...]": strategies.lists(whole, max_size=3, unique=True).map(tuple),
        "tuple[str, ...]": names,
        "str | tuple[str, ...]": strategies.just("auto") | names,
    }[key.kind]


@settings(max_examples=200, deadline=None)
@given(strategies.sampled_from(sorted(KEYS)), strategies.data())
def test_any_value_of_any_key_is_the_same_from_file_environment_and_flag(tmp_path_factory, name: str, data) -> None:
    """And written to a file and read again. A value that the rest of the settings does not allow is refused by each alike."""
    key = KEYS[name]
    try:
        value = key.read(data.draw(values_of(key)))
    except Unfit:
        reject()
    text = (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
    path = tmp_path_factory.mktemp("any") / "config.yaml"
    path.write_text(yaml.safe_dump({key.group: {name: list(value) if isinstance(value, tuple) else value}}), encoding="utf-8")
    ways = [{"file": path}, {"argv": [f"--{name}={text}"]}]
    if key.env and text:  # an empty variable counts as none
        ways.append({"environ": {key.env: text}})
    found = []
    for way in ways:
        try:
            found.append(load(*way.get("argv", ()), environ=way.get("environ"), file=way.get("file", NO_FILE)).config)
        except UserError as error:
            found.append(name in str(error))
    assert all(config == found[0] for config in found), found
    if found[0] is True:
        reject()
    wanted = tuple(sorted({*value, 10})) if name == "top_k" else value  # the competition's 10 is always among them
    assert getattr(getattr(found[0], key.group), name) == wanted
    path.write_text(dump_yaml(found[0]), encoding="utf-8")
    assert load(file=path).config == found[0]


TEXTS = ["no", "Null", "~", "./cache", "cuda:0", "a: b", "a #b", "中文", "1e3", "", " x", "x:", '"', "\\", "a\nb", "\udcff", "🙂"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text: str, write) -> None:
    config = with_values(Config(), log_path=text)
    assert load(file=write(dump_yaml(config))).config == config


def test_write_config(write, tmp_path: Path) -> None:
    """Mirrors config.py and the flags given; a faulty file is no hindrance, and is kept."""
    path = write("modle: 3\n", "mine.yaml")
    parsed = load("--config", str(path), "--write_config", "--lr", "0.5", environ={"BATCH_SIZE": "3", "NUM_HEADS": "x"})
    assert write_config(parsed) == path
    assert path.read_text() == dump_yaml(with_values(Config(), learning_rate=0.5))
    assert Path(f"{path}.bak").read_text() == "modle: 3\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "mine.yaml.bak"]
    write_config(parsed)
    assert Path(f"{path}.bak").read_text() == "modle: 3\n"
    new = tmp_path / "new.yaml"
    assert write_config(load("--config", str(new), "--write_config")) == new and new.read_text() == dump_yaml(Config())


def test_print_config_is_yaml_with_origins(write) -> None:
    parsed = load("--lr", "0.5", environ={"BATCH_SIZE": "3"}, file=write("model:\n  num_blocks: 4\n"))
    text = print_config(parsed)
    assert re.search(r"^  learning_rate: 0\.5 +# flag --lr$", text, re.MULTILINE)
    assert re.search(r"^  batch_size: 3 +# environment BATCH_SIZE$", text, re.MULTILINE)
    assert re.search(r"^  num_blocks: 4 +# config\.yaml:2$", text, re.MULTILINE)
    assert re.search(r"^  num_heads: 2 +# default$", text, re.MULTILINE)
    assert load(file=write(text)).config == parsed.config


def test_help() -> None:
    text = help_text()
    assert max(map(len, text.splitlines())) < 140 and "\x1b" not in text and text.isascii()
    assert text.index("examples:") < text.index("options")
    examples = re.findall(r"^  python main\.py (.*)$", text, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        load(*example.replace("configs/", f"{ROOT}/configs/").split())
    assert re.findall(r"^([a-z]+): ", text, re.MULTILINE)[1:] == list(GROUPS)  # the first is "usage"
    flags = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert [flag for flag in flags if flag in KEYS] == list(KEYS)
    options = "config resume resume_path state_dict_path inference_only estimate doctor json dry_run allow_other_data overwrite debug "
    options += "write_config print_config help"
    assert [flag for flag in flags if flag not in KEYS] == options.split()
    flat = " ".join(text.split())
    for group, cls in GROUPS.items():
        assert all(" ".join(key.describe().split()) + " Default: " in flat for key in keys_of(group, cls)), group


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_flag(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--nonsense", flag)
    assert caught.value.code == 0 and capsys.readouterr().out == help_text() + "\n"


# ---- the files under configs/ ----


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_configs_load_and_have_no_idle_key(path: Path) -> None:
    parsed = load("--config", str(path))
    assert warnings_for(parsed.config) == []


def test_baseline_is_the_organisers_setting() -> None:
    config = load("--config", str(ROOT / "configs" / "baseline.yaml")).config
    model, training = config.model, config.training
    assert (model.hidden_units, model.num_blocks, model.num_heads, model.max_seq_length, model.dropout_rate) == (32, 1, 1, 100, 0.2)
    assert (training.batch_size, training.learning_rate, training.optimizer) == (128, 1e-3, "adam")
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.98)
    assert (training.num_epochs, training.l2_emb, training.lr_scheduler, training.gradient_clip) == (3, 0.0, "constant", 0.0)
    assert (config.loss.name, config.loss.num_negatives, model.similarity, model.norm_first) == ("bce", 1, "dot", False)
    assert model.item_activation == "relu" and model.candidate_activation and model.user_id and not model.time_features


def test_public_is_leave_one_out_without_seen_items() -> None:
    evaluation = load("--config", str(ROOT / "configs" / "public.yaml")).config.eval
    assert evaluation.protocol == "leave_one_out" and evaluation.remove_seen and evaluation.candidates == "all"
