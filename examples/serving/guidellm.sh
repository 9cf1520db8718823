#!/bin/sh
# Load by guidellm (0.8): completions with synthetic prompts against a running server, by default that
# of `make serve`. Results are in results/guidellm.json.
#
#     pip install guidellm
#     examples/serving/guidellm.sh
#     URL=http://host:8000 TOKENIZER=folder-or-name examples/serving/guidellm.sh
#
# guidellm's time_per_output_token includes the time to the first token; its inter_token_latency is
# what docs/metrics.md calls TPOT. What the server has measured itself is printed at the end.
set -eu

URL="${URL:-http://127.0.0.1:8000}"
mkdir -p results
python3 "$(dirname "$0")/own_numbers.py" "$URL" guidellm run --disable-progress \
    --backend "kind=openai_http,target=$URL,request_format=/v1/completions" \
    --profile kind=throughput,max_concurrency=4 \
    --constraint kind=max_requests,count=64 \
    --tokenizer "kind=hf_auto,model=${TOKENIZER:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    --data kind=synthetic_text,prompt_tokens=128,output_tokens=32 \
    --output kind=json,path=results/guidellm.json
