"""For any GGUF file, the answer within a second is a model with its tokenizer, or one line that
names what is wrong."""

import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax.device.checkpoints.gguf import GGUFCheckpoint
from pdjax.formats.gguf_file import GGUFFile
from pdjax.formats.gguf_metadata import Metadata
from pdjax.text.gguf_pretokenizers import PRETOKENIZERS
from tests.helpers.gguf_bytes import NUMBERS, encoded, field, tensor, write
from tests.helpers.mutate import FLOATS, TEXTS, answer, cases, integer, mutated
from tests.helpers.tiny_gguf import Q8_0, write_gguf
from tests.helpers.tiny_tokenizer import BYTES
from tests.text.test_tokenizer import SPM_PIECES

Parts = tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]]

VOCABULARY = 101
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*SPECIAL, *BYTES[:90], "!!", "!!!", '!"', "##", "<|user|>"],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 94 + [4],
    "tokenizer.ggml.merges": ["! !", "!! !", '! "', "# #"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
}
PIECES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(80)), *SPM_PIECES]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 83 + list(SPM_PIECES.values()),
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 80 + [1] * len(SPM_PIECES),
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_space_prefix": True,
}
SCALED = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
    "llama.rope.scaling.yarn_beta_fast": 32.0,
    "llama.expert_count": 0,
    "llama.vocab_size": VOCABULARY,
}
KINDS = {"byte_level": BYTE_LEVEL | SCALED, "sentencepiece": SENTENCEPIECE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a file of each kind, which opens."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: write_gguf(folder / f"{name}.gguf", kind=Q8_0, metadata=metadata)
        for name, metadata in KINDS.items()
    }


def use(path: Path) -> None:
    """Open a file, read tensors, encode and decode."""
    checkpoint = GGUFCheckpoint(path)
    tokenizer = checkpoint.tokenizer()
    assert checkpoint.spec.vocab_size == VOCABULARY
    checkpoint.spec.rope.frequencies(checkpoint.spec.head_dim)
    checkpoint.read("model.layers.0.self_attn.q_proj.weight", slice(3, 9), slice(5, 50))
    if tokenizer is None:
        return
    ids = tokenizer.encode("!! a </s>\n 1é")
    assert all(0 <= i < VOCABULARY for i in ids)
    tokenizer.decode([*ids, VOCABULARY - 1])


def parts(path: Path) -> Parts:
    """Read the fields and tensors (shape in GGUF's order, type, bytes) of a file."""
    file = GGUFFile(path)
    meta = Metadata(path, file)
    tensors = {
        name: (entry.shape[::-1], int(entry.kind), file.data(name).tobytes())
        for name, entry in file.tensors.items()
    }
    return {key: meta.get(key) for key in file.fields}, tensors


def assembled(path: Path, fields: list[bytes], tensors: list[tuple[Any, ...]]) -> Path:
    """Write a file of fields and tensors (name, shape, type, bytes, number added to the offset)."""
    index, data = [], b""
    for name, shape, kind, raw, shift in tensors:
        index.append(tensor(name, shape, kind, (len(data) + shift) % (1 << 64)))
        data += raw + bytes(-len(raw) % 32)
    write(path, tuple(fields), tuple(index), data=0)
    with path.open("ab") as file:
        file.write(data)
    return path


def odd_value(draw: random.Random, value: Any) -> Any:
    """Draw another value for a field, sometimes of its own kind."""
    texts = [text for text in TEXTS if text.isascii()]
    whole_numbers = [max(integer(draw) % (1 << 64), 0), -draw.randrange(1 << 40)]
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice(whole_numbers),
        lambda: draw.choice(FLOATS[:-3]),
        lambda: draw.choice((True, False)),
        lambda: draw.choice([*texts, *PRETOKENIZERS, "yarn", "none", "linear", "llama", "gpt2"]),
        lambda: draw.choice((b"\xff", b"\x00", b"\xe2\x96")),
        lambda: [draw.randrange(1 << 31) for _ in range(draw.randrange(4))],
        lambda: draw.choices(texts, k=draw.randrange(1, 4)),
    ]
    if isinstance(value, list):
        kinds = [lambda: odd_list(draw, value)] * 6 + kinds
    elif isinstance(value, int | float):
        kinds += [lambda: value + draw.choice((1, -1, 2)) if value else 1] * 3
    return draw.choice(kinds)()


