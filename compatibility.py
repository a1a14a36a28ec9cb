"""Whether a checkpoint fits the present settings and data: to start from, to evaluate, to go on with. Must not load or train anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config import Config
from errors import UserError
from features import TableLayout, known_items_digest
from model import heads_of

# Settings that decide which samples form which batch: a run that goes on with others would repeat or lose users.
ORDER_SETTINGS = (
    *("seed", "batch_size", "accumulate_steps", "length_buckets", "targets_per_sample", "max_seq_length", "protocol", "holdout_fraction"),
)
OPTIMIZER_SETTINGS = ("optimizer", "table_optimizer", "ema_decay")
# Settings that change neither losses nor metrics, so that a resumed run need not say that they changed.
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
    if meta["layout"] != layout.to_list():
        different.append("the data: other features, or other numbers of items, users or values")
    if meta["embeddings"] != list(embeddings):
        different.append(f"multimodal_features: {meta['embeddings']} there, {list(embeddings)} here")
    if different:
        raise UserError(f"{path}: a checkpoint of another model ({'; '.join(different)}).\nGive its settings, or another checkpoint.")


def check_items(meta: dict, store, path: Path) -> None:
    """UserError where the checkpoint's item numbers mean other items than the store's. Quick where it is the store of the training."""
    if meta["store"] != store.manifest["fingerprint"] and meta["item_ids"] != known_items_digest(store):
        raise UserError(
            f"{path}: trained on {meta['num_items']:,} items of other creative ids: an item's number means another one in these data.\n"
            "Give data of the same data set, or --allow_other_data to take it all the same."
        )


def changed_since(meta: dict, config: Config, store, path: Path) -> Iterator[str]:
    """What a run that goes on with a checkpoint has to say of data and settings that changed since, a line each.

    UserError where going on would not be the same run: other users, another order of them, other optimisers.
    """
    sizes = {"users": (meta["num_users"], store.num_users), "events": (meta["num_events"], store.num_events)}
    for name, (there, here) in sizes.items():
        if there != here:  # the split is drawn anew from the users: some held out before would be trained on
            raise UserError(
                f"--resume: {path} was trained on {there:,} {name}, the data now holds {here:,}.\n"
                "Give the run's own data, or start a new run from its weights with --state_dict_path."
            )
    check_items(meta, store, path)
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
    if changed:
        texts = [f"{key} {_shown(saved.get(key))} -> {_shown(config.get(key))}" for key in changed]
        yield f"settings changed since {path.name}: {', '.join(texts)}. The run goes on with the new ones."


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
