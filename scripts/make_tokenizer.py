"""Train the nano pair's tokenizer: byte-level BPE of 1,024 tokens with the official special tokens.

    python -m trtvlm.scripts.make_tokenizer [FOLDER]

Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and processor_config.json. The same sources give
the same bytes: the text comes from `model/pages/content.py` with a fixed seed, so no font is needed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtvlm.model.pages.content import Writer

VOCABULARY = 1024
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE = "<image>"
ROLES = ("<|User|>", "<|Assistant|>")
# After the vocabulary, in the order of the official tokenizers.
LATE_TOKENS = (IMAGE, "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", *ROLES)
TILE = 128
MAX_TILES = 24
PATCH = 8
DOWNSAMPLE = 2
MAX_LENGTH = 4096
SEED = 1024
# A line feed alone, a word with the blank before it, one digit with the blank before it, a run of symbols likewise,
# any other blank alone: what does not match is matched by the last branch, so nothing is lost.
PIECES = r"\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
STREAM_WEIGHTS = {"prose": 8, "mixed": 5, "words": 2, "salad": 2, "caps": 1, "codes": 1, "letters": 0.5, "numbers": 0.5}


def page_text(seed: int, lines: int) -> Iterator[str]:
    """Yield `lines` lines of the kinds of text that pages show."""
    rng = random.Random(seed)
    writer = Writer(rng)
    streams = {kind: writer.stream(kind) for kind in STREAM_WEIGHTS}
    kinds = rng.choices(list(STREAM_WEIGHTS), weights=list(STREAM_WEIGHTS.values()), k=lines)
    for kind in kinds:
        yield " ".join(next(streams[kind]) for _ in range(rng.randint(1, 9))) + "\n"


def train_tokenizer(lines: int = 150_000) -> Tokenizer:
    """Return the tokenizer: ids 0 to 2 bos, eos and pad, then 256 bytes, the merges, and the late special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(LATE_TOKENS),
        special_tokens=[_special(token) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(page_text(SEED, lines), trainer)
    tokenizer.add_special_tokens([_special(token) for token in LATE_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def candidate_resolutions(tile: int = TILE, most: int = MAX_TILES) -> list[tuple[int, int]]:
    """Return all (width, height) of at most `most` tiles, in the order of the official list.

    By the number of tiles; among the same number from the most drawn-out to the squarest, tall before wide.
    """
    grids = []
    for count in range(1, most + 1):
        for short in range(1, int(count**0.5) + 1):
            if count % short == 0:
                long = count // short
                grids += [(short, long)] if short == long else [(short, long), (long, short)]
    return [(across * tile, down * tile) for across, down in grids]


def write_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write the four files that the official processor reads, in the official layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    late = tokenizer.get_vocab_size() - len(LATE_TOKENS)
    ids = {BOS: 0, EOS: 1, PAD: 2} | {token: late + index for index, token in enumerate(LATE_TOKENS)}
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(index): {"content": token, **plain, "special": True} for token, index in ids.items()
            },
            "additional_special_tokens": list(ROLES),
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "legacy": True,
            "model_max_length": MAX_LENGTH,
            "pad_token": PAD,
            "processor_class": "DeepseekVLV2Processor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": None,
            "use_default_system_prompt": False,
        },
    )
    _write(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": [{"content": token, **plain} for token in ROLES],
            "bos_token": {"content": BOS, **plain},
            "eos_token": {"content": EOS, **plain},
            "pad_token": {"content": PAD, **plain},
        },
    )
    _write(
        folder / "processor_config.json",
        {
            "add_special_token": False,
            "candidate_resolutions": [list(size) for size in candidate_resolutions()],
            "downsample_ratio": DOWNSAMPLE,
            "ignore_id": -100,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_token": IMAGE,
            "mask_prompt": False,
            "normalize": True,
            "pad_token": PAD,
            "patch_size": PATCH,
            "processor_class": "DeepseekVLV2Processor",
            "sft_format": "deepseek",
        },
    )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run as a script: train, and write to the folder named on the command line or `model/nano/tokenizer`."""
    default = Path(__file__).resolve().parent.parent / "model" / "nano" / "tokenizer"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    tokenizer = train_tokenizer()
    write_tokenizer(folder, tokenizer)
    print(f"{tokenizer.get_vocab_size()} tokens in {folder}")


if __name__ == "__main__":
    main()
