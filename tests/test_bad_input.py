"""What was tried with bad input: every case ends with one sentence, exit status 2, and leaves nothing behind.

Each case damages a copy of a small checkpoint of two shards, or asks for something that cannot be, through the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from trtvlm.scripts.cli import cli

ROOT = Path(__file__).parent.parent
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
ATTENTION = "language.model.layers.1.self_attn.o_proj.weight"
QUICK = ("--no-compile", "--calibration-samples", "2", "--verify-samples", "0")

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is as it should be, in two shards."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("whole") / "model", "mla")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    (folder / "model.safetensors").unlink()
    weight_map = {name: shard for shard, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, alone in its folder."""
    shutil.copytree(whole, tmp_path / "here" / "model")
    return tmp_path / "here" / "model"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and no cache of engines but this one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TRTVLM_CACHE", str(tmp_path / "cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="trtvlm")


def refused(result: Result, words: str) -> None:
    """One sentence that says `words`, and nothing else."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    sentence = lines[0].removeprefix("Error: ")
    assert sentence != lines[0]
    assert words in sentence
    assert sentence[0].isupper() or sentence[0] in "/'-"
    assert sentence.endswith((".", "!", "?"))
    assert "Traceback" not in result.output
    assert "Error(" not in sentence
    assert result.stdout == ""


def below(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder there."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# Ways to damage a checkpoint


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        raw = json.loads((model / name).read_text(encoding="utf-8"))
        change(raw)
        (model / name).write_text(json.dumps(raw), encoding="utf-8")

    return damage


def _language(**values: object) -> Damage:
    return _json("config.json", lambda raw: raw["language_config"].update(values))


def _vision(**values: object) -> Damage:
    return _json("config.json", lambda raw: raw["vision_config"].update(values))


def _config(**values: object) -> Damage:
    return _json("config.json", lambda raw: raw.update(values))


def _text(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(raw)


def _remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def _folder(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def _cut(name: str, keep: float) -> Damage:
    def damage(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def _header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The first shard with a header that says something else."""

    def damage(model: Path) -> None:
        content = (model / SHARDS[0]).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        new = json.dumps(header).encode()
        (model / SHARDS[0]).write_bytes(len(new).to_bytes(8, "little") + new + content[end:])

    return damage


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """One tensor changed, in place or for another; None takes it away."""

    def damage(model: Path) -> None:
        for shard in SHARDS:
            tensors = load_file(model / shard)
            if name in tensors:
                new = change(tensors.pop(name))
                save_file(tensors | ({name: new} if new is not None else {}), model / shard)

    return damage


def _add(model: Path, name: str) -> None:
    save_file(load_file(model / SHARDS[0]) | {name: torch.zeros(2, 2)}, model / SHARDS[0])
    _json(INDEX, lambda raw: raw["weight_map"].update({name: SHARDS[0]}))(model)


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float() if abs(value) < torch.inf and abs(value) > 65504 else tensor
        tensor.view(-1)[-1] = value
        return tensor

    return change


def _tokens(change: Callable[[dict[str, Any]], object]) -> Damage:
    return _json("tokenizer.json", change)


def _without(token: str) -> Callable[[dict[str, Any]], object]:
    def change(raw: dict[str, Any]) -> None:
        raw["added_tokens"] = [entry for entry in raw["added_tokens"] if entry["content"] != token]
        raw["model"]["vocab"].pop(token, None)

    return change


def _more_tokens(raw: dict[str, Any]) -> None:
    most = max([*raw["model"]["vocab"].values(), *(entry["id"] for entry in raw["added_tokens"])])
    raw["model"]["vocab"] |= {f"token {number}": most + 1 + number for number in range(600)}


