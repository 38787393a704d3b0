"""The directories the project writes: made whole or not at all, and the only place that knows their file names.

An engine directory is laid out as TensorRT-LLM's: config.json (version, pretrained_config, build_config) and
rank0.safetensors (the quantized language model). Beside them stand the vision part, the compiled engines, the
processor's files and, in `draft/`, the same layout again for the draft.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError

FORMAT_VERSION = 1
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json")


@dataclass(frozen=True)
class EngineDir:
    """The file names of an engine directory, or of its `draft/`; nothing is read before it is asked for."""

    path: Path

    @property
    def config_file(self) -> Path:
        """TensorRT-LLM's config.json."""
        return self.path / "config.json"

    @property
    def model_config_file(self) -> Path:
        """The checkpoint's own config.json."""
        return self.path / "model_config.json"

    @property
    def weights(self) -> Path:
        """The language model: quantized, TensorRT-LLM's names and layout."""
        return self.path / "rank0.safetensors"

    @property
    def engine(self) -> Path:
        """The whole language model as one engine, where it is not a chain of them: TensorRT-LLM's name."""
        return self.path / "rank0.engine"

    @property
    def vision(self) -> Path:
        """The folder of the vision tower and projector: vision.safetensors, vision.onnx, vision.engine."""
        return self.path / "vision"

    @property
    def vision_weights(self) -> Path:
        """The vision tower, the projector and the two layout vectors, 16 bit, with the checkpoint's names."""
        return self.vision / "vision.safetensors"

    @property
    def language(self) -> Path:
        """The folder of the language model's graphs and engines, and of chain.json, which joins them."""
        return self.path / "language"

    @property
    def report_file(self) -> Path:
        """What was built, how long it took, how well it answers, and a digest of every file."""
        return self.path / "build_report.json"

    @property
    def draft(self) -> EngineDir | None:
        """The draft's directory, if there is one."""
        return EngineDir(self.path / "draft") if (self.path / "draft").is_dir() else None

    def config(self) -> dict[str, Any]:
        """Read config.json. Raises UserError when this is no engine directory, or one of another version."""
        config = _read_json(self.config_file)
        if not isinstance(config.get("pretrained_config"), dict) or not isinstance(config.get("build_config"), dict):
            raise UserError(
                f"{self.path} is not an engine directory: its config.json has no pretrained_config; run `trtvlm build`."
            )
        version = config.get("trtvlm", {}).get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.path} has format version {version}, but this trtvlm reads {FORMAT_VERSION}: build it again."
            )
        return config

    def model_config(self) -> ModelConfig:
        """The model's own configuration."""
        return ModelConfig.from_dict(_read_json(self.model_config_file))

    def report(self) -> dict[str, Any]:
        """Read build_report.json."""
        return _read_json(self.report_file)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no {path.name} in {path.parent}: give a directory that `trtvlm build` made."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): build the engine again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a JSON object: build the engine again.")
    return raw


def write_json(path: Path, value: Any) -> None:
    """Write `value` readably, with sorted keys, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to it, sorted."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write into; it becomes `path` when the block ends well, else it is removed.

    A link is followed. Raises UserError when `path` exists and may not be replaced (`check_free`), or cannot be written.
    """
    path = resolved(path)
    check_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give an output in a folder you may write."
        ) from None
    try:
        temporary.chmod(0o755)
        yield temporary
        _replace(path, temporary)
    except OSError as error:
        raise UserError(f"Writing {path} failed ({error.strerror or error}); nothing was left there.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(path: Path, new: Path) -> None:
    """Move `new` to `path`; what was there goes only once `new` has its place, and comes back if it does not get it."""
    if not path.exists():
        new.rename(path)
        return
    old = new.with_name(new.name + ".old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def resolved(path: str | Path) -> Path:
    """Where an output will be, links followed. UserError: no folder can be there."""
    try:
        found = Path(path).expanduser().resolve()
        found.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
        reason = getattr(error, "strerror", None) or "a link leads to itself"
        raise UserError(f"{path} cannot be written ({reason}): give another output.") from None
    return found


def check_free(path: Path, overwrite: bool = False) -> None:
    """Raise UserError unless `path` is absent, an empty folder, or, with `overwrite`, an engine directory.

    Nothing else is ever replaced: a mistyped output must not cost a checkpoint or a home directory.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} exists already and is a file: give a directory as output.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{path} exists already: give another output, delete it, or overwrite it.")
    if not EngineDir(path).report_file.is_file():
        raise UserError(
            f"{path} was not made by `trtvlm build` and is not overwritten: give another output, or delete it yourself."
        )