def odd_list(draw: random.Random, value: list[Any]) -> list[Any]:
    """Drop, double, move or change items of a list."""
    made = list(value)
    at = draw.randrange(len(made)) if made else 0
    match draw.randrange(7):
        case 0:
            return made[:at]
        case 1:
            return made + made[at:]
        case 2:
            draw.shuffle(made)
        case 3 if made:
            made[at] = made[draw.randrange(len(made))]
        case 4 if made and isinstance(made[0], str):
            made[at] = draw.choice(
                ("", " ", "a b", "<0x41>", "▁", "<|im_end|>", "é" * 5000, b"\xff")
            )
        case 5 if made and isinstance(made[0], float):
            made[at] = draw.choice((float("nan"), float("inf"), -1e30, 0.0))
        case 6 if made and isinstance(made[0], int):
            made[at] = draw.choice((0, 1, 3, 6, 7, 255, (1 << 32) - 1))
        case _:
            made = made[at:] or made
    return made


def test_the_files_open(whole: dict[str, Path]):
    for path in whole.values():
        assert answer(partial(use, path)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_cut_and_overwritten_bytes(kind: str, whole: dict[str, Path], tmp_path: Path):
    data = whole[kind].read_bytes()
    index = min(entry.start for entry in GGUFFile(whole[kind]).tensors.values())
    path = tmp_path / "m.gguf"
    for seed in cases(70):
        path.write_bytes(mutated(data[:index], random.Random(seed)) + data[index:])
        answer(lambda: use(path))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_index_that_are_absurd(kind: str, whole: dict[str, Path], tmp_path: Path):
    """Eight bytes anywhere in the header become a count, a length, an offset or a type."""
    data = whole[kind].read_bytes()
    index = min(entry.start for entry in GGUFFile(whole[kind]).tensors.values())
    path = tmp_path / "m.gguf"
    for seed in cases(70):
        draw = random.Random(seed)
        at, form = draw.randrange(4, index - 8), draw.choice(("<Q", "<I"))
        number = draw.choice(
            (0, 1, 5, 8, 9, 13, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
        )
        new = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
        path.write_bytes(data[:at] + new + data[at + len(new) :])
        answer(lambda: use(path))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_lost_doubled_or_other_ones(
    kind: str, whole: dict[str, Path], tmp_path: Path
):
    fields, tensors = parts(whole[kind])
    kept = [(name, *what, 0) for name, what in tensors.items()]
    path = tmp_path / "m.gguf"
    for seed in cases(90):
        draw = random.Random(seed)
        made = dict(fields)
        for key in draw.sample(list(fields), draw.choice((1, 1, 2, 4))):
            if draw.random() < 0.2:
                del made[key]
            else:
                made[key] = odd_value(draw, fields[key])
        if draw.random() < 0.1:
            made[f"llama.{draw.choice(('x', 'logit_scale', 'rope.dimension_sections'))}"] = 2.0
        coded = [encoded(key, value) for key, value in made.items()]
        if draw.random() < 0.1:
            key = draw.choice(list(fields))
            coded.append(field(key, draw.choice(list(NUMBERS)), draw.randbytes(8)))
        assembled(path, coded, kept)
        answer(lambda: use(path))


def test_tensors_that_are_lost_doubled_or_other_ones(whole: dict[str, Path], tmp_path: Path):
    fields, tensors = parts(whole["byte_level"])
    coded = [encoded(key, value) for key, value in fields.items()]
    path = tmp_path / "m.gguf"
    for seed in cases(90):
        draw = random.Random(seed)
        made: list[list[Any]] = [[name, *what, 0] for name, what in tensors.items()]
        one = draw.choice(made)
        match draw.randrange(7):
            case 0:
                made.remove(one)
            case 1:
                made.append(list(one))
            case 2:
                one[0] = draw.choice(
                    ("", "x", "blk.0.attn_q.bias", "blk.99.attn_q.weight", "output")
                )
            case 3:
                one[1] = draw.choice(
                    ((), (0,), (1, 1, 1, 1, 1), one[1][::-1], (*one[1], 1), (2**63,))
                )
            case 4:
                one[2] = draw.choice((*range(42), 255, 2**31))
            case 5:
                one[3] = one[3][: draw.randrange(len(one[3]))]
            case _:
                one[4] = draw.choice((-32, 32, 7, 1 << 20, 1 << 63))
        assembled(path, coded, [tuple(entry) for entry in made])
        answer(lambda: use(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_still_a_model(
    value: float, whole: dict[str, Path], tmp_path: Path
):
    """Infinity arises, among others, from a scale of 0 times infinity; numpy warns of it."""
    fields, tensors = parts(whole["byte_level"])
    made = [
        (name, shape, kind, np.full(len(raw) // 2, value, np.float16).tobytes(), 0)
        for name, (shape, kind, raw) in tensors.items()
    ]
    coded = [encoded(key, value) for key, value in fields.items()]
    path = assembled(tmp_path / "m.gguf", coded, made)
    assert answer(lambda: use(path)) is None
