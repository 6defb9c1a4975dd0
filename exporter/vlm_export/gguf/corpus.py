"""Texts on which tokenizers disagree when they are not the same: what a GGUF's vocabulary is proved with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

_PLAIN = (
    "",
    "a",
    " ",
    "Hello, world!",
    "  two spaces before, two after  ",
    "What colour is the large circle? It's red, isn't it?",
    "don't I'll we've you're he'd I'm it's DON'T I'LL WE'VE YOU'RE HE'D I'M IT'S 'tis o'clock ''s 'S'",
    "naïve café, Größe, Ærøskøbing, İstanbul, ǅ, ß, ﬁ",
    "cafe\u0301 n\u0303o a\u0308\u0323 \u0301start Z\u0351\u036b\u0343\u036a\u0302",  # combining marks
    "éÉcole ÀÉÎ naïveÉtat ßÄ ÉCOLEécole İi ПриветМир ΑβΓ 'S 'Ll DiÉ's",
    "東京の天気は晴れです。中文字符測試，한국어 문장，ภาษาไทย ไม่มีช่องว่าง",
    "हिन्दी वाक्य, বাংলা, தமிழ் ௧௨௩, ລາວ, ខ្មែរ",
    "שלום עולם، مرحبا بالعالم ١٢٣ \u202eright to left\u202c",
    "Привет, мир! Ελληνικά ΑΣ. Ձայն ქართული",
    "🙂 👨‍👩‍👧‍👦 👍🏽 🇺🇳 ☺️ ❤️‍🔥 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F 2⁵ ½ Ⅻ ٣ ४ 一二三 a1b22c333",
    "2026-11-22T11:30:00+01:00 +49 (0)30 123456 v1.2.3-rc4",
    "def f(x: int) -> str:\n    return x**2  # tab\there\n\n\tif a != b and c <= d:\n\t\tpass\n",
    '{"key": [1, 2.5e-3, null], "path": "C:\\\\dir\\\\file"}\n<div class="a">&amp;</div>\n```py\nprint()\n```',
    "https://example.org/path?q=1&x=%20#top user@example.org @name #tag $5.00 50% ~/.bashrc",
    "!!! ??? ... ,,, --- === ### *** ((( ))) [[[ ]]] {{{ }}} <<< >>> ~~~ ``` \"\"\" ''' “curly” ‘quotes’ … – — • €£¥",
    "a_b a-b a.b a/b a\\b a'b a’b _a_ .a. -a- 'a' x²y³ CamelCaseWord snake_case ALLCAPS aBcDeF",
    "\n",
    "\n\n",
    "\n\n\n  \n \n\n   \n",
    "\r\n\r\n \r \r\n",
    "line one\nline two\r\nline three\rline four\n\n  indented\n\t\ttabs \n",
    "\t \t\t  \t a\tb",
    " \n leading newline and space\n ",
    "word" + " " * 2 + "word" + " " * 3 + "word" + " " * 7 + "word" + " " * 16 + "end" + " " * 33,
    "a\u00a0b\u2009c\u3000d\u2028e\u2029f\u1680g\u202fh \u00a0 \u3000\u3000i",  # every kind of blank
    "zero\u200bwidth\u200cjoin\u200dno\u2060break\ufeffmark soft\u00adhyphen",
    "bell\x07 esc\x1b[0m del\x7f nul-like \x01\x02\x03 c1 \x80\x9f vt\x0bff\x0c",
    "\ufffd lone \ufffd\ufffd surrogates \ufffd",
    "rare 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 \U000f0000 \u0378 \ue000",
    "▁ underscore ▁▁ blocks▁in▁text Ġ Ċ ĠĠ ģ <0x0A> <0xE2>",
    "supercalifragilisticexpialidocious" * 12,
    "a" * 700,
    "0123456789" * 30,
    "ÄÖÜ" * 150 + "東" * 200,
    "🙂" * 60,
    "-" * 300 + "=" * 90,
    "\n" * 70,
    "ab " * 200,
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX, 5 dozen liquor jugs; ¿qué? ¡sí!",
    "USER: <image>\nDescribe the picture. ASSISTANT: A cat, 2 dogs.",
)


def texts() -> list[str]:
    """Texts without any token of a tokenizer written into them on purpose."""
    return list(_PLAIN)


def texts_with(tokens: Sequence[str]) -> list[str]:
    """Texts that hold `tokens`, added tokens of a tokenizer, alone, inside words, between blanks and in runs."""
    out = []
    for token in tokens:
        out += [
            token,
            f"{token}text after",
            f"{token} blank after",
            f"text before{token}",
            f"text before {token}",
            f"in{token}word",
            f"a {token} b",
            f"a  {token}  b",
            f"a\n{token}\nb",
            f"{token}{token} {token}\n{token}",
            f"{token[:-1]} {token[1:]}",
        ]
    return [*out, *_conversations(tokens)]


def _conversations(tokens: Sequence[str]) -> Iterable[str]:
    """Neighbouring tokens around a turn of text."""
    for first, second in itertools.pairwise(tokens):
        yield f"{first}user\nWhat is 12 + 345?{second}\n{first}assistant\n It is 357.{second}"
