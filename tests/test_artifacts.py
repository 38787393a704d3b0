"""Directories made whole or not at all, and the file that is written tensor by tensor."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trtvlm.builder.stream import SafetensorsWriter
from trtvlm.model.artifacts import EngineDir, atomic_directory, digests, write_json
from trtvlm.model.errors import UserError


def test_a_finished_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_one_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), atomic_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_it_may_go(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(UserError, match="exists already"), atomic_directory(old):
        pass
    with pytest.raises(UserError, match="not made by `trtvlm build`"), atomic_directory(old, overwrite=True):
        pass
    EngineDir(old).report_file.write_text("{}")
    with pytest.raises(RuntimeError), atomic_directory(old, overwrite=True):
        raise RuntimeError
    assert (old / "a").read_text() == "old"
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_directory(link, overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in old.iterdir()] == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = tmp_path / "out"
    old.mkdir()
    EngineDir(old).report_file.write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == old and (self / "new").exists():
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_directory(old, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert EngineDir(old).report_file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_digests_cover_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "empty").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    assert digests(tmp_path) == {
        "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "deep/empty": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }


def test_other_directories_are_refused(tmp_path: Path) -> None:
    engine = EngineDir(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        engine.config()
    write_json(engine.config_file, {"model_type": "deepseek_vl_v2"})
    with pytest.raises(UserError, match="not an engine directory"):
        engine.config()
    write_json(engine.config_file, {"pretrained_config": {}, "build_config": {}, "trtvlm": {"format_version": 99}})
    with pytest.raises(UserError, match="format version 99"):
        engine.config()
    assert engine.draft is None


_TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from([torch.float32, torch.float16, torch.int8]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@given(_TENSORS, st.randoms(use_true_random=False))
def test_streamed_files_read_back_in_any_order(tmp_path_factory: pytest.TempPathFactory, what: dict, random) -> None:  # type: ignore[no-untyped-def,type-arg]
    folder = tmp_path_factory.mktemp("stream")
    tensors = {name: torch.randint(-9, 9, tuple(shape)).to(dtype) for name, (dtype, shape) in what.items()}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    contents = []
    for attempt in range(2):
        names = list(tensors)
        random.shuffle(names)
        path = folder / f"{attempt}.safetensors"
        with SafetensorsWriter(path, layout) as writer:
            for name in names:
                writer.write(name, tensors[name])
        contents.append(path.read_bytes())
        found = load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in names)
    assert contents[0] == contents[1]


def test_streaming_refuses_what_the_layout_does_not_say(tmp_path: Path) -> None:
    layout = {"a": (torch.int8, (2,)), "b": (torch.int8, (2,))}
    with pytest.raises(ValueError, match="never written: b"), SafetensorsWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2, dtype=torch.int8))
        with pytest.raises(ValueError, match="written before"):
            writer.write("a", torch.zeros(2, dtype=torch.int8))
        with pytest.raises(ValueError, match="the layout says"):
            writer.write("b", torch.zeros(3, dtype=torch.int8))
