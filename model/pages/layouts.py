"""How pages are laid out: lines, prose, receipts, tables, headings, lists, forms, mixed styles, single words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from trtvlm.model.pages.fonts import Face
from trtvlm.model.pages.sheet import Cell, Sheet

STREAMS = ("words", "salad", "caps", "mixed", "mixed", "mixed", "numbers", "letters", "characters", "codes", "prose")
BULLETS = ("-", "*", "+", ">", "o")
# Alone on a page these cannot be taken for another character (o and O, c and C, a comma and a quote can).
LONE_CHARACTERS = "ABDEFGHJKLMNQRTYabdefghjkmnqrty2345678%&@#?$+="


def fill(sheet: Sheet, tokens: Iterator[str], face: Face, width: float) -> str:
    """Return as many tokens as fit in `width` pixels, at least the beginning of one."""
    line = ""
    for token in tokens:
        longer = f"{line} {token}" if line else token
        if not sheet.fits(longer, face, width):
            break
        line = longer
    return line or sheet.cut(token, face, width)


def aligned(sheet: Sheet, text: str, align: str, face: Face) -> float:
    """Return where a text starts so that it is left, centred or right on the sheet."""
    spare = sheet.width - sheet.measure(text, face)
    return {"left": 0.0, "centre": spare / 2, "right": spare}[align]


def above_rule(sheet: Sheet, *, thickness: int = 1) -> None:
    """Rule the sheet off above the next row, which moves down if the rule would touch letters."""
    gap = (sheet.pitch - 1) * sheet.body.height
    sheet.top += max(0, round(5 + thickness - gap))
    y = sheet.top - max(3.0, gap / 2)
    sheet.rule(0, y, sheet.width, y, thickness=thickness)


def lines(sheet: Sheet) -> None:
    """Separate lines of tokens of one kind or another, each of its own length."""
    rng = sheet.rng
    same = rng.random() < 0.5
    kind = rng.choice(STREAMS)
    align = rng.choice(("left", "left", "left", "centre", "right"))
    step = rng.choice((2, 4)) * sheet.measure(" ") if align == "left" and rng.random() < 0.25 else 0.0
    while sheet.room():
        stream = sheet.writer.stream(kind if same else rng.choice(STREAMS))
        # programs are indented by steps
        indent = min(rng.randrange(4) * step, 0.4 * sheet.width)
        width = sheet.width * (1.0 if rng.random() < 0.4 else rng.uniform(0.15, 1.0)) - indent
        text = fill(sheet, stream, sheet.body, max(width, sheet.body.height))
        if not text:
            return
        sheet.row([Cell(indent + aligned(sheet, text, align, sheet.body), text, sheet.body)])


def paragraph(sheet: Sheet, *, rows: int, align: str, indent: float = 0.0, hang: float = 0.0, first: str = "") -> None:
    """Wrapped prose of up to `rows` rows: left, justified, centred or right; `first` begins it."""
    rng = sheet.rng
    face = sheet.body
    tokens = chain([first] if first else [], sheet.writer.stream("prose" if rng.random() < 0.8 else "mixed"))
    pending = next(tokens)
    for index in range(rows):
        if not sheet.room():
            return
        left = indent if index == 0 else hang
        width = sheet.width - left
        row: list[str] = []
        while sheet.fits(" ".join([*row, pending]), face, width):
            row.append(pending)
            pending = next(tokens)
        if not row:
            # one word is longer than the line
            row, pending = [sheet.cut(pending, face, width)], next(tokens)
            if not row[0]:
                return
        last = index == rows - 1
        if last and len(row) > 2 and rng.random() < 0.7:
            row = row[: rng.randint(1, len(row))]
        text = " ".join(row)
        if align == "justified" and not last and len(row) > 1:
            _justified_row(sheet, row, left, width)
        else:
            x = left if align in {"left", "justified"} else aligned(sheet, text, align, face)
            sheet.row([Cell(x, text, face)])


def _justified_row(sheet: Sheet, row: list[str], left: float, width: float) -> None:
    widths = [sheet.measure(token) for token in row]
    gap = (width - sum(widths)) / (len(row) - 1)
    if gap > 3 * sheet.measure(" "):
        sheet.row([Cell(left, " ".join(row), sheet.body)])
        return
    cells: list[Cell] = []
    x = left
    for token, token_width in zip(row, widths, strict=True):
        cells.append(Cell(x, token, sheet.body))
        x += token_width + gap
    sheet.row(cells)


def prose(sheet: Sheet) -> None:
    """Paragraphs of sentences."""
    rng = sheet.rng
    align = rng.choice(("left", "left", "left", "justified", "justified", "centre", "right"))
    indent = min(rng.choice((0.0, 0.0, 1.0, 2.0)) * sheet.body.height, sheet.width / 4)
    if align not in {"left", "justified"}:
        indent = 0.0
    gap = rng.choice((0, 0, 0.5, 1))
    while sheet.room():
        paragraph(sheet, rows=rng.randint(2, 10), align=align, indent=indent)
        sheet.top += round(gap * sheet.body.height)


def heading(sheet: Sheet) -> None:
    """A title, perhaps larger or underlined or in a dark bar, and paragraphs under it."""
    rng = sheet.rng
    _title(sheet)
    sheet.top += round(rng.choice((0.1, 0.3, 0.6, 1.0)) * sheet.body.height)
    prose(sheet)


def _title(sheet: Sheet, *, align: str = "") -> None:
    rng = sheet.rng
    face = sheet.bold
    text = sheet.cut(sheet.writer.title(), face)
    if not text or not sheet.room(face):
        return
    x = aligned(sheet, text, align or rng.choice(("left", "left", "centre")), face)
    top, bottom = sheet.row([Cell(x, text, face)])
    style = rng.random()
    if style < 0.2:
        sheet.rule(x, bottom + 1, x + sheet.measure(text, face), bottom + 1, thickness=rng.choice((1, 2)))
    elif style < 0.3:
        sheet.rule(0, bottom + 2, sheet.width, bottom + 2, thickness=rng.choice((1, 2, 3)))
    elif style < 0.4:
        sheet.invert(-3, top - 3, sheet.width + 3, bottom + 3)
        sheet.top += 6


def listing(sheet: Sheet) -> None:
    """A list with bullets, numbers or letters, its items hanging."""
    rng = sheet.rng
    if rng.random() < 0.5:
        _title(sheet, align="left")
    style = rng.choice((*BULLETS, "1.", "1)", "(1)", "a)", "A."))
    hang = sheet.measure(style) + rng.choice((0.3, 0.6, 1.2)) * sheet.body.height
    indent = rng.choice((0, 0, 1)) * sheet.body.height
    wrap = rng.random() < 0.4
    if sheet.width - hang - indent < 4 * sheet.body.height:
        return lines(sheet)
    number = rng.randint(1, 9) if rng.random() < 0.3 else 1
    while sheet.room():
        mark = style.replace("1", str(number)).replace("a", chr(96 + number % 26)).replace("A", chr(64 + number % 26))
        if number % 26 == 0 and style in {"a)", "A."}:
            number += 1
            continue
        number += 1
        left = indent + max(hang, sheet.measure(mark + " "))
        stream = sheet.writer.stream(rng.choice(("words", "prose", "mixed", "salad")))
        columns = sheet.columns
        sheet.columns = max(4, columns - len(mark) - 1)
        text = fill(sheet, stream, sheet.body, (sheet.width - left) * rng.uniform(0.4, 1.0))
        more = fill(sheet, stream, sheet.body, sheet.width - left) if wrap and rng.random() < 0.5 else ""
        sheet.columns = columns
        if not text:
            return None
        sheet.row([Cell(indent, mark, sheet.body), Cell(left, text, sheet.body)])
        if more and sheet.room():
            sheet.row([Cell(left, more, sheet.body)])
    return None


def form(sheet: Sheet) -> None:
    """Keys and values: `Key: value`, the values right after, in a column, after dots or on a line to write on."""
    rng = sheet.rng
    writer = sheet.writer
    style = rng.choice(("inline", "inline", "column", "right", "line"))
    separator = rng.choice((":", ":", ":", " :", " =", "", "."))
    label = sheet.bold if rng.random() < 0.3 and sheet.bold.height <= 1.15 * sheet.body.height else sheet.body
    column = sheet.width * rng.uniform(0.3, 0.5)
    while sheet.room(label):
        key = " ".join(writer.word() for _ in range(rng.choice((1, 1, 1, 2)))).capitalize()
        key = sheet.cut(key + separator, label, sheet.width * 0.5)
        if not key:
            return
        space = sheet.measure(" ")
        x = sheet.measure(key, label) + space
        if style == "column":
            x = max(x + space, column)
        value = rng.choice(
            (writer.date, writer.number, writer.price, writer.name, writer.code, writer.address, writer.word)
        )()
        if rng.random() < 0.3:
            value += " " + writer.word()
        value = sheet.cut(value[: max(1, sheet.columns - len(key) - 1)], sheet.body, max(0, sheet.width - x))
        if style == "right" and value:
            x = sheet.width - sheet.measure(value)
        _, bottom = sheet.row([Cell(0, key, label), Cell(x, value, sheet.body)])
        if style == "line":
            sheet.rule(x, bottom + 1, sheet.width, bottom + 1)
            sheet.top = max(sheet.top, bottom + 4)


def receipt(sheet: Sheet) -> None:
    """A shop's receipt: name, address, items with prices at the right, total."""
    rng = sheet.rng
    writer = sheet.writer
    face = sheet.body
    if rng.random() < 0.7 and sheet.rows > 2:
        name = sheet.cut(" ".join(writer.name() for _ in range(rng.randint(1, 3))), sheet.bold)
        name = sheet.cut(name.upper(), sheet.bold) if rng.random() < 0.5 else name
        sheet.row([Cell(aligned(sheet, name, "centre", sheet.bold), name, sheet.bold)])
        if rng.random() < 0.5 and sheet.room():
            line = sheet.cut(
                rng.choice((writer.date(), writer.address(), writer.code(), f"{writer.number()} {writer.name()} St."))
            )
            sheet.row([Cell(aligned(sheet, line, "centre", face), line, face)])
    capitals = rng.random() < 0.4
    fillers = rng.choice(("", "", ".", "-")) if sheet.width > 12 * face.height else ""
    total = rng.random() < 0.6
    if rng.random() < 0.3:
        sheet.rule(0, sheet.top, sheet.width, sheet.top)
        sheet.top += 4
    while sheet.room():
        last = total and (
            len(sheet.lines) + 1 >= sheet.rows or sheet.top + 2 * sheet.pitch * face.height > sheet.height
        )
        if last:
            item = rng.choice(("TOTAL", "Total", "Sum", "Amount due", "Balance", "TOTAL EUR", "Subtotal"))
            rule = rng.random()
            if rule < 0.5:
                above_rule(sheet)
        else:
            item = " ".join(writer.word() for _ in range(rng.choice((1, 1, 2, 2, 3)))).capitalize()
            if rng.random() < 0.3:
                item = f"{rng.randint(1, 12)}{rng.choice((' ', ' x ', 'x '))}{item}"
            item = item.upper() if capitals else item
        price = rng.choice((writer.price, lambda: f"{rng.random() * 100:.2f}"))()
        price = sheet.cut(price, face, sheet.width * 0.45)
        edge = sheet.width - sheet.measure(price)
        item = sheet.cut(item[: max(1, sheet.columns - len(price) - 1)], face, edge - 2 * sheet.measure(" "))
        cells = [Cell(0, item, face), Cell(edge, price, face)]
        if fillers:
            # a leader of dots is part of the text: drawn and read
            start = sheet.measure(item) + sheet.measure(" ")
            room = min(
                int((edge - start - sheet.measure(" ")) / sheet.measure(fillers)),
                sheet.columns - len(item) - len(price) - 2,
            )
            if room > 2:
                cells.insert(1, Cell(start, fillers * rng.randint(3, room), face))
        sheet.row(cells)


