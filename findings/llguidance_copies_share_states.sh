#!/usr/bin/env bash
# Expected: LLMatcher.deep_copy makes a matcher that has nothing in common with the first, as its name
# says. Matchers cost a compilation, so a server compiles a grammar once and copies it for each answer.
#
# Happens: the copies share the states of their lexer, and with them the bound max_lexer_states. One
# answer that comes to the bound ends the others: a copy made before it, which stands at its beginning,
# refuses its first character, though the same text is taken by a matcher of the same grammar that was
# compiled again. What the copies see depends on which of them came first.
#
# Why it matters for serving: a client's text decides whether the answers of others, of the same form,
# can go on. A compilation for each answer (a millisecond for usual schemas) keeps them apart.
#
# Versions: llguidance 1.9.1 on Python 3.11 and 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check llguidance==1.9.1 || exit 2
cd "$folder"

cat >copies.py <<'PY'
import random
import sys
from importlib.metadata import version

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

tokenizer = LLTokenizer("byte")
grammar = LLMatcher.grammar_from_regex("[ab]*a[ab]{9}c")


def compiled():
    limits = LLParserLimits(max_lexer_states=200)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def taken(matcher, text):
    """How many characters it takes; a mask is worked out before each, as a sampler does."""
    for i, token in enumerate(tokenizer.tokenize_str(text)):
        matcher.compute_bitmask()
        if not matcher.consume_token(token):
            print("   stopped by:", matcher.get_error().splitlines()[0])
            return i
    return len(text)


random.seed(0)
long, short = "".join(random.choices("ab", k=1000)), "ab" * 20
print("llguidance", version("llguidance"))
print("of", len(short), "characters a matcher takes", alone := taken(compiled(), short))
first = compiled()
copy = first.deep_copy()
print("of 1000 others a second matcher takes", taken(first, long))
print("of the 40 its copy, made before, takes", copied := taken(copy, short))
print("and a matcher that is compiled again", again := taken(compiled(), short))
sys.exit(0 if (alone, copied, again) == (40, 0, 40) else 1)
PY
if "$folder/venv/bin/python" copies.py; then
    echo "copies of a matcher share their lexer's states, and the bound of them"
else
    echo CHANGED
    exit 1
fi
