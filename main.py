"""The main job: settings -> store -> training -> evaluation on the test split -> report; or the evaluation of a checkpoint.

python main.py                                    train with config.yaml, on demo data where no data is given
python main.py --batch_size 64 --lr 0.0005        settings by flag (--help lists them)
python main.py --doctor                           what is wrong with data, paths, settings or machine, and what to do
python main.py --dry_run                          everything up to one update and one batch of the evaluation; keeps no file
python main.py --estimate                         how much memory and disk that takes, and whether it fits
python main.py --resume                           go on with the newest unfinished run
python main.py --inference_only --state_dict_path checkpoints/RUN/best_model.pt
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint as checkpoints
from atomic import put_folder, sweep, temporary_folder
from board import write_start
from compatibility import check_compatible, check_items
from config import Config, warnings_for, with_values
from dataset import make_splits
from doctor import as_json, examine, lines
from doctor_findings import FAIL, Finding
from doctor_machine import check_paths
from dry_run import try_out
from ensemble import Member, read_ensemble
from errors import RunError, UserError, at_most, run_cli, terminable
from estimate import Data, estimate_run
from evaluate import Ranker
from features import TableLayout, choose_embeddings
from final_test import note_data, run_test, write_test_metrics
from logger import RunLogger, peak_rss_gib
from machine import scratch_near, torch_warning
from report import write_report
from runs import RunPaths, environment, prepare_eval, prepare_run, read_status, restore_status, write_start_files, write_status
from settings import Options, ParsedArguments, dump_yaml, load_config, print_config, write_config
from sources import find_source
from store import Store, has_embedding, is_compiled, open_store
from trainer import Trainer

DEMO_FOLDER = Path("demo_data")
DEMO = {"users": 4000, "items": 6000, "seed": 1}  # trains within a minute or two on two cores and beats the baselines clearly

REPORT_SECONDS = 4.0  # for the report of a run that was stopped: whoever sent the signal waits ten for all of it


def main() -> int:
    try:
        arguments = load_config(sys.argv[1:])
    except UserError as error:
        if "--doctor" not in sys.argv:
            raise
        return show_findings([Finding(FAIL, "settings.value", line) for line in str(error).splitlines()], as_tree="--json" in sys.argv)
    options = arguments.options
    check_options(options)
    if options.write_config:
        print(f"written: {write_config(arguments)}")
        return 0
    if options.print_config:
        print(print_config(arguments))
        return 0
    if options.doctor:
        return doctor(arguments)
    if options.estimate:
        return estimate(arguments)
    if options.dry_run:
        with terminable():
            return dry_run(arguments)
    if options.inference_only:
        if options.state_dict_path is None:
            raise UserError("--inference_only evaluates a checkpoint: name it with --state_dict_path.")
        return evaluate_checkpoint(arguments)
    with terminable():
        return train(arguments)


# Each of these does something and stops, so that of two given at once one would be swallowed.
INSTEAD = ("write_config", "print_config", "doctor", "estimate", "dry_run")


def check_options(options: Options) -> None:
    """UserError for options of which one would have no effect beside the other."""
    if len(asked := [f"--{name}" for name in INSTEAD if getattr(options, name)]) > 1:
        raise UserError(f"{' and '.join(asked)}: each does its own work and stops. Give one of them.")
    if options.json and not options.doctor:
        raise UserError("--json is the form of --doctor's findings: give both.")


def train(arguments: ParsedArguments) -> int:
    """Train, test, report; returns the exit status."""
    config, options = with_demo_data(arguments.config), arguments.options
    device = choose_device(config)
    if config.eval.candidates != "all" and not Path(config.eval.candidates).exists():
        raise UserError(f"eval.candidates: {config.eval.candidates}: no such file or folder. Give predict_set.jsonl, candidate/, or all.")
    if options.state_dict_path is not None:
        checkpoints.find_checkpoint(options.state_dict_path)  # a wrong path is said before anything is made, or removed by --overwrite
    embeddings_of(config)  # so is a wrong data folder
    said: list[str] = []  # before there is a log
    run = prepare_run(
        config.paths,
        run_name=config.system.run_name,
        resume=options.resume,
        resume_path=options.resume_path or "",
        overwrite=options.overwrite,
        log=lambda text: (print(text), said.append(text)),
    )
    logger = open_logger(config, run, resume_step=resume_step(run))
    for text in said:
        if text.startswith(("damaged checkpoint", "set aside")):  # what the disk no longer shows as it was
            logger.note(text, console=False)
    step, refused = resume_step(run) or 0, bool(run.before)
    try:
        banner(logger, arguments, config, run, device)
        trainer = build_trainer(config, run, logger, device)
        trainer.take_up(options.allow_other_data)
        if options.state_dict_path is not None and run.resume_from is None:
            load_weights(trainer, options)
        refused = False
        if run.continued and trainer.has_ended():  # the settings that the run was trained with are those it is known by
            logger.say(nothing_left(trainer))
        else:
            write_start_files(run.log_dir, dump_yaml(config), sys.argv, environment() | used_device(device))
            logger.draw(lambda writer: write_start(writer, dump_yaml(config)))
            note_data(trainer)
        logger.total_steps = trainer.total_steps
        try:
            trainer.fit()
        finally:
            step = trainer.step
            logger.end_bar()
        if trainer.stop_signal:
            write_status(run.log_dir, "interrupted", step, f"signal {trainer.stop_signal}")
            report_early_end(run, logger)
            logger.say(f"interrupted at step {step}; checkpoint written. Go on with: {same_command('--resume')}")
            return 128 + trainer.stop_signal
        metrics = run_test(trainer)
        write_status(run.log_dir, "finished", step)
        report = write_report(run.log_dir)
        say_what_next(logger, run, trainer, metrics, report)
        return 0
    except UserError as error:
        if refused:
            restore_status(run)
        else:
            note_failure(run, logger, step, error)
        raise
    except BaseException as error:
        note_failure(run, logger, step, error)
        raise
    finally:
        logger.close()


def estimate(arguments: ParsedArguments) -> int:
    """--estimate: what the run would take; status 0 where it fits, 1 where it does not. Writes nothing but the store (and demo data)."""
    config = with_demo_data(arguments.config)
    found = estimate_run(config, lambda: open_data(config, print), choose_device(config))
    print(found.text())
    return 1 if found.lacking() else 0


def doctor(arguments: ParsedArguments) -> int:
    """--doctor: a line a check; status 1 where one fails. Writes nothing but the store (and demo data)."""
    opened = lambda config, log: open_data(with_demo_data(config), log, verify_all=True)
    found = examine(arguments, opened, choose_device, environ=dict(os.environ))
    return show_findings(found, as_tree=arguments.options.json)


def show_findings(found: list[Finding], *, as_tree: bool) -> int:
    print(as_json(found) if as_tree else "\n".join(lines(found)))
    return 1 if any(finding.level == FAIL for finding in found) else 0


def dry_run(arguments: ParsedArguments) -> int:
    """--dry_run: settings, store, model, one update, one batch of the evaluation, all files in a folder that is removed."""
    config, options = arguments.config, arguments.options
    if options.resume or options.resume_path or options.inference_only:
        raise UserError("--dry_run tries a new run: leave --resume, --resume_path and --inference_only away.")
    if wrong := [f"{found.text}; {found.remedy}." for found in check_paths(arguments) if found.level == FAIL]:
        raise UserError("\n".join(wrong))
    with scratch_near(Path(config.paths.cache_path)) as scratch:
        config = with_demo_data(config, DEMO_FOLDER if DEMO_FOLDER.exists() else scratch / DEMO_FOLDER)
        told = {"embeddings": embeddings_of(config), "max_bad_lines": config.data.max_bad_lines}
        if not is_compiled(config.paths.data_path, config.paths.cache_path, **told):
            config = with_values(config, cache_path=str(scratch / "cache"))
        run = RunPaths(scratch / "log", scratch / "events", scratch / "checkpoints", "dry run")
        run.log_dir.mkdir()
        logger = open_logger(config, run, tensorboard=False)
        try:
            device = choose_device(config)
            banner(logger, arguments, config, run, device)
            trainer = build_trainer(config, run, logger, device)
            if options.state_dict_path is not None:
                load_weights(trainer, options)
            logger.banner("dry run", try_out(trainer))
        finally:
            logger.close()
    print(f"the dry run went well and left no file. Train with: {same_command()}")
    return 0


def evaluate_checkpoint(arguments: ParsedArguments) -> int:
    """--inference_only: the checkpoint's model on the test split of the present data and evaluation settings."""
    ensemble = read_ensemble(arguments.options.state_dict_path)
    loaded, others = ensemble.members[0].checkpoint, ensemble.members[1:]
    config = with_demo_data(settings_of_checkpoint(arguments, loaded.meta, loaded.path))
    device = choose_device(config)
    run = prepare_eval(config.paths, run_name=config.system.run_name)
    logger = open_logger(config, run, tensorboard=False)
    try:
        banner(logger, arguments, config, run, device)
        trainer = build_trainer(config, run, logger, device)
        with checkpoints.fits(loaded.path):
            check_checkpoint(loaded.meta, loaded.path, config, trainer, arguments.options)
            trainer.load_weights(loaded.model_state)
            same_users = trainer.store.num_users == loaded.meta["num_users"]
        if not same_users:
            logger.warn_once(
                f"the data holds {trainer.store.num_users:,} users, the checkpoint was trained on a set of {loaded.meta['num_users']:,}: "
                "users that it was trained on may be among those it is tested on."
            )
        write_start_files(run.log_dir, dump_yaml(config), sys.argv, environment() | used_device(device))
        if others:
            rankers = [ranker_of_member(arguments, member, trainer) for member in others]
            trainer.ranker_of = lambda ranker: ensemble.ranker([ranker, *rankers])
            logger.say(f"ensemble of {1 + len(others)} models, scores combined by {ensemble.scores}")
        write_test_metrics(trainer, loaded._replace(path=ensemble.path))
        write_status(run.log_dir, "finished", loaded.meta["step"])
        logger.say(f"metrics: {run.log_dir / 'metrics.json'}; report: {write_report(run.log_dir)}")
        return 0
    except BaseException as error:
        note_failure(run, logger, 0, error)
        raise
    finally:
        logger.close()


