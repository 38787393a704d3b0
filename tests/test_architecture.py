"""The shape of the repository: folders and links, which way imports go, what a wheel holds, what text must not say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("builder", "draft", "model", "plugins", "runtime", "scripts")
COMPILERS = {"modelopt", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx"}
WEB = {"fastapi", "prometheus_client", "starlette", "uvicorn"}


def _tracked() -> list[str]:
    """Every file git tracks that is still there, from the root."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def test_every_code_folder_has_its_link_and_nothing_else_is_there() -> None:
    entries = {path.name for path in (ROOT / "trtvlm").iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py", "py.typed", *FOLDERS}
    for name in FOLDERS:
        assert os.readlink(ROOT / "trtvlm" / name) == f"../{name}"
        assert (ROOT / "trtvlm" / name).resolve() == ROOT / name


def test_every_folder_with_code_is_a_package() -> None:
    folders = {Path(name).parent for name in _tracked() if name.endswith(".py") and name.split("/")[0] in FOLDERS}
    missing = [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()]
    assert not missing, "a wheel would leave these out without a word"


def test_imports_go_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("trtvlm.model", {*COMPILERS, *WEB, "torch", "numpy", "PIL"}),
        ("trtvlm.model.vlm trtvlm.model.checkpoint trtvlm.model.processor", {*COMPILERS, *WEB, "accelerate"}),
        ("trtvlm.plugins.replace trtvlm.plugins.quantized_checkpoint", {*COMPILERS, *WEB, "accelerate"}),
        ("trtvlm.runtime.session trtvlm.runtime.engine", {*COMPILERS, *WEB, "accelerate"}),
        ("trtvlm.draft.train", {*COMPILERS, *WEB}),
    ],
)
def test_importing_pulls_in_no_more_than_it_needs(modules: str, forbidden: set[str]) -> None:
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, *modules.split()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert not {name.partition(".")[0] for name in run.stdout.split()} & forbidden


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from the tracked files alone."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in _tracked():
        if not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    run = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("trtvlm-*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_every_file_of_the_code_folders(wheel: set[str]) -> None:
    wanted = {f"trtvlm/{name}" for name in _tracked() if name.split("/")[0] in FOLDERS and not name.endswith(".md")}
    assert len(wanted) > 100
    assert not wanted - wheel


def test_wheel_holds_nothing_but_the_package(wheel: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"trtvlm"}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel)


def test_no_file_names_a_machine_s_folders() -> None:
    pattern = re.compile(r"(?<![\w.>~])/(?:work|opt|root|home|Users)/")
    found = []
    for name in _tracked():
        if Path(name).suffix in {".py", ".md", ".toml", ".yaml", ".cu", ".cuh", ".in", ""} and (ROOT / name).is_file():
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found


def test_links_in_the_documentation_lead_somewhere() -> None:
    dead = []
    pages = [name for name in _tracked() if name.endswith(".md")]
    assert "README.md" in pages
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", prose):
            link = (target[0] or target[1]).partition("#")[0]
            if link and not re.match(r"[a-z]+:", link) and not ((ROOT / page).parent / link).exists():
                dead.append(f"{page}: {link}")
    assert not dead


def test_a_clone_stays_small() -> None:
    code = {".py", ".md", ".toml", ".cu", ".cuh"}
    sizes = {name: (ROOT / name).stat().st_size for name in _tracked() if (ROOT / name).is_file()}
    assert sum(size for name, size in sizes.items() if Path(name).suffix not in code) < 40e6
    assert sum(size for name, size in sizes.items() if re.fullmatch(r"model/nano/.*\.safetensors", name)) < 24e6


def test_makefile_knows_the_words_that_the_documentation_uses() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"setup", "lint", "types", "test", "demo", "bench", "clean"} <= targets
    said = set()
    for page in [name for name in _tracked() if name.endswith(".md")]:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = "".join(re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE))
        said |= set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", blocks, re.MULTILINE))
    assert said <= targets
