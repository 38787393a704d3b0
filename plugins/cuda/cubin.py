"""What a cubin says of its kernels: an ELF file of 64 bits, little-endian, with a section of machine code a kernel."""

from __future__ import annotations

import struct

_SECTIONS, _ENTRY, _TEXT = 0x28, struct.Struct("<IIQQQQIIQQ"), b".text."


def code_bytes(cubin: bytes) -> dict[str, int]:
    """Kernel name -> bytes of machine code. ValueError: this is no cubin.

    The layout is that of ELF64's section headers (System V ABI, chapter 4).
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a cubin: no ELF file of 64 bits")
    (start,) = struct.unpack_from("<Q", cubin, _SECTIONS)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [_ENTRY.unpack_from(cubin, start + index * size) for index in range(count)]
    strings = headers[names][4]
    found: dict[str, int] = {}
    for name, _, _, _, _, length, *_ in headers:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)]
        if text.startswith(_TEXT):
            found[text[len(_TEXT) :].decode()] = length
    return found
