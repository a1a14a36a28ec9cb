"""Makes one checkpoint or one ensemble of several checkpoints, for evaluation and inference.

python combine.py average OUT CHECKPOINT CHECKPOINT ...      the mean of their weights, as a checkpoint (one model's, of several steps)
python combine.py ensemble OUT CHECKPOINT CHECKPOINT ...     a folder of several models, whose scores are added up

OUT then serves as MODEL_OUTPUT_PATH of infer.py; for main.py --inference_only give OUT (ensemble) or OUT/best_model.pt (average).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ensemble import SCORES, average_checkpoints, write_ensemble
from errors import ArgumentParser, UserError, run_cli


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("average", "ensemble"))
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="a folder, its model.pt or a link to it")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="ensemble: of each checkpoint; default: all the same")
    parser.add_argument("--scores", choices=SCORES, help="ensemble: how scores are made comparable; softmax (default): each model's own "
                        "logits; zscore: divided by their spread over the candidates, a user at a time")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    if options.kind == "average":
        if options.weights or options.scores:
            raise UserError("--weights and --scores are for an ensemble; a mean of weights has none.")
        print(f"mean of {len(options.checkpoints)} checkpoints: {average_checkpoints(options.out, options.checkpoints)}")
    else:
        out = write_ensemble(options.out, options.checkpoints, options.weights, options.scores or SCORES[0])
        print(f"ensemble of {len(options.checkpoints)} models: {out}")


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