_WIDTHS = (("language", "hidden_size"), ("projector", "n_embed"))
CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    # Files
    "no config.json": (_remove("config.json"), "There is no config.json in"),
    "config.json is not JSON": (_text("config.json", "{'model_type': }"), "config.json is not valid JSON"),
    "config.json is empty": (_text("config.json", ""), "config.json is not valid JSON"),
    "config.json is no text": (_text("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config.json is a list": (_text("config.json", "[1]"), "does not hold a JSON object"),
    "config.json is nested without end": (_text("config.json", "[" * 200_000), "config.json is not valid JSON"),
    "config.json is a folder": (_folder("config.json"), "config.json cannot be read (Is a directory)"),
    "no weights": (lambda model: [(model / name).unlink() for name in (*SHARDS, INDEX)], "There are no weights in"),
    "a missing shard": (_remove(SHARDS[1]), f"{SHARDS[1]} is missing; it holds "),
    "a shard that is a folder": (_folder(SHARDS[0]), f"{SHARDS[0]} is not a whole safetensors file"),
    "an empty shard": (_text(SHARDS[0], b""), f"{SHARDS[0]} is not a whole safetensors file"),
    "a shard cut in its header": (_cut(SHARDS[0], 0.001), f"{SHARDS[0]} is not a whole safetensors file"),
    "a shard cut in its tensors": (_cut(SHARDS[1], 0.9), f"{SHARDS[1]} is not a whole safetensors file"),
    "a pointer in the place of a shard": (
        _text(SHARDS[0], "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        f"{SHARDS[0]} is not a whole safetensors file",
    ),
    # Headers
    "a header longer than the file": (_text(SHARDS[0], b"\xff" * 8 + b"{}"), "is not a whole safetensors file"),
    "a header that is not JSON": (_text(SHARDS[0], b"\x04" + b"\0" * 7 + b"nope"), "is not a whole safetensors file"),
    "tensors that overlap": (
        _header(lambda header: header[sorted(header)[1]].update(data_offsets=[0, 8])),
        "is not a whole safetensors file",
    ),
    "a type that there is not": (
        _header(lambda header: header[sorted(header)[1]].update(dtype="Q7")),
        "is not a whole safetensors file",
    ),
    # The index
    "an index that is not JSON": (_text(INDEX, "weight_map"), f"{INDEX} is not a valid safetensors index"),
    "an index of something else": (_text(INDEX, '{"weights": {}}'), f"{INDEX} is not a valid safetensors index"),
    "an index that points nowhere": (
        _json(INDEX, lambda raw: raw["weight_map"].update({ATTENTION: "elsewhere.safetensors"})),
        f"elsewhere.safetensors is missing; it holds {ATTENTION}",
    ),
    "an index that points out of the folder": (
        _json(INDEX, lambda raw: raw["weight_map"].update({ATTENTION: f"../{SHARDS[0]}"})),
        f"{INDEX} is not a valid safetensors index",
    ),
    "an index that points to the wrong shard": (
        _json(INDEX, lambda raw: raw["weight_map"].update(dict.fromkeys(raw["weight_map"], SHARDS[0]))),
        f"{SHARDS[0]} has no tensor",
    ),
    "an index without a tensor": (
        _json(INDEX, lambda raw: raw["weight_map"].pop(ATTENTION)),
        f"has no tensor {ATTENTION}",
    ),
    # Tensors
    "a tensor less": (_tensor(ATTENTION, lambda tensor: None), f"has no tensor {ATTENTION}"),
    "a tensor of another shape": (_tensor(ATTENTION, lambda tensor: tensor[1:].clone()), f"{ATTENTION} of "),
    "a tensor with its sides swapped": (
        _tensor("language.model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.t().contiguous()),
        "language.model.layers.0.mlp.up_proj.weight of ",
    ),
    "a tensor of integers": (_tensor(ATTENTION, lambda tensor: tensor.to(torch.int8)), f"{ATTENTION} of "),
    "a tensor of 8-bit floats": (_tensor(ATTENTION, lambda tensor: tensor.to(torch.float8_e4m3fn)), f"{ATTENTION} of "),
    "a tensor too many": (
        lambda model: _add(model, "language.model.layers.9.mlp.up_proj.weight"),
        "has a tensor language.model.layers.9.mlp.up_proj.weight that its config.json has no place for",
    ),
    "NaN in a layer": (_tensor(ATTENTION, _put(torch.nan)), f"{ATTENTION} holds values that are not finite"),
    "an infinity in an expert": (
        _tensor("language.model.layers.2.mlp.experts.3.down_proj.weight", _put(torch.inf)),
        "language.model.layers.2.mlp.experts.3.down_proj.weight holds values that are not finite",
    ),
    "NaN in a router": (
        _tensor("language.model.layers.2.mlp.gate.weight", _put(torch.nan)),
        "language.model.layers.2.mlp.gate.weight holds",
    ),
    "NaN in the embedding": (
        _tensor("language.model.embed_tokens.weight", _put(torch.nan)),
        "language.model.embed_tokens.weight holds",
    ),
    "an infinity in the final norm": (
        _tensor("language.model.norm.weight", _put(-torch.inf)),
        "language.model.norm.weight holds",
    ),
    "NaN in the LM head": (_tensor("language.lm_head.weight", _put(torch.nan)), "language.lm_head.weight holds"),
    "NaN in the vision tower": (
        _tensor("vision.blocks.1.mlp.fc1.weight", _put(torch.nan)),
        "vision.blocks.1.mlp.fc1.weight holds",
    ),
    "NaN in the projector": (_tensor("projector.layers.0.weight", _put(torch.nan)), "projector.layers.0.weight holds"),
    "NaN between views": (_tensor("view_seperator", _put(torch.nan)), "view_seperator holds"),
    "a value beyond float16": (_tensor("language.model.norm.weight", _put(1e5)), "beyond float16's range"),
    # A config that lies about sizes
    "another hidden size": (_language(hidden_size=128), "projector_config.n_embed"),
    "another hidden size everywhere": (
        _json(
            "config.json",
            lambda raw: [raw[f"{part}_config"].update({key: 128}) for part, key in _WIDTHS],
        ),
        "but config.json makes it",
    ),
    "no hidden size": (_language(hidden_size=0), "language_config.hidden_size"),
    "a hidden size below nothing": (_language(hidden_size=-64), "language_config.hidden_size"),
    "a hidden size in words": (_language(hidden_size="64"), "language_config.hidden_size = '64'"),
    "more experts": (_language(n_routed_experts=6), "has no tensor language.model.layers.1.mlp.experts.4"),
    "fewer experts": (_language(n_routed_experts=3), "but config.json makes it"),
    "experts without number": (_language(n_routed_experts=10**9), "language_config.n_routed_experts"),
    "more experts a token than there are": (_language(num_experts_per_tok=9), "language_config.num_experts_per_tok"),
    "experts but no width": (_language(moe_intermediate_size=0), "language_config.moe_intermediate_size"),
    "more layers": (_language(num_hidden_layers=5), "has no tensor language.model.layers.3."),
    "fewer layers": (_language(num_hidden_layers=2), "has a tensor language.model.layers.2."),
    "no layers": (_language(num_hidden_layers=0), "language_config.num_hidden_layers"),
    "layers without number": (_language(num_hidden_layers=10**12), "language_config.num_hidden_layers"),
    "more heads": (_language(num_attention_heads=4), "but config.json makes it"),
    "no heads": (_language(num_attention_heads=0), "language_config.num_attention_heads"),
    "heads that do not divide": (
        _language(use_mla=False, num_attention_heads=3, num_key_value_heads=3),
        "language_config.num_attention_heads",
    ),
    "half a head": (_language(qk_rope_head_dim=15), "language_config.qk_rope_head_dim"),
    "no latent": (_language(kv_lora_rank=None), "language_config.kv_lora_rank"),
    "another vocabulary": (_language(vocab_size=600), "but config.json makes it"),
    "a vocabulary below the tokenizer's": (_language(vocab_size=100), "tokenizer"),
    "no positions": (_language(max_position_embeddings=0), "language_config.max_position_embeddings"),
    "a norm that divides by nothing": (_language(rms_norm_eps=float("nan")), "language_config.rms_norm_eps"),
    "a rotation that does not turn": (_language(rope_theta=0.0), "language_config.rope_theta"),
    "more vision layers": (_vision(layers=3), "has no tensor vision.blocks.2."),
    "a tile of another size": (_vision(image_size=48), "candidate_resolutions"),
    "patches that leave a rest": (_vision(image_size=33, patch_size=34), "vision_config.patch_size"),
    "no vision heads": (_vision(heads=0), "vision_config.heads"),
    "no resolutions": (_config(candidate_resolutions=[]), "candidate_resolutions"),
    "a resolution of one side": (_config(candidate_resolutions=[[32]]), "candidate_resolutions"),
    "resolutions in words": (_config(candidate_resolutions="many"), "candidate_resolutions"),
    "another architecture": (_config(model_type="llama"), "model_type 'llama', which is an unknown architecture"),
    "no language model": (_config(language_config=None), "has no language_config"),
    "a vision part that is a list": (_config(vision_config=[1]), "vision_config"),
    "words in the place of the language model": (_config(language_config="big"), "has no language_config"),
    # A wrong tokenizer
    "no tokenizer": (_remove("tokenizer.json"), "There is no tokenizer.json"),
    "a tokenizer that is not JSON": (_text("tokenizer.json", "<html>"), "tokenizer.json"),
    "a tokenizer of something else": (_text("tokenizer.json", '{"model": 3}'), "tokenizer.json"),
    "a larger tokenizer": (_tokens(_more_tokens), "vocab"),
    "no image token": (_tokens(_without("<image>")), "no special token <image>:"),
    "no user token": (_tokens(_without("<|User|>")), "no special token <|User|>:"),
    "no end of sequence": (_tokens(_without("<｜end▁of▁sentence｜>")), "no special token <｜end▁of▁sentence｜>:"),
    "no padding": (_tokens(_without("<｜▁pad▁｜>")), "no special token <｜▁pad▁｜>:"),
    "tokens in a list": (_text("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "a processor for other images": (
        _json("processor_config.json", lambda raw: raw.update(patch_size=7)),
        "processor_config.json has patch_size = 7",
    ),
    "colours that are none": (
        _json("processor_config.json", lambda raw: raw.update(image_mean=[1, 2])),
        "processor_config.json has image_mean",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_not_right(model: Path, case: str) -> None:
    damage, words = CHECKPOINTS[case]
    damage(model)
    before = below(model.parent)
    refused(run("build", "--model", model, "--quant", "none", "--output", model.parent / "engine", *QUICK), words)
    assert below(model.parent) == before


# What is asked for


def _image(folder: Path, name: str = "page.png") -> Path:
    Image.new("RGB", (40, 30), "white").save(folder / name)
    return folder / name


def _cut_image(here: Path) -> Path:
    _cut("page.png", 0.7)(_image(_made(here / "x")).parent)
    return here / "x"


def _lines(folder: Path, text: str) -> Path:
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder / "samples.jsonl"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _file(path: Path, content: str = "") -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def _calibration(make: Callable[[Path], Path]) -> Callable[[Path], tuple[object, ...]]:
    return lambda here: (
        *("--model", here / "model", "--output", here / "engine", "--calibration", make(here)),
        *("--quant", "int4_awq", *QUICK),
    )


def _model(make: Callable[[Path], object]) -> Callable[[Path], tuple[object, ...]]:
    return lambda here: ("--model", make(here), "--quant", "none", "--output", here / "engine", *QUICK)


def _output(make: Callable[[Path], object], *options: object) -> Callable[[Path], tuple[object, ...]]:
    return lambda here: ("--model", here / "model", "--quant", "none", "--output", make(here), *QUICK, *options)


REQUESTS: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    # The model
    "a model nobody knows": (_model(lambda here: "nanno"), "There is no model 'nanno'"),
    "a folder that is not there": (_model(lambda here: here / "nowhere"), "There is no model"),
    "a hub name without a connection": (_model(lambda here: "nobody/nothing"), "could not be fetched"),
    "a file as model": (_model(lambda here: here / "model" / "config.json"), "is a file; give the folder"),
    "an empty folder as model": (_model(lambda here: _made(here / "empty")), "There is no config.json in"),
    # The output
    "the model's own folder": (_output(lambda here: here / "model"), "exists already"),
    "the model's own folder, to be replaced": (
        _output(lambda here: here / "model", "--overwrite"),
        "was not made by `trtvlm build` and is not overwritten",
    ),
    "an output that is there": (_output(lambda here: _file(_made(here / "x") / "y").parent), "exists already"),
    "an output that is a file": (_output(lambda here: _file(here / "x")), "exists already and is a file"),
    "an output below a file": (_output(lambda here: _file(here / "x") / "engine"), "cannot be written"),
    "an output where nobody may write": (_output(lambda here: "/proc/trtvlm/engine"), "cannot be written"),
    "an output with too long a name": (_output(lambda here: here / ("x" * 300)), "cannot be written"),
    "an output that leads to itself": (_output(lambda here: _loop(here / "loop")), "cannot be written"),
    # Calibration
    "no calibration data": (_calibration(lambda here: here / "nowhere"), "There is no calibration data at"),
    "a calibration folder without images": (_calibration(lambda here: _made(here / "x")), "holds no images"),
    "samples without a line": (_calibration(lambda here: _lines(here, "\n")), "has no samples"),
    "samples that are not JSON": (_calibration(lambda here: _lines(here, "page.png")), "Line 1 of"),
    "a sample without image": (_calibration(lambda here: _lines(here, '{"prompt": "Read"}')), "has no 'image'"),
    "a sample whose image is missing": (
        _calibration(lambda here: _lines(here, '{"image": "gone.png"}')),
        "names an image that is not there",
    ),
    "a sample whose image is a number": (_calibration(lambda here: _lines(here, '{"image": 3}')), "as strings"),
    "an image that is text": (
        _calibration(lambda here: _file(_made(here / "x") / "page.png", "text").parent),
        "page.png",
    ),
    "an image that is cut off": (
        _calibration(_cut_image),
        "page.png",
    ),
    "a prompt with two images and one given": (
        _calibration(lambda here: _lines(here, json.dumps({"image": _image(here).name, "prompt": "<image><image>"}))),
        "image",
    ),
    # Numbers
    "a chip there is no engine for": (_output(lambda here: here / "engine", "--compile", "--sm", 90), "for SM 90"),
    "more positions than the model has": (
        _output(lambda here: here / "engine", "--max-seq-len", 5000),
        "--max-seq-len 5000 is more than the 1024 positions",
    ),
    # The draft
    "a draft nobody knows": (_output(lambda here: here / "engine", "--draft", "nobody"), "There is no model 'nobody'"),
    "a draft that speaks another language": (
        _output(lambda here: here / "engine", "--draft", "nano-draft"),
        "a draft must share its target's vocabulary",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be(model: Path, case: str) -> None:
    here = model.parent
    ask, words = REQUESTS[case]
    arguments = ask(here)
    before = below(here)
    refused(run("build", *arguments), words)
    assert below(here) == before


def test_sizes_that_int4_has_no_groups_for(model: Path) -> None:
    damage = _json("config.json", lambda raw: raw["language_config"].update(moe_intermediate_size=96))
    damage(model)
    before = below(model.parent)
    refused(run("build", "--model", model, "--output", model.parent / "engine", *QUICK), "but config.json makes it")
    assert below(model.parent) == before


# Disks


@pytest.mark.parametrize("limit", [1_000, 20_000, 300_000])
def test_no_file_may_grow(model: Path, limit: int) -> None:
    """A limit of the system's on the size of a file: the configuration, the tokenizer or the weights do not fit."""
    resource = pytest.importorskip("resource")
    before, left = resource.getrlimit(resource.RLIMIT_FSIZE), below(model.parent)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = run("build", "--model", model, "--quant", "none", "--output", model.parent / "engine", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "failed (File too large); nothing was left there")
    assert below(model.parent) == left


def test_engines_that_do_not_fit(model: Path) -> None:
    """The checkpoint fits, the first engine does not, nor does it into the cache."""
    resource = pytest.importorskip("resource")
    before, left = resource.getrlimit(resource.RLIMIT_FSIZE), below(model.parent)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    arguments = ("--model", model, "--quant", "int8_wo", "--output", model.parent / "engine", *QUICK[1:])
    try:
        result = run("build", *arguments, "--max-seq-len", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "failed (File too large); nothing was left there")
    assert below(model.parent) == left


@pytest.fixture
def mounted(tmp_path: Path) -> Callable[[str], Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs the command line where a small disk of its own, mounted with the given options, is at `tmp_path`/disk."""
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        tried = subprocess.run([*unshare, f"mount -t tmpfs none '{tmp_path}/disk'"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if tried.returncode:
        pytest.skip("namespaces of one's own are not allowed")

    def on(options: str) -> Callable[..., subprocess.CompletedProcess[str]]:
        def build(*arguments: object) -> subprocess.CompletedProcess[str]:
            script = (
                f"mount -t tmpfs -o {options} none '{tmp_path}/disk' && shift && \"$@\"; status=$?; "
                f"ls -A '{tmp_path}/disk'; exit $status"
            )
            command = [sys.executable, "-m", "trtvlm.scripts.cli", "build", *map(str, arguments)]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            return subprocess.run(
                [*unshare, script, "sh", "-", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
            )

        return build

    return on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=256k", "failed (No space left on device); nothing was left there"),
        ("ro", "cannot be written (Read-only file system)"),
    ],
)
def test_a_disk_that_is_full_or_only_for_reading(
    model: Path, tmp_path: Path, mounted: Any, options: str, words: str
) -> None:
    output = tmp_path / "disk" / "engine"
    result = mounted(options)("--model", model, "--quant", "none", "--output", output, *QUICK)
    assert result.returncode == 2, result.stderr
    assert result.stdout == "", "something is left on the disk"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]


# What a build made, damaged afterwards


@pytest.fixture(scope="module")
def engine(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "engine"
    result = run("build", "--model", whole, "--quant", "int8_wo", "--output", folder, *QUICK)
    assert result.exit_code == 0, result.output
    return folder


ENGINES: dict[str, tuple[Damage, str]] = {
    "no engine": (lambda engine: shutil.rmtree(engine), "There is no config.json in"),
    "a config that is not JSON": (_text("config.json", "?"), "config.json cannot be read"),
    "a config of something else": (_text("config.json", "{}"), "is not an engine directory"),
    "another version": (
        _json("config.json", lambda raw: raw["trtvlm"].update(format_version=99)),
        "has format version 99",
    ),
    "no weights": (_remove("rank0.safetensors"), "rank0.safetensors is not a whole safetensors file"),
    "weights cut off": (_cut("rank0.safetensors", 0.5), "rank0.safetensors is not a whole safetensors file"),
    "no vision part": (_remove("vision/vision.safetensors"), "vision.safetensors is not the whole vision part"),
    "a vision part cut off": (
        _cut("vision/vision.safetensors", 0.5),
        "vision.safetensors is not the whole vision part",
    ),
    "another model's configuration": (
        _json("model_config.json", lambda raw: raw["language_config"].update(vocab_size=600)),
        "rank0.safetensors has ",
    ),
    "no tokenizer": (_remove("tokenizer.json"), "There is no tokenizer.json"),
    "no image": (lambda engine: (engine.parent / "page.png").unlink(), "page.png"),
    "an image that is text": (lambda engine: _file(engine.parent / "page.png", "text"), "page.png"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_an_engine_that_is_not_right(engine: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(engine, tmp_path / "engine")
    image = _image(tmp_path)
    damage, words = ENGINES[case]
    damage(tmp_path / "engine")
    refused(run("generate", "--engine", tmp_path / "engine", "--image", image, "--max-new-tokens", 1), words)
