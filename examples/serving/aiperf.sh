#!/bin/sh
# Load by NVIDIA's aiperf (0.13): chats with synthetic prompts against a running server, by default
# that of `make serve`. Results are in results/aiperf/profile_export_aiperf.json.
#
#     pip install aiperf
#     examples/serving/aiperf.sh
#     URL=http://host:8000 MODEL=name TOKENIZER=owner/name examples/serving/aiperf.sh
#
# The tokenizer has to be a name on Hugging Face's hub or in its cache: a folder is not taken. aiperf's
# inter_token_latency is a mean of each request, which docs/metrics.md calls TPOT. What the server has
# measured itself is printed at the end.
set -eu

URL="${URL:-http://127.0.0.1:8000}"
python3 "$(dirname "$0")/own_numbers.py" "$URL" aiperf profile --url "$URL" \
    --model "${MODEL:-smollm2-135m-instruct}" \
    --tokenizer "${TOKENIZER:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    --endpoint-type chat --streaming --use-server-token-count \
    --synthetic-input-tokens-mean 128 --output-tokens-mean 32 \
    --concurrency 4 --request-count 64 \
    --extra-inputs ignore_eos:true --extra-inputs temperature:0 \
    --output-artifact-dir results/aiperf --ui none
