"""Texts that tokenizers, cutters and full text go wrong on; every case that needs a text takes it here."""

from __future__ import annotations

from contract.notation import spread

HARD_TEXTS = [
    "", " ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", "\n\n\n\n", " a", "a ", " a ", "  a  b  ",
    "a\tb", "a\nb", "a\r\nb", "a\x0bb", "a\x0cb", "a\x85b", "a\u2028b", "a\u2029b", "a\u00a0b",
    "a\u3000b", "a\u2003b", "a\u200bb", "a\u200db", "a\ufeffb", "\ufeffa", "\x00", "a\x00b", "\x01\x02\x1b[31m",
    "\x7f", "\u0080\u009f", "\u00ad", "\u202eabc\u202c", "\u2066abc\u2069", "\ufff9\ufffb\ufffd", "\uffff", "\U0010ffff",
    "Hello, world!", "hello world", "HELLO WORLD", "Hello World", "don't", "it\u2019s", "e.g. this", "U.S.A.",
    "naïve café", "nai\u0308ve cafe\u0301", "Å", "A\u030a", "\u212b", "ﬁ ﬂ ﬀ", "½ Ⅷ ①", "ｆｕｌｌ　ｗｉｄｔｈ", "Straße STRASSE", "ẞ",
    "İstanbul ıI", "ŉ", "ǆ ǅ Ǆ", "e\u0301\u0302\u0303\u0304\u0305", "Z̷͎̈a̶͚͝l̵̰̂g̶̩̋o̸̭͑", "µ μ", "Ω Ω", "K K",
    "日本語の短い文です。", "東京タワーは1958年に完成した。", "机器学习正在改变世界", "繁體中文", "서울의 봄은 따뜻하다.",
    "한국어", "ㅎㅏㄴ", "ﾊﾝｶｸ", "カタカナ ひらがな", "\u304b\u3099", "\u304c", "𠮷野家", "〜～", "「引用」", "。。。", "、",
    "ภาษาไทยไม่มีช่องว่าง", "นักวิทยาศาสตร์", "ลาว ພາສາລາວ", "မြန်မာဘာသာ", "ភាសាខ្មែរ",
    "مرحبا بالعالم", "العَرَبِيَّة", "ﷺ", "لا إله", "שלום עולם", "שָׁלוֹם", "فارسی می‌خواهم", "اردو",
    "हिन्दी भाषा", "क्षि", "தமிழ்", "తెలుగు", "বাংলা", "ગુજરાતી", "ਪੰਜਾਬੀ", "മലയാളം", "සිංහල", "བོད་སྐད",
    "Ελληνικά", "ΆΈΉ", "Русский язык", "Українська ґ є ї", "Ёжик", "ქართული", "Հայերեն", "አማርኛ", "ᏣᎳᎩ", "ᚠᚢᚦ",
    "Tiếng Việt rất đẹp", "Žluťoučký kůň", "Þórður", "Łódź", "ș ț ş ţ", "Ĉu vi?", "Ọlọ́run",
    "🎉", "👩‍🚀", "👨‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷", "🇩", "❤️", "❤", "1️⃣", "☺︎", "🐎🐎🐎🐎", "🫠", "a🎉b", "😀 😀",
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused0>", "<unused3>", "<start_of_turn>user", "<end_of_turn>",
    "<0x41>", "<0x00>", "<s></s>", "<|endoftext|>", "[CLS] [SEP]", "▁", "▁▁", "a▁b", "▁a", "<table><td>x</td></table>",
    "0", "1", "12", "123", "1234567890", "3.14159", "1,000,000", "1e-9", "0x1F", "-5", "+49 170 1234567", "٣٤٥", "१२३", "²³",
    "def f(x):\n    return x + 1\n", "for (;;) { i++; }", "\tif x:\n\t\tpass", "a  =  b", "a=b", "// TODO", "<!-- x -->",
    "SELECT * FROM t WHERE a='b'", "{\"a\": [1, 2, {\"b\": null}]}", "https://example.org/a?b=c&d=%20#e", "a@b.org",
    "C:\\Users\\x", "/usr/local/bin", "snake_case camelCase kebab-case", "a.b.c", "!!!", "...", "…", "?!", "--", "—–‐",
    "'\"`´", "()[]{}<>", "$€£¥₿", "±×÷≠≤≥", "∀x∈ℝ: x²≥0", "→←⇒", "█▓▒░", "®©™", "№ §", "\\n", "%s %d", "&amp;",
    "task: search result | query: ", "title: none | text: ", "title: none | text: a", "task: clustering | query: b",
    "The quick brown fox jumps over the lazy dog.", "Buffalo buffalo Buffalo buffalo", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Donaudampfschifffahrtsgesellschaftskapitän", "pneumonoultramicroscopicsilicovolcanoconiosis",
    "antidisestablishmentarianism", "xqzjk vvwpt", "qwertyuiop", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "iPhone iOS macOS", "LaTeX",
    "mixed العربية and עברית and 日本語", "line one\nline two\n\nline four", "trailing blanks   ", "   leading blanks", "a" + " " * 40 + "b",
    "a" + "\n" * 40 + "b", "-" * 60, "=" * 20 + "\n" + "-" * 20, "word " * 30, "\u0300", "\u0300\u0301", "a\u200d", "\u200d", "\ufe0f",
    "\u20e3", "\u0e31", "\u093f", "\ud7ff", "\ue000", "\U00010380", "\U0001f1e6", "\U000e0041", "\U0001d400\U0001d401",
]  # fmt: skip

