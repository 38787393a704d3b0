"""CUDA C++ as C++ for runtime.hpp: headers inlined, PTX instructions as calls, kernels in a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trtvlm.plugins.cuda.compiler import INCLUDE, PLUGINS

Edit = Callable[[str], str]
"""What a test makes of a kernel's text before it is compiled."""

_INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)"[^\n]*$', re.M)
_ASM = re.compile(r"\basm(?:\s+volatile)?\s*\(")
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?(\w+)\s+(\w+)\[\];")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:(__launch_bounds__)\s*\()?')
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def translate(source: str) -> str:
    """A CUDA C++ source of this repository as the text of a library with the function `emulated_launch`.

    ValueError: assembly of a form that is not understood. Instructions that ptx.hpp lacks are the compiler's to name.
    """
    text = _without_comments(_inline(source, set()))
    text = _calls(text)
    text = _DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(emulation::block->dynamic);", text)
    kernels = []
    while found := _KERNEL.search(text):
        bounds, end = "1024", found.end()
        if found[1]:
            end = _closing(text, end - 1) + 1
            bounds = text[found.end() : end - 1]
        name = re.compile(r"\s*(\w+)").match(text, end)
        assert name is not None
        kernels.append((name[1], bounds))
        # Kernels may stand between #if and #endif.
        text = f"{text[: found.start()]}\n#define EMULATED_{name[1]}\nstatic void {text[end:]}"
    rows = "".join(_entry(name, bounds) for name, bounds in kernels)
    return f'#include "runtime.hpp"\nnamespace {{\n{text}\n}}\n{rows}'


def _entry(name: str, bounds: str) -> str:
    return f"""
#ifdef EMULATED_{name}
template <class... P> static void emulated_call_{name}(void (*)(P...), void** values) {{
    emulation::call<P...>(&{name}, values, std::index_sequence_for<P...>());
}}
extern "C" const char* emulated_kinds_{name}() {{ return emulation::kinds_of(&{name}); }}
extern "C" const char* emulated_launch_{name}(unsigned gx, unsigned gy, unsigned gz, unsigned threads, int shared,
                                              const emulation::Options* options, void** values) {{
    return emulation::launch([](void** v) {{ emulated_call_{name}(&{name}, v); }}, gx, gy, gz, threads,
                             emulation::first_of({bounds}), shared, options, values);
}}
#endif
"""


def _inline(text: str, seen: set[Path]) -> str:
    def header(found: re.Match[str]) -> str:
        file = next((folder / found[1] for folder in (INCLUDE, PLUGINS) if (folder / found[1]).exists()), None)
        if file is None:
            # Beside the file that includes it: as the compiler looks first.
            near = [path / found[1] for path in {one.parent for one in seen} if (path / found[1]).exists()]
            if len(near) != 1:
                raise ValueError(f"there is no header {found[1]}")
            (file,) = near
        if file in seen:
            return ""
        seen.add(file)
        return _inline(file.read_text(encoding="utf-8").replace("#pragma once", ""), seen)

    return _INCLUDE.sub(header, text)


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", "", text), flags=re.S)


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        if not quoted:
            depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is never closed: {text[at : at + 60]}")


def _split(text: str, separator: str) -> list[str]:
    """Pieces between separators that stand outside of brackets and strings; `::` separates nothing, nor is it two colons."""
    pieces, depth, quoted, start = [], 0, False, 0
    for i, letter in enumerate(text):
        if letter == '"' and (i == 0 or text[i - 1] != "\\"):
            quoted = not quoted
        if quoted:
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def _calls(text: str) -> str:
    """Every asm statement as calls of ptx:: functions: the name of the instruction, its operands from left to right."""
    out, at = [], 0
    while found := _ASM.search(text, at):
        end = _closing(text, found.end() - 1)
        out += [text[at : found.start()], _call(text[found.end() : end])]
        at = end + 1
    return "".join([*out, text[at:]])


def _call(statement: str) -> str:
    parts = _split(statement, ":")
    template = "".join(_STRING.findall(parts[0]))
    operands = []
    for part in parts[1:3]:
        for operand in _split(part, ","):
            if operand.strip():
                operands.append(operand[operand.index('"', operand.index('"') + 1) + 1 :].strip())
    calls = []
    for instruction in filter(
        None, (one.strip() for one in template.replace("\\n", " ").replace("\\t", " ").split(";"))
    ):
        name, _, rest = instruction.partition(" ")
        if not re.fullmatch(r"[a-z][\w.:]*", name) or re.search(r"[@<>|!]", rest):
            raise ValueError(f"the emulator does not understand this assembly: {instruction}")
        words = [word.strip() for word in re.sub(r"[\[\]{}]", " ", rest).split(",")]
        values = [re.sub(r"%(\d+)", lambda number: operands[int(number[1])], word) for word in words if word]
        calls.append(f"ptx::{re.sub(r'[.:]+', '_', name)}({', '.join(values)})")
    return f"({', '.join(calls) or 'void()'})"
