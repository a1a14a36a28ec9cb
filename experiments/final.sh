#!/usr/bin/env bash
# The default settings against configs/baseline.yaml, item-to-item and the planted ceiling, on 100,000 users; some 25 minutes on 2 cores.
#   bash experiments/final.sh OUT [flags of both runs]
set -euo pipefail
cd "$(dirname "$0")/.."
out="$1"
shift
[ -e "$out/data-eval/truth.json" ] || python synthetic.py "$out/data" --users 100000 --items 478000 --layout parquet --predict 10000 --seed 7
for name in baseline default; do
    config=configs/baseline.yaml
    [ "$name" = baseline ] || config=config.yaml
    [ -e "$out/$name/log/metrics.json" ] || python main.py --config "$config" --data_path "$out/data" --cache_path "$out/cache" \
        --log_path "$out/$name/log" --checkpoint_path "$out/$name/checkpoints" --no-tensorboard --resume "$@"
    MODEL_OUTPUT_PATH="$out/$name/checkpoints" EVAL_DATA_PATH="$out/data-eval" EVAL_RESULT_PATH="$out/$name/result" USER_CACHE_PATH="$out/cache" \
        python infer.py --output "$out/$name.json"
done
python experiments/check_infer.py "$out/data" "$out/baseline.json" "$out/default.json" --cache_path "$out/cache"