# Blocks that `scattered` draws from: (first, last) code point.
_BLOCKS = [
    (0x20, 0x7E), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x4FF), (0x590, 0x6FF), (0x900, 0xB7F),
    (0xE00, 0xEFF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2190, 0x23FF), (0x3040, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0x1F300, 0x1FAFF), (0x0, 0x1F),
]  # fmt: skip


def scattered(name: str, characters: int) -> str:
    """A text of code points from all kinds of blocks, each run of a few from one block."""
    draws = ((spread(name, 2 * characters) + 1) * 16384).astype(int).tolist()
    text = []
    for number in range(characters):
        first, last = _BLOCKS[draws[2 * (number // 4)] % len(_BLOCKS)]
        text.append(chr(first + draws[2 * number + 1] % (last - first + 1)))
    return "".join(text)


ENGLISH = """\
A lighthouse keeper wrote down the weather every evening: the wind, the height of the waves and the ships that passed. In winter \
the lamp was lit before four o'clock, and the oil had to be carried up two hundred and seven steps. Nobody asked him to do it. \
He did it because his father had done it, e.g. in the storm of 1911. "Was it worth it?" a visitor asked. He laughed! Then he \
showed her the shelf: forty-one books, each with a year on its back.

The second winter was harder.  Ice stood on the rail for weeks, and the boat that brought bread came only twice. He counted the \
candles (there were nineteen) and moved his bed beside the stove. Dr. Meyer of the harbour office wrote that help was on its way... \
It was not.
"""
GERMAN = """\
Die Pumpe verliert Öl, wenn der Motor warm ist. Zuerst prüft man den Schlauch, z. B. auf Risse; danach die Dichtung. Steht das \
Wasser höher als 20 cm, so schaltet sich die Anlage selbst ab! Was tun? Ruhe bewahren.
Die Donaudampfschifffahrtsgesellschaft hat ihren Sitz in Wien.
"""
SPANISH = """\
La lluvia cae despacio sobre el tejado de la casa. ¿Quién cerró la ventana? Nadie lo sabe. «Mañana», dijo ella, «plantaremos \
tomates en el balcón». Diez litros de tierra para cada planta, sol y agua.
"""
FRENCH = "L'été dernier, nous avons traversé le pont à pied. Où étiez-vous ? Le facteur est passé deux fois… Il n'a rien laissé."
JAPANESE = "東京タワーは1958年に完成した電波塔です。高さは333メートルあります。「本当に高いですね！」と彼女は言いました。水と油は混ざらない。なぜでしょうか？それは分子の性質によります。"
CHINESE = "机器学习正在改变世界。人们每天都在使用它，却很少注意到。昨天下了一场大雨，街上没有人。他问：“你去哪里？”我没有回答。"
KOREAN = (
    "서울의 봄은 따뜻하다. 벚꽃이 피면 사람들이 강가로 나온다. 어제는 비가 왔다! 내일은 맑을까?"
)
THAI = "นักวิทยาศาสตร์สัมภาษณ์อาจารย์คอมพิวเตอร์เรื่องการเรียนรู้ของเครื่อง" * 3
ARABIC = "هطل المطر ببطء على سطح البيت. من أغلق النافذة؟ لا أحد يعرف. غدا سنزرع الطماطم في الشرفة، مع الشمس والماء."
HEBREW = "הגשם ירד לאט על גג הבית. מי סגר את החלון? אף אחד לא יודע."
HINDI = "बारिश धीरे-धीरे छत पर गिर रही है। खिड़की किसने बंद की? कोई नहीं जानता। कल हम टमाटर लगाएंगे।"
RUSSIAN = "Дождь медленно падает на крышу дома. Кто закрыл окно? Никто не знает. «Завтра», — сказала она, — «посадим помидоры»."
CODE = '''\
"""Reads a table."""

import csv


def rows(path: str) -> list[dict[str, str]]:
    """All rows of the file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Table:
    def __init__(self, path):
        self.rows = rows(path)

    def __len__(self): return len(self.rows)  # O(1)


if __name__ == "__main__":
    for row in Table("a.csv").rows:
        print(", ".join(f"{key}={value}" for key, value in row.items()))
'''
LIST = "Shopping:\n- flour, 2 kg\n- water\n  - from the well\n  - not from the tap\n- salt\n\n1. Mix.\n2. Wait.\n3. Bake at 220 °C.\n"
EMOJI = "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈👍🏽❤️1️⃣🎉" * 12
MARKDOWN = """\
# Guide

Read this first. It is short.

## Install

### Linux

Take the archive and unpack it. Then run the script `install.sh` as a user; it asks for the password once.

### Windows

Start the installer. Answer yes.

## Use

Open the program. A window appears! Type what you look for.

Underlined
==========

Text below an underline.

## Empty

## Questions

Why does it not start? Because the disk is full.
"""
