"""Every command of the README runs as it stands, on a shorter quickstart."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from launcher import run

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """The lines of the README's shell blocks, in order, without those that the Makefile's own tests cover."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    return [line for line in lines if not line.startswith(("make ", "source "))]


@pytest.fixture(scope="module")
def checkout(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `make setup data`, with a quickstart of 20 steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "hostfiles", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.copytree(small_data, folder / "data" / "python-stdlib")
    quickstart = folder / "examples" / "quickstart.toml"
    settings = quickstart.read_text(encoding="utf-8")
    short = re.sub(r"^steps = \d+", "steps = 20", settings, flags=re.MULTILINE)
    short = re.sub(r"^warmup_steps = \d+", "warmup_steps = 5", short, flags=re.MULTILINE)
    assert short != settings
    quickstart.write_text(short, encoding="utf-8")
    return folder


def test_the_readme_has_commands() -> None:
    said = "\n".join(commands())
    for word in ("horovodrun", "mpirun", "hvdlm prepare", "hvdlm evaluate", "hvdlm generate", "--resume latest"):
        assert word in said


def test_every_command(checkout: Path) -> None:
    """In order: later ones use what earlier ones made."""
    for line in commands():
        result = run(["bash", "-c", line], cwd=checkout)
        assert result.status == 0, f"{line}\n{result.output}"
    assert (checkout / "runs" / "horovodrun" / "loss.png").exists()
    assert (checkout / "data" / "mine" / "manifest.json").exists()


def test_links_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{document} links to {target}"
