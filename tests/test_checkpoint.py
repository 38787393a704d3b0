"""Checkpoints that are whole, sharded, damaged or of something else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GOLDEN, tiny_checkpoint, tiny_config, tiny_model
from trtvlm.model.checkpoint import CheckpointReader, bundled_draft, load_model, resolve_model, save_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError


def _shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(2):
        names = sorted(tensors)[number::2]
        save_file({name: tensors[name] for name in names}, folder / f"part{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["mla", "mha", "base"])
def test_saved_models_load_again_whole_or_sharded(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path, kind)
    expected = {name: tensor.half().float() for name, tensor in tiny_model(kind).state_dict().items()}
    for _ in range(2):
        found = load_model(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if (folder / "model.safetensors").exists():
            _shard(folder)


def test_configurations_round_trip_and_sparse_ones_take_the_official_defaults() -> None:
    for kind in ("mla", "mha", "base"):
        config = tiny_config(kind)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = ModelConfig.from_pretrained(GOLDEN / "small-like" / "model").language
    assert (small.use_mla, small.rope_theta, small.rms_norm_eps, small.routed_scaling_factor) == (True, 1e4, 1e-6, 1.0)
    assert (small.scoring_func, small.norm_topk_prob, small.q_lora_rank) == ("softmax", False, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "unknown architecture"),
        ({"tile_tag": "1D"}, "tile_tag"),
        ({"language_config": None}, "no language_config"),
        ({"language_config.scoring_func": "tanh"}, "scoring_func"),
        ({"language_config.topk_method": "gready"}, "topk_method"),
        ({"language_config.rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"language_config.hidden_size": "64"}, "not of the right type"),
        ({"language_config.hidden_size": 65}, "n_embed"),
        ({"language_config.num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"vision_config.heads": 5}, "heads"),
        ({"candidate_resolutions": [[33, 32]]}, "candidate_resolutions"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(change: dict[str, object], sentence: str) -> None:
    raw = tiny_config("mla").to_dict()
    for key, value in change.items():
        *sections, name = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        place[name] = value
    with pytest.raises(UserError, match=sentence):
        ModelConfig.from_dict(raw)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    assert bundled_draft("nano") == "nano-draft"
    assert bundled_draft(str(tmp_path)) is None
    with pytest.raises(UserError, match="no model 'nanoo'"):
        resolve_model("nanoo")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mla")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = "language.model.layers.2.mlp.experts.3.down_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(UserError, match=name):
        load_model(folder)
    save_file(tensors | {name: torch.zeros(3, 3)}, weights)
    with pytest.raises(UserError, match=rf"{name} .* shape \[3, 3\]"):
        load_model(folder)
    save_file(tensors | {"language.extra": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"language\.extra"):
        load_model(folder)
    save_file(tensors | {"vision.attn_pool.latent": torch.zeros(3)}, weights)
    load_model(folder)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "mla")
    _shard(folder)
    (folder / "part1.safetensors").rename(folder / "gone")
    with pytest.raises(UserError, match=r"part1\.safetensors is missing"):
        CheckpointReader(folder)
    save_file({"other": torch.zeros(1)}, folder / "part1.safetensors")
    with pytest.raises(UserError, match="has no tensor"):
        CheckpointReader(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not a valid safetensors index"):
        CheckpointReader(folder)


def test_saving_keeps_the_dtype_in_the_configuration(tmp_path: Path) -> None:
    save_model(tiny_model("mha"), tmp_path, torch.bfloat16)
    assert ModelConfig.from_pretrained(tmp_path).torch_dtype == "bfloat16"
    assert load_model(tmp_path).language.lm_head.weight.dtype == torch.float32
