#!/usr/bin/env bash
# Expected: an added token gets the id that tokenizer.json gives it: each entry of "added_tokens"
# has a field "id".
#
# Happens: for a content that is not in the vocabulary the id in the file is not used. Tokens are
# numbered in their order in the list, from the size of the vocabulary on. Two tokens listed in the
# other order swap their ids, and ids behind a gap move down into it. Nothing is raised or warned
# of.
#
# Why it matters for serving: a tokenizer whose vocabulary was cut, or whose file was written or
# sorted by another tool, encodes its turn markers to ids that the model knows as something else:
# the chat never ends, and decoding the true id gives an empty string.
#
# Versions: tokenizers 0.23.3 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check tokenizers==0.23.3 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import json
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("tokenizers", tokenizers.__version__)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
base = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
base.decoder = decoders.ByteLevel()
spec = json.loads(base.to_str())
flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def ids(listed):
    spec["added_tokens"] = [dict(id=i, content=content, **flags) for content, i in listed]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    got = [(content, tokenizer.token_to_id(content)) for content, _ in listed]
    print(f"file: {listed}")
    print(f"   -> {got}; encode: {tokenizer.encode(listed[0][0]).ids};"
          f" decode({listed[0][1]}):"
          f" {tokenizer.decode([listed[0][1]], skip_special_tokens=False)!r}")
    return [i for _, i in got]


print("vocabulary: ids 0 to 255")
usual = ids([("<|user|>", 256), ("<|end|>", 257)])
swapped = ids([("<|end|>", 257), ("<|user|>", 256)])
gap = ids([("<|user|>", 300), ("<|end|>", 310)])
holds = usual == [256, 257] and swapped == [256, 257] and gap == [256, 257]
print("ids of added tokens come from their order, not from the file" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
