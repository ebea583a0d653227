"""What the documentation names exists: files, links, settings, tests, fields, import rules."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_house import MAY_IMPORT

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.gradients.sync import Traffic
from hvdlm.timing import StepTimer
from hvdlm.training.step_metrics import StepMetrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ARCHITECTURE = DOCS / "architecture.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "hostfiles" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "custom_codec" / "README.md",
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def section_of(page: Path, heading: str) -> str:
    """What stands between a heading and the next one of its level or above."""
    level = heading.split()[0]
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", text_of(page), re.M | re.S)
    assert found, f"{name_of(page)} has no heading {heading!r}"
    return found[1]


def rows_of(section: str) -> list[list[str]]:
    """The cells of a section's tables, without heads."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = [index for index, row in enumerate(rows) if set("".join(row)) <= {"-"} and any(row)]
    return [row for index, row in enumerate(rows) if index not in heads and index + 1 not in heads]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


# ---- settings


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_settings", DOCS / "generate_settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_current() -> None:
    assert text_of(DOCS / "settings.md") == generator().page(), "run python docs/generate_settings.py"


SETTINGS = {
    f"{name}.{key}"
    for name, section in Config.model_fields.items()
    if section.annotation is not None
    for key in section.annotation.setting_fields()
}


def settings_named(text: str) -> Iterator[str]:
    """Words such as `train.steps`, and options such as --train.steps, but no files, such as `model.safetensors`."""
    sections = "|".join(Config.model_fields)
    for name in re.findall(rf"(?<![\w./])(?:--)?((?:{sections})\.[a-z][a-z0-9_]*)(?![\w./]*\()", text):
        if name.rpartition(".")[2] not in ("py", "png", "md", "safetensors", "jsonl", "json", "toml"):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    text = text_of(page)
    if page.name == "CHANGELOG.md":
        text = text.partition("### Renamed")[0]
    assert sorted(set(settings_named(text)) - SETTINGS) == []


def test_this_test_sees_settings() -> None:
    text = "`train.stepz`, --model.layers=2, `model.safetensors`, hvdlm/model/loss.py, loss.png and checkpoint.save()"
    assert list(settings_named(text)) == ["train.stepz", "model.layers"]


# ---- links, files, tests


def anchors_of(page: Path) -> set[str]:
    """As a browser on the repository makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", text_of(page))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{name_of(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Paths from the root of the repository."""
    text = text_of(page)
    if page.name == "CHANGELOG.md":
        text = text.partition("### Renamed")[0]
    paths = [
        name
        for name in quoted(text)
        if re.fullmatch(r"(hvdlm|tests|benchmarks|docs|examples|hostfiles)/[\w./-]*", name)
    ]
    missing = [path for path in paths if not (ROOT / path).exists() and "NAME" not in path]
    assert missing == []


def defined_tests() -> set[str]:
    found = set()
    for file in (ROOT / "tests").rglob("*.py"):
        found.update(re.findall(r"^(?:async )?def ((?:test|check)_\w+)", text_of(file), re.M))
    return found


def test_every_test_that_is_named_exists() -> None:
    named = {name for page in PAGES for name in quoted(text_of(page)) if re.fullmatch(r"(test|check)_\w+", name)}
    assert len(named) > 50
    assert sorted(named - defined_tests() - {field for field, *_ in rows_of(text_of(DOCS / "settings.md"))}) == []


def test_every_fault_has_a_test() -> None:
    tables = text_of(DOCS / "faults.md").partition("## Signals")[2]
    without = [row[0] for row in rows_of(tables) if not re.search("`(test|check)_", row[-1])]
    assert without == []


# ---- architecture


def tree() -> list[Path]:
    """The paths of the folder tree, by indentation; several on a line where they are apart by two blanks."""
    block = re.search(r"^```text\n(.*?)^```", section_of(ARCHITECTURE, "## The house"), re.M | re.S)
    assert block
    paths: list[Path] = []
    folders: list[Path] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        parent = folders[-1] if folders else Path()
        first, *others = re.split(r"  +", line.strip())
        paths += [parent / name for name in [first, *others] if name == first or re.fullmatch(r"[\w.]+/", name)]
        folders.append(parent / first)
    return paths


def test_the_tree_names_what_is_there() -> None:
    paths = tree()
    assert len(paths) > 80
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_names_all_of_the_package() -> None:
    """Every folder, and every file of a folder of which it names some."""
    named = set(tree())
    listed = {path.parent for path in named if path.suffix == ".py"}
    package = [path.relative_to(ROOT) for path in (ROOT / "hvdlm").rglob("*") if "__pycache__" not in path.parts]
    folders = [path for path in package if (ROOT / path / "__init__.py").exists()]
    files = [path for path in package if path.suffix == ".py" and path.parent in listed and path.stem[0] != "_"]
    assert [str(path) for path in [*folders, *files] if path not in named] == []


def test_import_rules_are_those_that_are_enforced() -> None:
    rules = {
        quoted(room)[0]: set(quoted(others)) for room, others in rows_of(section_of(ARCHITECTURE, "## Import rules"))
    }
    assert rules == MAY_IMPORT


@pytest.mark.parametrize(("heading", "most"), [("## The way of a gradient", 7), ("## The way of a token", 10)])
def test_ways_are_short_and_lead_through_files(heading: str, most: int) -> None:
    files = re.findall(r"^\d+\. `([^`]+)`", section_of(ARCHITECTURE, heading), re.M)
    assert 5 <= len(files) <= most
    assert all((ROOT / file).is_file() for file in files)


def test_every_name_of_the_walk_is_in_its_file() -> None:
    """From `backward()` to the wire, in CONTRIBUTING.md."""
    walk = section_of(ROOT / "CONTRIBUTING.md", "### From `backward()` to the wire")
    steps = re.findall(r"^\d+\. (.*?)(?=^\d+\. |^\|)", walk, re.M | re.S)
    assert len(steps) == 8
    for step in steps:
        code = "".join(text_of(ROOT / link) for link in re.findall(r"\]\(([^)]+)\)", step))
        names = [name.removesuffix("()").rpartition(".")[2] for name in quoted(step) if name != "backward()"]
        assert names
        assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


# ---- the run directory


def test_fields_of_a_line_of_metrics_are_those_that_are_written() -> None:
    section = section_of(DOCS / "run-directory.md", "## metrics.jsonl").partition("A line of kind `eval`")[0]
    described = {quoted(field)[0] for field, *_ in rows_of(section)}
    device = torch.device("cpu")
    metrics = StepMetrics(SoloCommunicator(), device, "fp32", flops_per_token=1.0)
    timer = StepTimer(device)
    timer.end_phase("forward")
    metrics.add(1.0, timer, Traffic(dense_bytes=0, wire_bytes=0, codec_seconds=0.0, first_sent=0.0), [], 1)
    written = metrics.collect(1.0, 1)
    local_steps = {"rounds", "drift", "left_out"}  # tests/parallel/test_local_steps.py sees these
    asynchronous = {"dropped", "staleness"}  # tests/faults/test_asynchronous.py sees these
    cached = {"cache_hits"}  # tests/parallel/test_shard_cache.py sees it
    private = {"epsilon"}  # tests/parallel/test_private_training.py sees it
    own = {"kind", "step", "lr", "grad_norm", "tokens"}
    assert described == {*own, *written, *local_steps, *asynchronous, *cached, *private}
