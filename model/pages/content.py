"""What pages say: words, numbers, dates, prices, addresses, random strings and sentences, one token at a time.

A decoder that may guess words does not learn to read, so a good part of what is drawn cannot be guessed.
All text is printable ASCII.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SYMBOLS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    "kg",
    "g",
    "mg",
    "km",
    "cm",
    "mm",
    "m",
    "ml",
    "L",
    "Hz",
    "kHz",
    "MHz",
    "GB",
    "MB",
    "kB",
    "V",
    "W",
    "kW",
    "s",
    "ms",
)
DOMAINS = ("com", "org", "net", "edu", "io", "co.uk", "de", "info")
SMALL_WORDS = (
    *("the", "of", "and", "to", "a", "in", "is", "it", "for", "that", "was", "on", "with", "as", "be", "at"),
    *("by", "this", "from", "or", "had", "not", "are", "but", "they", "which", "you", "all", "were", "we"),
    *("when", "your", "can", "said", "there", "use", "an", "each", "she", "do", "how", "if", "will", "up"),
    *("other", "about", "out", "many", "then", "them", "these", "so", "some", "her", "would", "make", "like"),
    *("him", "into", "time", "has", "look", "two", "more", "go", "see", "no", "way", "could", "my", "than"),
    *("first", "who", "been", "its", "now", "did", "get"),
)
ONSETS = (
    "",
    *"bcdfghjklmnprstvwyz",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "gr",
    "pl",
    "qu",
    "sh",
    "sk",
    "st",
    "str",
    "th",
    "tr",
)
VOWELS = (*"aeiou", "ai", "ea", "ee", "ie", "oo", "ou", "y")
CODAS = ("", "", *"bdgklmnprstx", "ck", "ct", "ff", "ld", "ll", "nd", "ng", "nt", "rd", "rt", "ss", "st", "th")


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Return about 11,000 common English words, the commonest 4,000 first, in lower case."""
    return tuple((Path(__file__).parent / "words.txt").read_text(encoding="ascii").split())