def note_failure(run: RunPaths, logger: RunLogger, step: int, error: BaseException) -> None:
    """Status and report of a run that ends with this error. One that was finished stays so: its report alone is missing."""
    if read_status(run.log_dir).get("state") != "finished":
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        write_status(run.log_dir, state, step, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        report_early_end(run, logger)


def report_early_end(run: RunPaths, logger: RunLogger) -> None:
    """report.html of a run that did not come to its test. Whatever fails here must not stand before the run's own error, which follows."""
    try:
        with at_most(REPORT_SECONDS):
            report = write_report(run.log_dir)
    except (RunError, KeyboardInterrupt):  # a full disk has been said, and who sends a second signal does not wait for a report
        return
    except Exception as failure:
        what = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        logger.say(f"no report was written ({what}). Try: python report.py {shlex.quote(str(run.log_dir))}")
        return
    logger.say(f"report: {report}")


def ranker_of_member(arguments: ParsedArguments, member: Member, trainer: Trainer) -> Ranker:
    """A further member of an ensemble as a ranker of the trainer's candidates, on its own view of the same data.

    UserError where it was trained on users that the first member held out.
    """
    config = with_demo_data(settings_of_checkpoint(arguments, member.meta, member.path))
    held_out = SPLIT_SETTINGS if config.eval.protocol == "holdout" else SPLIT_SETTINGS[:1]
    different = [
        f"{key}: {trainer.config.get(key)} there, {config.get(key)} here" for key in held_out if trainer.config.get(key) != config.get(key)
    ]
    if different:
        raise UserError(
            f"{member.path}: other users were held out than for the ensemble's first model ({'; '.join(different)}): "
            "it would be tested on users it was trained on.\nCombine models of one split; inference takes any."
        )
    data = open_data(config, lambda _: None)
    check_checkpoint(member.meta, member.path, config, data, arguments.options)
    options = {"batch_size": config.eval.eval_batch_size, "num_workers": config.data.num_workers}
    return member.ranker(data.store, trainer.candidates, trainer.device, prefetch_batches=config.data.prefetch_batches, **options)


# Settings that a checkpoint brings along besides the model group: they decide which users it has never seen.
SPLIT_SETTINGS = ("protocol", "holdout_fraction", "seed")


def settings_of_checkpoint(arguments: ParsedArguments, meta: dict, path: Path) -> Config:
    """The present settings with the checkpoint's model group, its head, embeddings and split.

    UserError where a flag or the environment contradicts it; what config.yaml says of these gives way to the checkpoint.
    """
    with checkpoints.fits(path / checkpoints.META):
        saved, embeddings = Config.from_dict(meta["config"], f"{path}/meta.json"), meta["embeddings"]
    values = {key: value for key, value in saved.to_dict()["model"].items()} | {key: saved.get(key) for key in SPLIT_SETTINGS}
    values |= {"multimodal_features": embeddings, "action_head_weight": saved.loss.action_head_weight}
    wrong = []
    for key, value in values.items():
        given, origin = arguments.config.get(key), arguments.origins[key]
        given = list(given) if isinstance(given, tuple) else given
        if origin.startswith(("flag", "environment")) and given not in (value, "auto"):
            wrong.append(f"{key} is {given} ({origin}): the checkpoint {path} was trained with {value}. Leave it away.")
    if wrong:
        raise UserError("\n".join(wrong))
    return with_values(arguments.config, **values)


def embeddings_of(config: Config) -> tuple[str, ...]:
    """The embeddings to use; UserError where the data folder lacks one of them, or a file that every run needs."""
    data_path = Path(config.paths.data_path)
    schema = find_source(data_path, "train").schema
    return choose_embeddings(lambda i: has_embedding(data_path, schema[i]), schema, config.data.multimodal_features)


def open_data(config: Config, log: Callable[[str], None], *, verify_all: bool = False) -> Data:
    """Open the store, compiling it where it is missing or damaged, and split it. verify_all: hash files that look unchanged, too."""
    data_path, embeddings = Path(config.paths.data_path), embeddings_of(config)
    told = {"embeddings": embeddings, "max_bad_lines": config.data.max_bad_lines}
    store = open_store(data_path, Path(config.paths.cache_path), **told, log=log, verify_all=verify_all)
    splits = make_splits(
        store,
        protocol=config.eval.protocol,
        holdout_fraction=config.eval.holdout_fraction,
        target=config.eval.target,
        seed=config.system.seed,
        max_eval_users=config.eval.max_eval_users,
    )
    return Data(store, splits, TableLayout.from_store(store, config.model), embeddings)


def build_trainer(config: Config, run: RunPaths, logger: RunLogger, device: torch.device) -> Trainer:
    """Open the data and make the trainer; says what it found."""
    store, splits, layout, embeddings = open_data(config, logger.say)
    data_summary(logger, store, splits, embeddings)
    trainer = Trainer(config, store, layout, embeddings, splits, run, logger, device)
    model_table(logger, trainer)
    return trainer


def with_demo_data(config: Config, folder: Path = DEMO_FOLDER) -> Config:
    """The settings with the demo data's folder where no data was given; it is made on first use. A given path must exist."""
    if config.paths.data_path:
        if not Path(config.paths.data_path).is_dir():
            raise UserError(
                f"data_path: {config.paths.data_path}: no such folder.\nGive TencentGR data, or a set converted by convert.py "
                "(--data_path, TRAIN_DATA_PATH or config.yaml); leave it empty for demo data."
            )
        return config
    sweep(folder.parent, re.escape(folder.name))
    if not folder.exists():
        from synthetic import generate  # only where demo data must be made

        print(f"no data path given: making demo data in {folder}/ ({DEMO['users']:,} users)", flush=True)
        with temporary_folder(folder) as unfinished:
            generate(unfinished / folder.name, layout="jsonl", **DEMO)
            try:
                put_folder(unfinished / folder.name, folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return replace(config, paths=replace(config.paths, data_path=str(folder)))


def choose_device(config: Config) -> torch.device:
    """The device of the settings; UserError for a GPU that is not there or a precision it lacks."""
    name = config.system.device
    if config.system.num_threads:
        torch.set_num_threads(config.system.num_threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device {name}: this machine has no such CUDA device (torch {torch.__version__}).\n"
            "Use --device auto, which takes cuda where there is one."
        )
    return device


def used_device(device: torch.device) -> dict[str, str]:
    """What environment.json says of the device that the run computes on."""
    return {"device": f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)}


def open_logger(config: Config, run: RunPaths, *, resume_step: int | None = None, tensorboard: bool = True) -> RunLogger:
    folder = run.tensorboard_dir if tensorboard and config.system.tensorboard else None
    return RunLogger(run.log_dir, folder, resume_step=resume_step)


def resume_step(run: RunPaths) -> int | None:
    return None if run.resume_from is None else checkpoints.read_meta(checkpoints.find_checkpoint(run.resume_from))["step"]


def check_checkpoint(meta: dict, path: Path, config: Config, data: Data | Trainer, options: Options) -> None:
    """UserError where a checkpoint is of another model, or of other items and --allow_other_data was not given."""
    check_compatible(meta, config, data.layout, data.embeddings, path)
    if not options.allow_other_data:
        check_items(meta, data.store, path)


def load_weights(trainer: Trainer, options: Options) -> None:
    """--state_dict_path without --inference_only: a new run from a checkpoint's weights."""
    loaded = checkpoints.load_checkpoint(options.state_dict_path, with_trainer=False)
    with checkpoints.fits(loaded.path):
        check_checkpoint(loaded.meta, loaded.path, trainer.config, trainer, options)
        trainer.load_weights(loaded.model_state)
    trainer.logger.say(f"weights from {loaded.path} (step {loaded.meta['step']})")


# ---- what the console says ----


def banner(logger: RunLogger, arguments: ParsedArguments, config: Config, run: RunPaths, device: torch.device) -> None:
    from_where = "asked for" if config.system.device != "auto" else ("auto: CUDA found" if device.type == "cuda" else "auto: no CUDA found")
    demo = {"data_path": "demo data, no path was given"} if not arguments.config.paths.data_path else {}
    threads = f"{torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
    rows = [("device", f"{device} ({from_where}), {threads}, {config.training.precision}, torch {torch.__version__}")]
    chosen = {"log_path": run.log_dir, "tensorboard_path": run.tensorboard_dir, "checkpoint_path": run.checkpoint_dir}
    for key in ("data_path", "cache_path", *chosen):
        given = getattr(config.paths, key)
        origin = demo.get(key) or (arguments.origins[key] if given else "chosen")
        rows.append((key, f"{given or chosen[key]}  ({origin})"))
    rows.append(("settings", str(arguments.config_file or "defaults")))
    logger.banner("generative recommender", rows)
    if warning := torch_warning():
        logger.warn_once(warning)
    for warning in warnings_for(config):
        logger.warn_once(warning)


def data_summary(logger: RunLogger, store: Store, splits, embeddings: tuple[str, ...]) -> None:
    rejected = store.summary.get("rejected", 0)
    logger.banner(
        "data",
        [
            ("store", f"{store.path} ({'found in the cache' if store.cache_hit else 'compiled now'})"),
            ("users", f"{store.num_users:,}"),
            ("items", f"{store.num_items:,}"),
            ("events", f"{store.num_events:,}"),
            ("rejected", f"{rejected:,}"),
            ("embeddings", ", ".join(embeddings) or "none"),
            (
                "samples",
                ", ".join(
                    f"{split.num_samples:,} for {name}"
                    for name, split in (("training", splits.train), ("validation", splits.valid), ("test", splits.test))
                ),
            ),
            *(("note", note) for note in splits.notes),
        ],
    )


def model_table(logger: RunLogger, trainer: Trainer) -> None:
    rows = []
    for name, module in trainer.model.named_children():
        count = sum(p.numel() for p in module.parameters())
        if count:
            rows.append((name, type(module).__name__, count, f"{count * 4 / 2**20:.1f} MiB"))
    total = sum(p.numel() for p in trainer.model.parameters())
    logger.table([*rows, ("all", "", total, f"{total * 4 / 2**20:.1f} MiB")], ("part", "kind", "parameters", "memory"), title="model")


def same_command(*more: str) -> str:
    """The command line of this run with other things asked for besides its settings; of a flag given in both, that of `more` stays."""
    dropped = {"--resume", "--resume_path", "--overwrite", "--dry_run"} | {word for word in more if word.startswith("--")}
    kept, keep = [], True
    for word in sys.argv[1:]:
        if word.startswith("--"):
            keep = word.split("=")[0] not in dropped
        if keep:
            kept.append(word)
    return shlex.join(["python", "main.py", *kept, *more])


def nothing_left(trainer: Trainer) -> str:
    """The line of a resumed run that has no step left to train."""
    training, why, keys = trainer.config.training, [], []
    if trainer.step >= trainer.total_steps:
        why.append(f"{trainer.step:,} steps are done and the settings ask for {trainer.total_steps:,}")
        keys.append("max_steps" if training.max_steps else "num_epochs")
    if trainer.out_of_patience():
        why.append(f"the last {trainer.evaluations_since_best} evaluations were no better")
        keys.append("patience")
    raised = " and ".join(f"{key} (now {trainer.config.get(key):,})" for key in keys)
    return f"nothing left to train: {'; '.join(why)}. To go on raise {raised}. config.resolved.yaml stays as it was."


def longer(trainer: Trainer) -> list[str]:
    """The flags of a run that goes on from this one's end for as long again."""
    training = trainer.config.training
    if training.max_steps:
        return ["--max_steps", str(2 * max(training.max_steps, trainer.step))]
    epochs = ["--num_epochs", str(2 * max(training.num_epochs, trainer.epoch))]
    return [*epochs, "--patience", str(2 * trainer.evaluations_since_best)] if trainer.out_of_patience() else epochs


def say_what_next(logger: RunLogger, run: RunPaths, trainer: Trainer, metrics: dict, report: Path) -> None:
    logger.banner(
        "done",
        [
            (metrics["split"], f"HR@10 {metrics['hr@10']:.4f}, NDCG@10 {metrics['ndcg@10']:.4f}, score {metrics['score']:.4f}"),
            ("best checkpoint", run.checkpoint_dir / "best_model.pt"),
            ("metrics", run.log_dir / "metrics.json"),
            ("report", report),
            ("peak memory", f"{peak_rss_gib():.2f} GiB"),
            ("watch", f"tensorboard --logdir {run.tensorboard_dir}"),
            ("train longer", same_command("--resume_path", str(run.checkpoint_dir), *longer(trainer))),
            ("evaluate again", same_command("--inference_only", "--state_dict_path", str(run.checkpoint_dir / "best_model.pt"))),
            ("your own data", "set data_path in config.yaml; USAGE.md tells what the folder holds"),
        ],
    )


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
