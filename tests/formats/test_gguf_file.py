"""The GGUF container: byte order, versions, counts, offsets, names, splits, and its speed."""

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax.device.checkpoints.gguf import GGUFCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.formats.gguf_file import GGUFFile
from pdjax.formats.gguf_metadata import Metadata
from pdjax.text.tokenizer import Tokenizer
from tests.helpers import tiny_models
from tests.helpers.gguf_bytes import ARRAY, STRING, U32, field, strings, tensor, text, write
from tests.helpers.tiny_gguf import write_gguf


@pytest.mark.parametrize(
    ("fields", "tensors", "changes", "message"),
    [
        ((), (), {"version": 1}, "GGUF version 1; allowed: 2, 3"),
        ((), (), {"version": 4}, "GGUF version 4; allowed: 2, 3"),
        ((), (), {"version": 3 << 24}, "big-endian; allowed: little-endian"),
        ((), (), {"counts": (1 << 40, 0)}, "number of tensors is 1099511627776"),
        ((), (), {"counts": (0, 1 << 60)}, "number of metadata keys is 1152921504606846976"),
        ((field("k", 13, b""),), (), {}, "k has type 13"),
        ((field("k", STRING, struct.pack("<Q", 1 << 40)),), (), {}, "k needs 1099511627776 bytes"),
        ((field("k", ARRAY, strings(1 << 40)),), (), {}, "length of k is 1099511627776"),
        ((field("k", ARRAY, struct.pack("<IQ", U32, 1 << 62)),), (), {}, "length of k is 46116"),
        ((field("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),), (), {}, "k is an array of arrays"),
        ((field("k", ARRAY, struct.pack("<IQ", 99, 1)),), (), {}, "k is an array of type 99"),
        ((field("k", U32, bytes(4)),) * 2, (), {}, "metadata key 'k' occurs twice"),
        ((field(b"\xff", U32, bytes(4)),), (), {}, "metadata key 0: b'.xff' is not UTF-8"),
        ((field("a\r\nb", U32, bytes(4)),), (), {}, "metadata key 0: 'a.r.nb', 4 characters"),
        ((field("k" * 600, U32, bytes(4)),), (), {}, "600 characters; allowed: at most 512"),
        ((), (tensor("t\n"),), {}, "name of tensor 0: 't.n', 2 characters; allowed"),
        ((field("general.alignment", U32, bytes(4)),), (), {}, "general.alignment=0; allowed: a p"),
        (
            (field("general.alignment", U32, struct.pack("<I", 24)),),
            (),
            {},
            "general.alignment=24; allowed: a power of two",
        ),
        (
            (field("general.alignment", STRING, text("x" * 3000)),),
            (),
            {},
            r"general.alignment=b'x{10,60}\.\.\.x{10,60}'; allowed",
        ),
        ((), (tensor("t"), tensor("t", offset=32)), {}, "tensor 't' occurs twice"),
        ((), (tensor("t"), tensor("u")), {}, "tensor 'u' at offset .* overlaps"),
        ((), (tensor("t", (0, 8)),), {}, r"'t' has shape \(8, 0\); allowed: no axis of length 0"),
        ((), (tensor("t", (1, 1, 1, 1, 1)),), {}, "'t' has 5 dimensions; allowed: 1 to 4"),
        ((), (tensor("t", ()),), {}, "'t' has 0 dimensions"),
        ((), (tensor("t", (1 << 62, 1 << 62)),), {}, "'t' needs .* bytes at offset"),
        ((), (tensor("t", offset=7),), {}, "'t' has offset 7; allowed: multiples of 32"),
        ((), (tensor("t", offset=1 << 63),), {}, "'t' needs 32 bytes at offset 92233"),
        ((), (tensor("t", kind=99),), {}, "'t' has the unknown type 99"),
        ((), (tensor("t", (33,), kind=8),), {}, "'t' of Q8_0 has rows of 33 elements; allowed"),
        ((), (tensor("t"),), {"data": 8}, "'t' needs 32 bytes at offset"),
    ],
)
def test_a_contradiction_is_named(
    fields: tuple[bytes, ...],
    tensors: tuple[bytes, ...],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
):
    path = write(tmp_path / "m.gguf", fields, tensors, **changes)
    with pytest.raises(ValueError, match=rf"^model='.*m\.gguf': .*{message}") as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        Tokenizer.open(path)


def test_an_array_of_too_many_strings_is_refused_before_it_is_read(tmp_path: Path):
    """With a flipped bit in its count, an array would read the following zeros as strings."""
    path = write(tmp_path / "m.gguf", (field("k", ARRAY, strings(1 << 22)),), data=1 << 26)
    started = time.process_time()
    with pytest.raises(ValueError, match="length of k is 4194304; allowed: at most 2097152"):
        GGUFFile(path)
    assert time.process_time() - started < 1


def test_values_of_every_type(tmp_path: Path):
    packed = [
        (0, "<B", 255),
        (1, "<b", -1),
        (2, "<H", 65535),
        (3, "<h", -2),
        (4, "<I", 1 << 31),
        (5, "<i", -3),
        (6, "<f", 0.5),
        (7, "<?", True),
        (10, "<Q", 1 << 63),
        (11, "<q", -4),
        (12, "<d", 0.25),
    ]
    fields = [field(f"s{kind}", kind, struct.pack(form, value)) for kind, form, value in packed]
    fields += [
        field(f"a{kind}", ARRAY, struct.pack("<IQ", kind, 2) + 2 * struct.pack(form, value))
        for kind, form, value in packed
    ]
    fields += [field("text", STRING, text("é")), field("texts", ARRAY, strings(2, b"a", b""))]
    path = write(tmp_path / "m.gguf", tuple(fields))
    meta = Metadata(path, GGUFFile(path))
    for kind, _, value in packed:
        assert meta.get(f"s{kind}") == value
        assert type(meta.get(f"s{kind}")) is type(value)
        assert meta.get(f"a{kind}") == [value, value]
    assert meta.get("text") == "é"
    assert meta.get("texts") == ["a", ""]
    assert meta.get("none") is None


def test_text_that_is_not_utf8_is_named(tmp_path: Path):
    path = write(tmp_path / "m.gguf", (field("k", ARRAY, strings(2, b"a", b"\xff")),))
    with pytest.raises(ValueError, match=r"k\[1\]=b'.xff'; allowed: UTF-8"):
        Metadata(path, GGUFFile(path)).strings("k")


def test_a_big_endian_file_is_refused_by_name(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", big_endian=True)
    for reader in (GGUFCheckpoint, Tokenizer.open):
        with pytest.raises(ValueError, match=r"m\.gguf': .*byte order is big-endian"):
            reader(path)


@pytest.mark.parametrize("name", ["m.GGUF", "m.Gguf", "m", "m.bin"])
def test_a_file_is_known_by_its_suffix_or_its_magic(name: str, tmp_path: Path):
    assert open_checkpoint(write_gguf(tmp_path / name)).spec.num_layers == 3


def test_a_suffix_in_capitals_promises_a_gguf_file(tmp_path: Path):
    (tmp_path / "m.GGUF").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        open_checkpoint(tmp_path / "m.GGUF")


class TestSplits:
    def test_a_split_model_is_the_whole_model(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        assert first.name == "m-00001-of-00004.gguf"
        whole = GGUFCheckpoint(write_gguf(tmp_path / "whole.gguf"))
        split = GGUFCheckpoint(first)
        assert split.spec == whole.spec
        for name in tiny_models.tensors("llama"):
            np.testing.assert_array_equal(split.read(name), whole.read(name), err_msg=name)

    def test_a_later_shard_says_which_file_to_open(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        second = first.with_name("m-00002-of-00004.gguf")
        for reader in (GGUFCheckpoint, Tokenizer.open):
            with pytest.raises(ValueError, match=r"a later shard .*; open m-00001-of-00004\.gguf"):
                reader(second)

    def test_a_missing_shard_is_named(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        first.with_name("m-00003-of-00004.gguf").unlink()
        with pytest.raises(ValueError, match=r"shard m-00003-of-00004\.gguf is missing"):
            GGUFCheckpoint(first)

    def test_a_shard_of_another_number_is_named(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        third = first.with_name("m-00003-of-00004.gguf")
        os.replace(third, first.with_name("m-00002-of-00004.gguf"))
        third.write_bytes(first.read_bytes())
        with pytest.raises(ValueError, match=r"m-00002-of-.*split\.no=2; allowed: 1"):
            GGUFCheckpoint(first)

    def test_a_first_shard_under_another_name_is_refused(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        os.replace(first, tmp_path / "renamed.gguf")
        with pytest.raises(ValueError, match=r"split\.count=4.*allowed: NAME-00001-of-00004\.gguf"):
            GGUFCheckpoint(tmp_path / "renamed.gguf")

    def test_a_shard_of_another_model_is_noticed_by_its_tensors(self, tmp_path: Path):
        first = write_gguf(tmp_path / "m.gguf", tensors_a_shard=8)
        (tmp_path / "o").mkdir()
        extra = {f"extra.{i}": np.ones(8, np.float32) for i in range(3)}
        other = write_gguf(tmp_path / "o" / "m.gguf", tensors_a_shard=8, extra=extra)
        last = other.with_name("m-00004-of-00004.gguf")
        if last.is_file():
            os.replace(last, first.with_name(last.name))
            with pytest.raises(ValueError, match=r"split\.tensors\.count=\d+, but the 4 shards"):
                GGUFCheckpoint(first)


def test_a_large_vocabulary_opens_in_two_seconds(tmp_path: Path):
    """The vocabulary and merges have Llama 3's size; only this process's time counts."""
    letters = [chr(code) for code in range(0x100, 0x100 + 360)]
    pairs = [a + b for a in letters for b in letters][: 128_000 - 360]
    tokens = [token.encode() for token in letters + pairs]
    merges = [f"{pair[0]} {pair[1]}".encode() for pair in pairs] * 2
    fields = (
        field("tokenizer.ggml.model", STRING, text("gpt2")),
        field("tokenizer.ggml.pre", STRING, text("llama-bpe")),
        field("tokenizer.ggml.tokens", ARRAY, strings(len(tokens), *tokens)),
        field("tokenizer.ggml.merges", ARRAY, strings(len(merges), *merges)),
    )
    path = write(tmp_path / "m.gguf", fields)
    started = time.process_time()
    tokenizer = Tokenizer.open(path)
    assert time.process_time() - started < 2
    assert tokenizer.vocab_size == 128_000
