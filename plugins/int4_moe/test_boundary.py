"""int4_moe between segments: the one kernel it uses that a fused step does not; plugins/tensorrt/ has the launches' tests."""

import pytest
import torch

from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.memory import Piece, carve, total_bytes
from trtvlm.plugins.int4_linear import decode as linear


@pytest.mark.parametrize("model", [*SIZES, "nano", "nano-draft"])
def test_the_shared_experts_first_half_compiles_without_a_norm(model: str) -> None:
    config = language_size(model)
    width = config.moe_intermediate_size * (config.n_shared_experts or 0)
    macros, _, warps = linear.macros(
        config.hidden_size, 2 * width // 16, 0, epilogue=linear._GATED, normalised=False, scaled=True, one_row=False
    )
    _, kernels = compile_source((PLUGINS / linear.SOURCE).read_text(), dict(macros), "sm_86")
    usage = kernels["linear"]
    assert usage.spilled == usage.stack == 0
    assert usage.registers * 32 * warps <= 65536
    assert linear.shared_bytes(config.hidden_size, warps, 8, tiles=2, staged=False) <= SHARED_LIMIT


def test_pieces_of_a_workspace_do_not_overlap() -> None:
    pieces = [Piece(torch.half, (3, 5)), Piece(torch.int32, (1,)), Piece(torch.float32, (2, 2, 2))]
    assert total_bytes(pieces) == 768
    memory = torch.full((768,), 255, dtype=torch.uint8)
    parts = carve(memory, pieces)
    for number, part in enumerate(parts):
        assert (part.data_ptr() - memory.data_ptr()) % 256 == 0
        part.fill_(number)
    assert [part.float().mean().item() for part in parts] == [0, 1, 2]
    with pytest.raises(ValueError, match="767 bytes of workspace are too few for 768"):
        carve(memory[:767], pieces)
