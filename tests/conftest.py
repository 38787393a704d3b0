"""What several files of tests need and takes seconds to make."""

import pytest

from tests.graphs import CONTEXT, engine_directory
from trtvlm.model.artifacts import EngineDir


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> EngineDir:
    """`tests.graphs.engine_directory`: latent attention and experts, with a draft of plain attention. Not to be written to."""
    return engine_directory(tmp_path_factory.mktemp("graphs") / "engine", "mla", CONTEXT, draft="mha")
