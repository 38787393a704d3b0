"""Copy the fonts that pages are drawn in, cut down to the characters drawn, into a folder that can travel.

    python -m trtvlm.scripts.collect_fonts FOLDER
    TRTVLM_FONTS=FOLDER python -m trtvlm.scripts.train_nano ...

Needs fontTools (the `train` extra).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from trtvlm.model.errors import UserError
from trtvlm.model.pages.fonts import families, missing_characters
from trtvlm.model.pages.typography import SPECIAL

MANIFEST = "manifest.json"
MAX_BYTES = 18_000_000


def collect_fonts(folder: str | Path) -> dict[str, dict[str, str]]:
    """Write every installed font of both splits that has all of ASCII to `folder`, subset to what pages show.

    Returns what is written to `manifest.json` as well: for each file its family, split and the SHA-256 of the original.
    Raises UserError if the fonts together are larger than 18 MB, or none is installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    total = 0
    for split in ("train", "heldout"):
        for group in families(split):
            for font in group:
                if missing_characters(font.path):
                    continue
                source = Path(font.path)
                data = source.read_bytes()
                target = folder / source.name
                _write_subset(source, target)
                total += target.stat().st_size
                manifest[source.name] = {
                    "family": font.family,
                    "split": split,
                    "original_sha256": hashlib.sha256(data).hexdigest(),
                }
    if total > MAX_BYTES:
        raise UserError(
            f"The fonts in {folder} are {total / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: install fewer families."
        )
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return manifest


def _write_subset(source: Path, target: Path) -> None:
    from fontTools import subset  # type: ignore[import-untyped]

    options = subset.Options(
        hinting=True,
        notdef_outline=True,
        layout_features=[],
        name_IDs=[0, 1, 2, 4, 5, 6, 13, 14],  # copyright and licence stay with the font
        drop_tables=[*subset.Options().drop_tables, "GSUB", "GPOS", "GDEF", "FFTM", "PfEd", "DSIG"],
        legacy_kern=True,
    )
    with subset.load_font(str(source), options) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=[*range(32, 127), *map(ord, SPECIAL)])
        subsetter.subset(font)
        subset.save_font(font, str(target), options)


def main() -> None:
    """Run as a script: collect into the folder named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m trtvlm.scripts.collect_fonts FOLDER")
    manifest = collect_fonts(sys.argv[1])
    print(f"{len(manifest)} fonts in {sys.argv[1]}")


if __name__ == "__main__":
    main()
