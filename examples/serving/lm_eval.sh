#!/bin/sh
# Scores by lm-evaluation-harness (0.4.13): a running server beside transformers on the CPU, on the
# same weights in float32. Both tables must agree to four digits. The tasks in lm_eval/ are about pages
# of docs/ and the LICENSE, so that no data set is fetched.
#
#     pip install 'lm-eval[api,hf]'
#     pdjax serve --config=configs/smollm2_cpu.py --config.model.source=HuggingFaceTB/SmolLM2-135M-Instruct
#     examples/serving/lm_eval.sh
#     URL=http://host:8000 WEIGHTS=/a/folder MODEL=name examples/serving/lm_eval.sh
#
# WEIGHTS is a name on Hugging Face's hub or a folder. A file of GGUF that was quantised has other
# weights than the model that it was made of.
set -eu
cd "$(dirname "$0")/../.."

weights="${WEIGHTS:-HuggingFaceTB/SmolLM2-135M-Instruct}"
url="${URL:-http://127.0.0.1:8000}"
tasks="--tasks pdjax_pages,pdjax_last_words --include_path examples/serving/lm_eval"
length="max_length=${LENGTH:-511}"

# shellcheck disable=SC2086 # several words
lm_eval --model local-completions --batch_size 4 $tasks --model_args \
    "model=${MODEL:-$weights},base_url=$url/v1/completions,tokenizer=$weights,tokenizer_backend=huggingface,$length"
# shellcheck disable=SC2086
lm_eval --model hf --device cpu $tasks --model_args "pretrained=$weights,dtype=float32,$length"