def table(sheet: Sheet) -> None:
    """Rows of cells in columns two blanks or more apart, with or without rules."""
    rng = sheet.rng
    writer = sheet.writer
    face = sheet.body
    rules = rng.choice(("none", "none", "rows", "grid", "head"))
    pad = max(3, round(face.height * 0.25))
    gap = max(2 * sheet.measure(" "), face.height * 0.6) + (2 * pad if rules == "grid" else 0)
    count = rng.randint(2, 5)
    while count > 1 and (sheet.width - gap * (count - 1)) / count < 2.5 * face.height:
        count -= 1
    if count < 2:
        return lines(sheet)
    weights = [rng.uniform(0.6, 1.6) for _ in range(count)]
    usable = sheet.width - gap * (count - 1)
    widths = [usable * weight / sum(weights) for weight in weights]
    numeric = [rng.random() < 0.5 and column > 0 for column in range(count)]
    right = [is_number and rng.random() < 0.7 for is_number in numeric]
    lefts = [sum(widths[:column]) + gap * column for column in range(count)]
    characters = max(1, (sheet.columns - count + 1) // count)
    y_extra = pad if rules in {"rows", "grid"} else 0
    start = sheet.top
    sheet.top += y_extra
    marks = [start]
    index = 0
    while sheet.room():
        cells = []
        for column in range(count):
            if index == 0 and rng.random() < 0.8:
                text = writer.word().capitalize()
            elif numeric[column]:
                text = rng.choice((writer.number, writer.price, lambda: writer.digits(1, 5)))()
            else:
                text = rng.choice((writer.word, writer.name, writer.word, writer.code, writer.date))()
            if index and column and rng.random() < 0.05:
                text = rng.choice(("-", "--", "n/a", "?", "*", "yes", "no"))
            text = sheet.cut(text[:characters].strip(), face, widths[column])
            x = lefts[column] + (widths[column] - sheet.measure(text) if right[column] else 0)
            cells.append(Cell(x, text, face))
        if not any(cell.text for cell in cells):
            return None
        _, bottom = sheet.row(cells)
        sheet.top = max(sheet.top, bottom + 2 * y_extra)
        if index == 0 and rules == "head":
            above_rule(sheet, thickness=rng.choice((1, 2)))
        marks.append(sheet.top - y_extra)
        index += 1
    if rules == "grid":
        edges = [-pad, *(left - gap / 2 for left in lefts[1:]), sheet.width + pad]
        for y in marks:
            sheet.rule(edges[0], y, edges[-1], y)
        for x in edges:
            sheet.rule(x, marks[0], x, marks[-1])
    elif rules == "rows":
        for y in marks:
            sheet.rule(0, y, sheet.width, y)
    return None


def styles(sheet: Sheet) -> None:
    """Lines in two faces: another size, bold or italic, by the line or by the word."""
    rng = sheet.rng
    by_word = rng.random() < 0.5
    while sheet.room(sheet.bold):
        text = fill(sheet, sheet.writer.stream(rng.choice(STREAMS)), sheet.bold, sheet.width * rng.uniform(0.4, 1.0))
        if not text:
            return
        if not by_word:
            face = rng.choice((sheet.body, sheet.bold))
            text = sheet.cut(text, face)
            sheet.row([Cell(0, text, face)])
            continue
        cells: list[Cell] = []
        x = 0.0
        for token in text.split(" "):
            face = sheet.bold if rng.random() < 0.3 else sheet.body
            width = sheet.measure(token, face)
            if x + width > sheet.width and cells:
                break
            cells.append(Cell(x, token, face))
            x += width + max(sheet.measure(" "), sheet.measure(" ", sheet.bold))
        sheet.row(cells)


def single(sheet: Sheet) -> None:
    """One short word, number or character."""
    rng = sheet.rng
    writer = sheet.writer
    kind = rng.random()
    if kind < 0.2:
        text = rng.choice([char for char in LONE_CHARACTERS if char not in writer.avoid])
    elif kind < 0.6:
        text = writer.cased(writer.word())
    else:
        text = rng.choice((writer.number, writer.price, writer.date, writer.name, writer.code, writer.letters))()
    text = sheet.cut(text)
    if text:
        sheet.row([Cell(0, text, sheet.body)])


def blank(sheet: Sheet) -> None:
    """Nothing at all."""


LAYOUTS: dict[str, Callable[[Sheet], None]] = {
    "lines": lines,
    "prose": prose,
    "heading": heading,
    "list": listing,
    "form": form,
    "receipt": receipt,
    "table": table,
    "styles": styles,
    "single": single,
    "blank": blank,
}
