"""A trained draft -> a checkpoint directory that the builder takes like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trtvlm.model.artifacts import PROCESSOR_FILES, atomic_directory
from trtvlm.model.checkpoint import save_model
from trtvlm.model.errors import UserError
from trtvlm.model.vlm import DeepseekVL2

LOG = "training_log.jsonl"


def package(draft: DeepseekVL2, processor_folder: Path, log: Sequence[dict[str, Any]], output: Path) -> None:
    """Write the official layout to `output`, all of it or nothing.

    config.json, model.safetensors (float16), the tokenizer and processor files of `processor_folder` and the training
    log, whose last line is the measurement.

    Raises UserError when `output` exists and is not empty, or a weight is not finite in float16.
    """
    for name, parameter in draft.named_parameters():
        if not bool(torch.isfinite(parameter.detach().to(torch.float16)).all()):
            raise UserError(f"The trained draft's {name} is not finite in float16: train again with a lower --lr.")
    with atomic_directory(output) as folder:
        save_model(draft, folder, torch.float16)
        for file in PROCESSOR_FILES:
            if (processor_folder / file).is_file():
                shutil.copyfile(processor_folder / file, folder / file)
        lines = "".join(json.dumps(row) + "\n" for row in log)
        (folder / LOG).write_text(lines, encoding="utf-8")
