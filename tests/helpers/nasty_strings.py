"""Strings on which tokenizers differ: spaces, digits, cases, scripts and marks."""

# ruff: noqa: RUF001

import random

WRITTEN = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n ",
    "\r\n\r\n",
    "\t\t x",
    "a\tb\n\n c \r\n  d   ",
    "Hello, world!",
    "  two leading spaces",
    "trailing spaces   ",
    "1234567890 12 345,678.90 3.14e-10",
    "   7  8   9",
    "0 00 000 0000 00000",
    "don't can't I'll we've they'RE I'D it'S y'all o'clock",
    "café naïve Ünïcödé Straße ÀÉÎ ÄÖÜß",
    "日本語のテキスト 中文 한국어 ひらがなカタカナ",
    "emoji: 😀 👨‍👩‍👧‍👦 🇫🇷",
    "non-breaking\u00a0space and zero\u200bwidth\u3000wide",
    "x²+y³=½ ١٢٣ Ⅷ ४५६",
    "CamelCase snake_case kebab-case HTTPServer iPhone XMLHttpRequest",
    "https://example.com/a?b=c&d=%20#frag",
    "    def f(x):\n        return x ** 2  # comment\n",
    "!!! ??? ... --- *** ((( ))) [[ ]] {{ }}",
    "$100 + €200 = £300 <= >= != ^ ~ | `code`",
    "Привет мир Ελληνικά العربية עברית हिन्दी ไทย",
    "e\u0301 a\u0308 n\u0303 combining",
    "ﬁ ﬂ ligatures ＦＵＬＬ ｗｉｄｔｈ，。！",
    "“quotes” ‘single’ «angles» …",
    "a/b\\c // /// \n/ x/\n",
    "ABC abc AbC aBc ABc abC",
    "a1b2c3 1a2b3c v1.2.3 x86_64",
    "\u2028\u2029\x0b\x0c\x85 separators",
    "ab\u00adcd soft\u2011hyphen",
    "ΑΒΓ αβγ ЖЗИ жзи ǅ ʰ ª",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐨 𞤀𞤢",
]
"""Strings written by hand."""

_ALPHABETS = [
    "abcXYZ 019'",
    "aA1 \n\r\t.,!?'\"",
    " \n\t\r\u00a0\u3000",
    "éÉñÑßüÜçÇ aB'1.",
    "中文日本語ひらカタ한국 a1。，！",
    "ЖжЗз αΑβΒ aA 'st",
    "$+<=>^~|`@#%&*()[]{}_-/\\ aA0",
    "0123456789 .,-٣४Ⅷ½²",
    "\u0301\u0308\u0303ae \u0939\u093f\u0928\u0e44\u0e17\u0e22",
    "'sStTrReEvVmMlLdD x",
]


def random_strings(count: int, seed: int = 0) -> list[str]:
    """Make `count` strings of 1 to 24 characters, each from one or two alphabets."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        letters = "".join(rng.sample(_ALPHABETS, rng.choice((1, 1, 2))))
        made.append("".join(rng.choices(letters, k=rng.randint(1, 24))))
    return made
