"""stdout and stderr that fail: a view is never a reason to end, a product that is lost is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import hvdlm

from hvdlm.output import TolerantStream, product_status


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `hvdlm` is the one of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    words = ["bash", "-c", line]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A folder with a configuration of three steps, called x.toml."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "x.toml").write_text(
        f"""
        data = {{ path = "{small_data}" }}
        model = {{ layers = 1, heads = 2, width = 16, context_length = 16 }}
        train = {{ steps = 3, global_batch_size = 2, evaluate_sequences = 2 }}
        optimizer = {{ warmup_steps = 0 }}
        log = {{ every = 1 }}
        """
    )
    return folder


@pytest.mark.parametrize(
    ("name", "redirection"),
    [
        ("full", "2>/dev/full"),
        ("both closed", ">&- 2>&-"),
        ("gone", "2> >(head -n 1 >/dev/null)"),
    ],
)
def test_training_goes_on_whatever_becomes_of_its_output(name: str, redirection: str, folder: Path) -> None:
    done = shell(f"python -m hvdlm train x.toml --train.run_dir '{name}' {redirection}", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / name / "checkpoints" / "step_00000003" / "manifest.json").exists()


def test_a_product_that_is_lost_is_said(small_data: Path, tmp_path: Path) -> None:
    done = shell(f"python -m hvdlm inspect {small_data} >/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "hvdlm: error: cannot write to stdout: No space left on device\n")


def test_a_reader_that_has_gone_is_no_error(small_data: Path, tmp_path: Path) -> None:
    """The reader closes the pipe before anything is written, which is what `head` does at some time."""
    done = shell(f"(sleep 1; python -m hvdlm inspect {small_data}; echo $? >status) | true", tmp_path)
    assert done.stderr == ""
    assert (tmp_path / "status").read_text() == "141\n"


def test_closed_files_are_not_given_to_others(tmp_path: Path) -> None:
    """With stderr closed, the next file to be opened would be number 2, into which libraries print."""
    program = (
        "import os\nfrom hvdlm.output import tolerant_output\nfrom pathlib import Path\n"
        f"with tolerant_output():\n    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    os.write(2, b'printed'); file.write('kept'); file.close()\n"
    )
    done = shell(f"python -c '''{program.replace(chr(39), chr(34))}''' 2>&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "data").read_text() == "kept"


def test_text_that_the_terminal_has_no_characters_for(tmp_path: Path) -> None:
    done = shell("PYTHONIOENCODING=latin-1 python -m hvdlm train '二.toml'", tmp_path)
    assert done.returncode == 1
    assert "cannot read the configuration \\u4e8c.toml" in done.stderr


def test_a_stream_without_a_file_descriptor() -> None:
    class Broken:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        flush = write

        def fileno(self) -> int:
            raise ValueError

    stream = TolerantStream(Broken())  # type: ignore[arg-type]
    assert stream.write("text") == 4
    assert stream.write("more") == 4
    assert product_status(stream) == (1, "cannot write to stdout: Input/output error")


def test_settings_may_stand_before_the_configuration(folder: Path) -> None:
    done = hvdlm("train", "--train.steps", "5", "--train.seed=3", "x.toml", "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "steps = 5" in done.stdout
    assert "seed = 3" in done.stdout
