"""Whether a checkpoint fits the present settings and data: to start from, to evaluate, to go on with. Must not load or train anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

import blas
import parallel
from config import Config
from errors import UserError
from features import TableLayout, known_items_digest
from kernels import usable_numba
from model import heads_of

# Settings that decide which samples form which batch: a run that goes on with others would repeat or lose users.
ORDER_SETTINGS = tuple(
    "seed batch_size accumulate_steps length_buckets targets_per_sample max_seq_length protocol holdout_fraction".split()
)
OPTIMIZER_SETTINGS = ("optimizer", "table_optimizer", "ema_decay")
OTHER_ROWS = "the same features in another order or other widths"
MOST_NAMED = 3  # features of other data in a refusal
# Settings that change neither losses nor metrics, so that a resumed run need not say that they changed. What device and num_threads lead to
# is compared by itself: see computed_on.
FREE_SETTINGS = frozenset(
    "num_workers prefetch_batches chunk_size max_bad_lines device num_threads log_every_steps tensorboard run_name keep_last_k "
    "save_every_steps save_frequency gradient_checkpointing baselines eval_batch_size multimodal_features "
    "tensorboard_histograms projector_items".split()
)


def check_compatible(meta: dict, config: Config, layout: TableLayout, embeddings: tuple[str, ...], path: Path) -> None:
    """UserError where a checkpoint's model settings or table do not fit; names each difference."""
    # What a setting that came later than the checkpoint would have been then: its default.
    then = Config.from_dict(meta["config"], f"{path}/meta.json")
    saved, present = then.to_dict()["model"], config.to_dict()["model"]
    different = [f"{key}: {saved[key]} there, {value} here" for key, value in present.items() if saved[key] != value]
    if (then.loss.action_head_weight > 0) != (config.loss.action_head_weight > 0):
        different.append(f"action_head_weight: {then.loss.action_head_weight} there, {config.loss.action_head_weight} here")
    if (heads_of(then.loss)["temperature"] > 0) != (heads_of(config.loss)["temperature"] > 0):
        different.append(f"learn_temperature: {then.loss.learn_temperature} there, {config.loss.learn_temperature} here")
    if meta["embeddings"] != list(embeddings):
        different.append(f"multimodal_features: {meta['embeddings']} there, {list(embeddings)} here")
    data = layout_differences(meta["layout"], layout.to_list())
    if different and data[:1] == [OTHER_ROWS]:
        data = []  # that is what the settings above make of the same features
    if different or data:
        what, its = ("another model", "settings and data" if data else "settings") if different else ("other data", "data")
        raise UserError(f"{path}: a checkpoint of {what} ({'; '.join(different + data)}).\nGive its {its}, or another checkpoint.")


def layout_differences(there: list[dict], here: list[dict]) -> list[str]:
    """How a checkpoint's table (TableLayout.to_list) differs from the data's: a text a feature, of more than MOST_NAMED their number."""
    old, new = ({row["name"]: row for row in rows} for rows in (there, here))
    found = []
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            places = ("checkpoint", "data") if name in old else ("data", "checkpoint")
            found.append(f"{name}: in the {places[0]}, not in the {places[1]}")
        elif (a := old[name]["values"]) != (b := new[name]["values"]):
            found.append(f"{name}: {a:,} values in the checkpoint, {b:,} in the data")
        elif changed := [key for key in ("side", "kind") if old[name][key] != new[name][key]]:
            found.append(f"{name}: {old[name][changed[0]]} in the checkpoint, {new[name][changed[0]]} in the data")
    if not found and there != here:
        return [OTHER_ROWS]
    return found[:MOST_NAMED] + ([f"and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else [])


def _other_items(meta: dict, store) -> str:
    """What is to be said where the checkpoint's item numbers mean other items than the store's, else "".

    Quick where it is the store of the training.
    """
    if meta["store"] == store.manifest["fingerprint"] or meta["item_ids"] == known_items_digest(store):
        return ""
    return f"trained on {meta['num_items']:,} items of other creative ids"


def check_items(meta: dict, store, path: Path) -> None:
    """UserError where the checkpoint's item numbers mean other items than the store's."""
    if other := _other_items(meta, store):
        raise UserError(
            f"{path}: {other}: an item's number means another one in these data.\n"
            "Give data of the same data set, or --allow_other_data to take it all the same."
        )


def computed_on(device: torch.device) -> dict[str, str | int | bool]:
    """What the bits of a run depend on besides its settings and data; a checkpoint notes it."""
    if device.type == "cuda":
        return {"torch": str(torch.__version__), "device": torch.cuda.get_device_name(device)}
    return {
        "torch": str(torch.__version__),  # whose own class compares versions, not text
        "device": str(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": max(torch.get_num_threads(), parallel.num_threads()),  # within parallel.cores torch's own are fewer
        "numba": usable_numba() is not None,  # dropout's masks are of another kind without it
        "products": blas.library(),
    }


def other_bits(meta: dict, device: torch.device) -> str:
    """A line where a run that goes on with the checkpoint computes on something else than it did then, "" where all is equal.

    What an older checkpoint does not note is not compared.
    """
    changed = []
    for key, now in computed_on(device).items():
        if (then := meta.get(key, now)) != now:
            then, now = (("not there", "there")[value] if key == "numba" else value for value in (then, now))
            changed.append(f"{key.replace('cpu_', 'CPU ')} {then} then, {now} now")
    return f"goes on, bit for bit no longer promised: {'; '.join(changed)}" if changed else ""


def changed_since(meta: dict, config: Config, store, path: Path, device: torch.device, allow_other_data: bool = False) -> Iterator[str]:
    """What a run that goes on with a checkpoint has to say of data and settings that changed since, a line each.

    UserError where going on would not be the same run: other users, another order of them, other optimisers; and where the items are
    others, unless allow_other_data.
    """
    sizes = {"users": (meta["num_users"], store.num_users), "events": (meta["num_events"], store.num_events)}
    for name, (there, here) in sizes.items():
        if there != here:  # the split is drawn anew from the users: some held out before would be trained on
            raise UserError(
                f"--resume: {path} was trained on {there:,} {name}, the data now holds {here:,}.\n"
                "Give the run's own data, or start a new run from its weights with --state_dict_path."
            )
    if not allow_other_data:
        check_items(meta, store, path)
    elif other := _other_items(meta, store):
        yield f"--allow_other_data: {path.name} was {other}; going on."
    if meta["store"] != store.manifest["fingerprint"]:
        yield f"the data's files are not the ones that {path.name} was trained on, but as many users and events; going on."
    # What a setting that came later than the checkpoint would have been then: its default.
    saved = Config.from_dict(meta["config"], f"{path}/meta.json")
    tree = config.to_dict()
    keys = [key for group in ("training", "loss", "data", "eval", "system") for key in tree[group] if key not in FREE_SETTINGS]
    changed = [key for key in keys if saved.get(key) != config.get(key)]
    if refused := [key for key in (*ORDER_SETTINGS, *OPTIMIZER_SETTINGS) if key in changed]:
        raise UserError(
            f"--resume: {', '.join(refused)} differ from the checkpoint's ({path}): it would not be the same run.\n"
            "Give the run's own settings, or start anew from its weights with --state_dict_path."
        )
    if bits := other_bits(meta, device):
        yield bits
    if changed:
        texts = [f"{key} {_shown(saved.get(key))} -> {_shown(config.get(key))}" for key in changed]
        yield f"settings changed since {path.name}: {', '.join(texts)}. The run goes on with the new ones."


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