@dataclass(frozen=True)
class Writer:
    """A source of text. Random strings leave out the characters in `avoid`: the font draws another just like them."""

    rng: random.Random
    avoid: frozenset[str] = frozenset()

    def word(self) -> str:
        """A word in lower case: half the time one of the commonest."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.25:
            return rng.choice(SMALL_WORDS)
        if kind < 0.55:
            return words()[int(rng.random() * 4000)]
        return rng.choice(words())

    def made_up_word(self) -> str:
        """A word that is in no dictionary but can be said."""
        rng = self.rng
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 1, 2, 2, 2, 3)))
        )

    def name(self) -> str:
        """A capitalised name."""
        return (self.made_up_word() if self.rng.random() < 0.6 else self.word()).capitalize()

    def cased(self, word: str) -> str:
        """The word in some case: lower, Capitalised, UPPER, miXeD."""
        kind = self.rng.random()
        if kind < 0.55:
            return word
        if kind < 0.78:
            return word.capitalize()
        if kind < 0.94:
            return word.upper()
        # capital I and small l are left out of it: in such a word nothing tells them apart
        return "".join(
            char.upper() if char == "l" or (char != "i" and self.rng.random() < 0.5) else char for char in word
        )

    def digits(self, low: int, high: int) -> str:
        """Between `low` and `high` random digits."""
        return "".join(self.rng.choices(string.digits, k=self.rng.randint(low, high)))

    def number(self) -> str:
        """A number of some kind: integer, decimal, grouped, percentage, fraction, signed, with a unit."""
        rng = self.rng
        kind = rng.randrange(10)
        if kind < 3:
            return str(rng.randrange(10 ** rng.randint(1, 6)))
        if kind == 3:
            return f"{rng.randrange(10 ** rng.randint(1, 4))}.{self.digits(1, 3)}"
        if kind == 4:
            return f"{rng.randrange(10 ** rng.randint(4, 8)):,}"
        if kind == 5:
            return f"{rng.randrange(1000) / 10 if rng.random() < 0.5 else rng.randrange(101)}%"
        if kind == 6:
            return f"{rng.randint(1, 99)}/{rng.randint(2, 99)}"
        if kind == 7:
            return rng.choice("+-") + str(rng.randrange(1000))
        if kind == 8:
            return f"{rng.randrange(2000)}{rng.choice(('', ' '))}{rng.choice(UNITS)}"
        return f"{rng.random() * 10:.{rng.randint(1, 4)}f}{rng.choice(('', 'e-', 'e+', 'x', 'E'))}{rng.randrange(10)}"

    def price(self) -> str:
        """An amount of money."""
        rng = self.rng
        amount = rng.random() * 10 ** rng.randint(1, 4)
        text = f"{amount:,.2f}"
        return rng.choice(
            (text, text, f"${text}", f"${text}", f"$ {text}", f"{text} USD", f"EUR {text}", f"{amount:.2f}-")
        )

    def date(self) -> str:
        """A date or a time of day."""
        rng = self.rng
        day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1890, 2049)
        name = MONTHS[month - 1]
        return rng.choice(
            (
                f"{day:02}/{month:02}/{year}",
                f"{month}/{day}/{year % 100:02}",
                f"{day:02}.{month:02}.{year}",
                f"{year}-{month:02}-{day:02}",
                f"{name} {day}, {year}",
                f"{day} {name} {year}",
                f"{day} {name[:3]} {year}",
                f"{name[:3]}. {day}",
                f"{rng.choice(DAYS)}, {name} {day}",
                f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
                f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}",
                f"{rng.randint(1, 12)}:{rng.randint(0, 59):02} {rng.choice(('am', 'pm', 'AM', 'PM', 'a.m.', 'p.m.'))}",
                str(year),
            )
        )

    def address(self) -> str:
        """An e-mail address, URL, path or host."""
        rng = self.rng
        a, b, c = self.word(), self.made_up_word() or "x", self.word()
        domain = rng.choice(DOMAINS)
        return rng.choice(
            (
                f"{a}@{b}.{domain}",
                f"{a}.{c}@{b}.{domain}",
                f"{a}_{self.digits(1, 4)}@{c}.{domain}",
                f"www.{a}{c}.{domain}",
                f"http://{a}.{domain}/{c}",
                f"https://{b}.{domain}/{a}?id={self.digits(1, 4)}",
                f"/{a}/{b}/{c}.txt",
                f"C:\\{a.capitalize()}\\{c}.doc",
                f"~/{b}.cfg",
                f"{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}",
                f"#{a}",
                f"@{b}{self.digits(0, 3)}",
            )
        )

    def code(self) -> str:
        """A serial number, telephone number, version, hash or a bit of a program."""
        rng = self.rng
        upper = "".join(rng.choices(self._pool(string.ascii_uppercase), k=rng.randint(1, 4)))
        a, b = self.word(), self.word()
        return rng.choice(
            (
                f"{upper}-{self.digits(2, 6)}",
                f"{upper}{self.digits(1, 5)}",
                f"({self.digits(3, 3)}) {self.digits(3, 3)}-{self.digits(4, 4)}",
                f"+{self.digits(1, 2)} {self.digits(2, 3)} {self.digits(3, 4)} {self.digits(3, 4)}",
                f"v{rng.randrange(10)}.{rng.randrange(20)}.{rng.randrange(30)}",
                f"0x{rng.randrange(16 ** rng.randint(2, 8)):x}",
                f"{a}_{b}",
                f"{a}{b.capitalize()}",
                f"{a}({b})",
                f"{a}[{rng.randrange(100)}]",
                f"{a}.{b}()",
                f"{a} = {rng.randrange(1000)};",
                f"<{a}>",
                f"{{{a}: {b}}}",
                f"--{a}={b}",
                f"{rng.randrange(100)} {rng.choice('+-*/=<>')} {rng.randrange(100)}",
                f"[{rng.randrange(1, 200)}]",
                f"No. {rng.randrange(1, 2000)}",
                f"p. {rng.randrange(1, 900)}",
                f"${a}",
                f"{a}^{rng.randrange(10)}",
                f"`{a}`",
                f"{a}|{b}",
            )
        )

    def _pool(self, characters: str) -> str:
        return "".join(char for char in characters if char not in self.avoid)

    def letters(self) -> str:
        """A random string of letters, or of letters and digits."""
        rng = self.rng
        pool = rng.choice(
            (string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters, string.ascii_letters + string.digits)
        )
        return "".join(rng.choices(self._pool(pool), k=rng.randint(1, 10)))

    def characters(self) -> str:
        """A random string of any printable characters."""
        pool = self._pool(string.ascii_letters + string.digits + SYMBOLS)
        return "".join(self.rng.choices(pool, k=self.rng.randint(2, 9)))

    def symbols(self) -> str:
        """A few random symbols."""
        return "".join(self.rng.choices(self._pool(SYMBOLS), k=self.rng.randint(1, 4)))

    def punctuated(self, word: str) -> str:
        """The word with punctuation on it, as it stands in print."""
        kind = self.rng.randrange(16)
        if kind < 4:
            return word + ","
        if kind < 7:
            return word + "."
        if kind < 9:
            return word + self.rng.choice(":;!?")
        if kind == 9:
            return f"({word})"
        if kind == 10:
            return f'"{word}"'
        if kind == 11:
            return f"'{word}'"
        if kind == 12:
            return word + "'s"
        if kind == 13:
            return f"{word}-{self.word()}"
        if kind == 14:
            return f"{word}/{self.word()}"
        return word + "..."

    def anything(self) -> str:
        """A token of any kind, words being the commonest."""
        kind = self.rng.random()
        if kind < 0.40:
            return self.cased(self.word())
        if kind < 0.48:
            return self.cased(self.made_up_word())
        if kind < 0.60:
            return self.punctuated(self.cased(self.word()))
        if kind < 0.70:
            return self.number()
        if kind < 0.74:
            return self.price()
        if kind < 0.78:
            return self.date()
        if kind < 0.82:
            return self.address()
        if kind < 0.88:
            return self.code()
        if kind < 0.94:
            return self.letters()
        if kind < 0.97:
            return self.characters()
        return self.symbols()

    def stream(self, kind: str) -> Iterator[str]:
        """Endless tokens of one kind: words, salad, caps, mixed, numbers, letters, characters, codes or prose."""
        if kind == "prose":
            while True:
                yield from self.sentence().split(" ")
        make: Callable[[], str] = {
            "words": self.word,
            "salad": lambda: self.cased(self.word() if self.rng.random() < 0.6 else self.made_up_word()),
            "caps": lambda: (self.word() if self.rng.random() < 0.85 else self.number()).upper(),
            "mixed": self.anything,
            "numbers": lambda: self.number() if self.rng.random() < 0.6 else self.digits(1, 12),
            "letters": self.letters,
            "characters": self.characters,
            "codes": lambda: self.rng.choice((self.code, self.address, self.date, self.price))(),
        }[kind]
        while True:
            yield make()

    def sentence(self) -> str:
        """A sentence: clauses of words with names and figures among them, capitalised, with its stop."""
        rng = self.rng
        tokens: list[str] = []
        for clause in range(rng.choice((1, 1, 1, 2, 2, 3))):
            if clause:
                tokens[-1] += rng.choice((",", ",", ",", ";", ":", " -", " and", ", but", ", which"))
            for _ in range(rng.randint(2, 9)):
                kind = rng.random()
                if kind < 0.80:
                    tokens.append(self.word())
                elif kind < 0.88:
                    tokens.append(self.name())
                elif kind < 0.91:
                    tokens.append(self.number())
                elif kind < 0.93:
                    tokens.append(rng.choice((self.date, self.price, self.code, self.address))())
                elif kind < 0.95:
                    tokens.append(f"{self.word()}-{self.word()}")
                elif kind < 0.97:
                    quote = rng.choice(('"', "'"))
                    tokens.append(f"{quote}{self.word()} {self.word()}{quote}")
                elif kind < 0.985:
                    tokens.append(f"({self.word()} {self.word()})")
                else:
                    tokens.append(self.word() + rng.choice(("'s", "'t", "'ll", "'re")))
        text = " ".join(tokens)
        return text[0].upper() + text[1:] + rng.choice("....!?")

    def title(self) -> str:
        """A heading of one to five words."""
        rng = self.rng
        tokens = [self.word() for _ in range(rng.randint(1, 5))]
        style = rng.randrange(4)
        if style == 0:
            text = " ".join(tokens).upper()
        elif style == 1:
            text = " ".join(token.capitalize() for token in tokens)
        else:
            text = " ".join(tokens).capitalize()
        number = rng.random()
        if number < 0.15:
            return f"{rng.randint(1, 20)}. {text}"
        if number < 0.25:
            return f"{rng.randint(1, 9)}.{rng.randint(1, 9)} {text}"
        if number < 0.3:
            return f"{rng.choice(('Chapter', 'Section', 'Part', 'Appendix'))} {rng.randint(1, 30)}: {text}"
        return text
