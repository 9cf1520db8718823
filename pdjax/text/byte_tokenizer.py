"""A tokenizer without a vocabulary to learn: a token is a byte of UTF-8. For small models that are
trained from nothing."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pdjax.text.tokenizer import Tokenizer

END_TEXT = "<|endoftext|>"
END = 256
"""Id of the token that ends a text."""
VOCAB_SIZE = 257


def byte_tokenizer() -> Tokenizer:
    """Make the tokenizer: ids 0 to 255 are the bytes of a text in UTF-8, and `END` ends it.

    The text "<|endoftext|>" in a prompt is the token `END`, and `encode` adds no other token.
    """
    backend = Backend(models.BPE({text: byte for byte, text in enumerate(_texts())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_TEXT, special=True, normalized=False)])
    return Tokenizer(backend, eos_token_ids=(END,), eos_token=END_TEXT)


def _texts() -> list[str]:
    """The characters by which byte-level vocabularies write the bytes 0 to 255.

    A byte that is a visible character of Latin-1 stands for itself. The others have the characters
    from 256 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
