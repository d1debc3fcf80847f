#!/usr/bin/env bash
# Run the toy grid, two runs at a time, and keep its outcome in results/toy.jsonl: hard, fuzzy and soft
# training with seeds 0 to 4 in six settings, soft training with other noise and seeds 0 to 2, and the
# same with noise in all places on a toy that has more words (results/more_words.py). What has --noise-at
# is run by a copy of softcot.py that knows it (results/noise_elsewhere.diff). What was cut off goes on
# by the same command.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/grid runs/grid-elsewhere
cp softcot.py toy_tasks.py runs/grid-elsewhere
patch -d runs/grid-elsewhere -p1 < results/noise_elsewhere.diff
python -c "import pathlib, toy_tasks; toy_tasks.base_model(pathlib.Path('runs/toy-base'))"
[[ -d runs/grid-words/16000 ]] || python results/more_words.py runs/grid-words

jobs() {
    for seed in 0 1 2 3 4; do
        for cot in soft hard fuzzy; do
            echo "$cot-s$seed --cot $cot --seed $seed --eval-tasks toy toy-large toy-round"
        done
    done
    for seed in 0 1 2; do
        for sigma in 0.1 1 3; do
            echo "soft-sigma$sigma-s$seed --seed $seed --sigma-scale $sigma --eval-settings hard_greedy"
        done
        for where in hidden logits topk-logits; do
            echo "soft-$where-s$seed --seed $seed --noise-at $where --eval-settings hard_greedy"
        done
    done
    more="--task toy --eval-settings hard_greedy --model runs/grid-words"
    for seed in 0 1 2; do
        for words in 16000 4000 1000 0; do
            echo "words$words-logits-s$seed --noise-at logits --seed $seed $more/$words"
        done
        for where in embedding hidden topk-logits; do
            echo "words4000-$where-s$seed --noise-at $where --seed $seed $more/4000"
        done
    done
}
jobs | xargs -P 2 -L 1 bash -c '
    file=softcot.py
    [[ "$*" == *--noise-at* ]] && file=runs/grid-elsewhere/softcot.py
    [[ -f runs/grid/$0/config.json ]] && set -- "$@" --resume
    python $file --threads 1 --out-dir "runs/grid/$0" "$@" > "runs/grid/$0.log" 2>&1'

for run in runs/grid/{soft,hard,fuzzy}-s[0-4]; do
    python results/choices.py "$run" toy-walk
done
python results/pack.py runs/grid/*/ > results/toy.jsonl
python results/claims.py > results/claims.md
