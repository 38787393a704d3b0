"""Checkpoints in the official layout: found by name, read lazily from any number of shards, checked tensor by tensor."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.random_weights import RANDOM, RandomWeights
from trtvlm.model.vlm import DeepseekVL2

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_BUNDLED = {name: Path(__file__).parent / "nano" / part for name, part in (("nano", "target"), ("nano-draft", "draft"))}

# In official checkpoints but never run: the vision tower's attention pool (ignore_head).
UNUSED = "vision.attn_pool."


def resolve_model(name_or_path: str) -> Path:
    """The folder of a checkpoint given as a bundled name ("nano", "nano-draft"), a folder, or a Hugging Face hub name.

    A hub name ("owner/name") is downloaded to the hub's cache. Raises UserError when nothing is found.
    """
    if name_or_path in _BUNDLED:
        return _BUNDLED[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"The model {name_or_path} is a file; give the folder that holds config.json and the weights.")
    if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        return _download(name_or_path)
    names = ", ".join(f"'{name}'" for name in _BUNDLED)
    raise UserError(
        f"There is no model '{name_or_path}': it is neither a folder, nor a bundled model ({names}), nor a hub name."
    )


def bundled_draft(name_or_path: str) -> str | None:
    """The draft that comes with a bundled target, if `name_or_path` names one."""
    return "nano-draft" if name_or_path == "nano" else None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The model '{name}' is not a folder here and could not be fetched from the Hugging Face hub ({reason}); "
            "check the name and the connection, or give a folder."
        ) from None


class CheckpointReader:
    """Reads single tensors of a checkpoint folder, memory-mapped, whichever shard they are in.

    A folder with RANDOM in place of its shards has random weights, made as they are read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._random: RandomWeights | None = None
        index = self.folder / INDEX
        if (self.folder / RANDOM).exists():
            self._random = RandomWeights.open(self.folder)
            self._files = dict.fromkeys(self._random.shapes, self.folder / RANDOM)
        elif index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {str(name): self.folder / _in_folder(shard) for name, shard in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is not a valid safetensors index; download it again.") from None
            self._check_shards()
        elif (self.folder / WEIGHTS).exists():
            with self._open(self.folder / WEIGHTS) as shard:
                self._files = dict.fromkeys(shard.keys(), self.folder / WEIGHTS)
        else:
            raise UserError(f"There are no weights in {self.folder}: neither {WEIGHTS} nor {INDEX}.")

    def _check_shards(self) -> None:
        for path in sorted(set(self._files.values())):
            names = [name for name, file in self._files.items() if file == path]
            if not path.exists():
                raise UserError(
                    f"The shard {path} is missing; it holds {names[0]} and {len(names) - 1} other tensors. Download it again."
                )
            with self._open(path) as shard:
                present = set(shard.keys())
            absent = [name for name in names if name not in present]
            if absent:
                raise UserError(
                    f"The shard {path} has no tensor {absent[0]}, although {INDEX} says so; download it again."
                )

    def _open(self, path: Path) -> safe_open:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); download it again.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def keys(self) -> Iterator[str]:
        """The names of all tensors, sorted."""
        return iter(sorted(self._files))

    def _file_of(self, name: str) -> Path:
        if name not in self._files:
            raise UserError(f"The checkpoint {self.folder} has no tensor {name}; is it complete, and a DeepSeek-VL2?")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self.shapes([name])[name]

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of many tensors, without reading them."""
        by_file = self._by_file(names)
        if self._random is not None:
            return {name: self._random.shapes[name] for found in by_file.values() for name in found}
        shapes: dict[str, tuple[int, ...]] = {}
        for path, found in by_file.items():
            with self._open(path) as shard:
                shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in found}
        return shapes

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises UserError when it is not in the checkpoint."""
        return next(self._read([name]))[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor's first dimension, without reading the others."""
        path = self._file_of(name)
        if self._random is not None:
            return self._random.rows(name, start, stop)
        with self._open(path) as shard:
            try:
                rows: Tensor = shard.get_slice(name)[start:stop]
            except SafetensorError as error:
                raise UserError(f"{path} is damaged at tensor {name} ({error}); download it again.") from None
        _check_type(path, name, rows)
        return rows

    def load_into(self, module: torch.nn.Module, prefix: str) -> None:
        """Copy every parameter of `module` from the tensors named `prefix` + its name, in the module's dtype and device.

        Raises UserError naming the tensor that is missing or has another shape than the configuration says.
        """
        parameters = {prefix + name: parameter for name, parameter in module.named_parameters()}
        for name, tensor in self._read(parameters):
            parameter = parameters[name]
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"The tensor {name} of {self.folder} has shape {list(tensor.shape)}, but config.json makes it "
                    f"{list(parameter.shape)}; the two do not belong together."
                )
            with torch.no_grad():
                # Moved as it is stored: to another device, a copy that converts would convert first, on one thread.
                parameter.copy_(tensor.to(parameter.device))

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        """A file is opened once for all that is read of it: a header names thousands of tensors."""
        found: dict[Path, list[str]] = {}
        for name in names:
            found.setdefault(self._file_of(name), []).append(name)
        return found

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file = self._by_file(names)
        if self._random is not None:
            yield from self._random.many(name for found in by_file.values() for name in found)
            return
        for path, found in by_file.items():
            with self._open(path) as shard:
                for name in found:
                    try:
                        tensor: Tensor = shard.get_tensor(name)
                    except SafetensorError as error:
                        raise UserError(f"{path} is damaged at tensor {name} ({error}); download it again.") from None
                    _check_type(path, name, tensor)
                    yield name, tensor


def _in_folder(shard: object) -> str:
    """The name of a shard beside its index. ValueError: it is something else."""
    if not isinstance(shard, str) or Path(shard).name != shard:
        raise ValueError
    return shard


def _check_type(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UserError(
            f"The tensor {name} of {path} has type {str(tensor.dtype).removeprefix('torch.')}, but weights are 16-bit or "
            "wider floats; give a checkpoint that is not quantized yet."
        )


def load_model(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DeepseekVL2:
    """The whole model in evaluation mode. Raises UserError naming any missing, misshapen or unknown tensor."""
    folder = resolve_model(str(name_or_path))
    config = ModelConfig.from_pretrained(folder)
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        model = DeepseekVL2(config)
    known = {name for name, _ in model.named_parameters()}
    unknown = [name for name in reader.keys() if name not in known and not name.startswith(UNUSED)]
    model = model.to(dtype).to_empty(device=device)
    reader.load_into(model, "")
    if unknown:
        raise UserError(f"The checkpoint {folder} has a tensor {unknown[0]} that its config.json has no place for.")
    return model.eval().requires_grad_(False)


def save_model(model: DeepseekVL2, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json and model.safetensors in the official layout; the folder is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = model.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
