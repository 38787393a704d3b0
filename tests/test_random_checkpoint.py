"""Random checkpoints of the official layout: written or made on demand, they are the same and can be loaded."""

import json
from pathlib import Path

import pytest
import torch

from trtvlm.model.checkpoint import CheckpointReader, load_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.presets import preset
from trtvlm.model.processor import Processor
from trtvlm.model.random_weights import BLOCK, RandomWeights
from trtvlm.scripts.make_random_checkpoint import mid_size, size_of, write_random_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mid")
    write_random_checkpoint(folder, size_of("mid", 2), seed=3, shard=20_000_000, processes=1)
    return folder


def test_the_official_layout(written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    shards = {path.name for path in written.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) > 1
    assert index["metadata"]["total_size"] == sum(
        CheckpointReader(written).get(name).nbytes for name in index["weight_map"]
    )
    model = load_model(written)
    assert model.config == size_of("mid", 2)
    assert Processor.from_pretrained(written).ask([], "hello").input_ids.max() < model.config.language.vocab_size
    weight = model.language.model.layers[1].mlp.experts[5].up_proj.weight
    assert float(weight.std() * weight.shape[1] ** 0.5) == pytest.approx(1, abs=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)


def test_on_demand_gives_the_written_values(written: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, size_of("mid", 2), seed=3, on_demand=True)
    assert not list(tmp_path.glob("*.safetensors"))
    stored, made = CheckpointReader(written), CheckpointReader(tmp_path)
    assert list(stored.keys()) == list(made.keys())
    for name in stored.keys():
        assert stored.shape(name) == made.shape(name)
        assert torch.equal(stored.get(name), made.get(name))
    name = "language.model.embed_tokens.weight"
    assert torch.equal(stored.rows(name, 7, 99), made.get(name)[7:99])
    assert torch.equal(made.rows(name, 7, 99), made.get(name)[7:99])
    assert torch.equal(load_model(tmp_path).projector.layers[0].weight, load_model(written).projector.layers[0].weight)


def test_tensors_differ_by_name_and_seed() -> None:
    first, second = RandomWeights(mid_size(), 0), RandomWeights(mid_size(), 1)
    one, other = (f"language.model.layers.1.mlp.experts.{number}.up_proj.weight" for number in (0, 1))
    assert not torch.equal(first.get(one), first.get(other))
    assert not torch.equal(first.get(one), second.get(one))


def test_a_part_of_a_tensor_of_many_blocks() -> None:
    weights = RandomWeights(preset("deepseek-vl2-tiny"), threads=2)
    name = "language.model.layers.0.mlp.down_proj.weight"
    rows, width = weights.shapes[name]
    assert rows * width > 2 * BLOCK
    assert torch.equal(weights.rows(name, 100, 400), weights.get(name)[100:400])


@pytest.mark.parametrize("text", ["{", "{}", '{"seed": -1}', '{"seed": "a"}'])
def test_a_damaged_seed_is_one_sentence(written: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text((written / "config.json").read_text())
    (tmp_path / "random_weights.json").write_text(text)
    with pytest.raises(UserError, match="make the checkpoint again"):
        CheckpointReader(tmp_path)
    assert ModelConfig.from_pretrained(tmp_path) == size_of("mid", 2)
