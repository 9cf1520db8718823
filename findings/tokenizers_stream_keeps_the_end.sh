#!/usr/bin/env bash
# Expected: the pieces of tokenizers' DecodeStream add up to the text of decode, at the latest with
# the last token.
#
# Happens: a piece that ends with U+FFFD is held back, as it may be half a character, and there is
# no call that ends the stream and gives what is held. An answer cut inside a character loses its
# end, and so does one that really ends with the character U+FFFD. Bytes that never make a character
# are held for as long as they come.
#
# Why it matters for serving: with max_tokens a cut inside an emoji is common. The streamed text
# then differs from the text of the same request without streaming, and a model that falls into
# broken bytes looks hung instead of sending replacement characters.
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
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

print("tokenizers", tokenizers.__version__)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
fire, accent = tokenizer.encode("ok \U0001f525").ids, tokenizer.encode("é").ids
cases = {
    "whole": fire,
    "cut inside the emoji": fire[:-1],
    "ends with the character U+FFFD": tokenizer.encode("ok \ufffd").ids,
    "20 second halves of a character": accent[1:] * 20,
}
seen = {}
for name, ids in cases.items():
    stream = DecodeStream()
    streamed = "".join(stream.step(tokenizer, i) or "" for i in ids)
    seen[name] = streamed, tokenizer.decode(ids)
    print(f"{name}: streamed {ascii(streamed)}, decode {ascii(seen[name][1])}")
methods = [name for name in dir(DecodeStream) if not name.startswith("_")]
print("public methods of DecodeStream:", methods)
holds = [streamed == whole for streamed, whole in seen.values()] == [True, False, False, False]
holds = holds and methods == ["step"] and [s for s, _ in seen.values()][1:] == ["ok ", "ok ", ""]
print("a stream never gives the end that it holds back" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
