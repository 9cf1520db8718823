#!/bin/sh
# Bodies that schemathesis (4) makes of a running server's OpenAPI document: no answer may be a 5xx, have
# an undocumented status or type, or fields of other types than the document says.
#
#     pip install schemathesis
#     examples/serving/schemathesis.sh
#     URL=http://host:8000 EXAMPLES=300 examples/serving/schemathesis.sh
#
# A check is left out: that what the document allows is always taken. What a prompt may hold depends on the
# context, and what one field may say on another. Take a small model: each body that is taken is answered.
set -eu

schemathesis run "${URL:-http://127.0.0.1:8000}/openapi.json" \
    --max-examples "${EXAMPLES:-40}" --continue-on-failure --output-sanitize false \
    --exclude-checks positive_data_acceptance
