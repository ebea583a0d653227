"""Host lists: what is accepted, and the errors for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdlm.cluster.hostfile import Host, read_hostfile
from hvdlm.errors import HvdlmError

REPOSITORY = Path(__file__).parents[2]


def write(directory: Path, text: str) -> Path:
    path = directory / "hosts.txt"
    path.write_bytes(text.encode())
    return path


def test_comments_blank_lines_and_spacing(tmp_path: Path) -> None:
    text = "# two hosts\n\n  h1 slots=4  # the first\n\th2\tslots = 2 max_slots=8\nh3.local max-slots=2 slots=02"
    assert read_hostfile(write(tmp_path, text)) == [Host("h1", 4, 3), Host("h2", 2, 4), Host("h3.local", 2, 5)]


def test_a_host_without_slots_has_one(tmp_path: Path) -> None:
    assert read_hostfile(write(tmp_path, "10.0.0.1\nn_2\n")) == [
        Host("10.0.0.1", 1, 1, states_slots=False),
        Host("n_2", 1, 2, states_slots=False),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("h2 slots=four", "slots must be a number, not 'four'"),
        ("h2 slots=-1", "slots must be a number, not '-1'"),
        ("h2 slots=2.5", "slots must be a number, not '2.5'"),
        ("h2 slots=²", "slots must be a number, not '²'"),
        ("h2 slots=", "slots must be a number, not ''"),
        ("h2 slots=0", "a host with 0 slots"),
        ("h2 slots=2 max_slots=1", "max_slots is less than slots"),
        ("h2 slots=2 slots=3", "slots is given twice"),
        ("h2 slots=2 gpus=1", "unknown word 'gpus=1'"),
        ("h2 4", "unknown word '4' after the host's name: write `h2 slots=4`"),
        ("h2, slots=4", "'h2,' is not a host's name"),
        ("h2:4", "write `h2 slots=4`"),
        ("ann@h2 slots=4", "write `h2`, and `User` into ~/.ssh/config"),
        ("-h2 slots=4", "'-h2' is not a host's name"),
        ("^h2 slots=4", "'^h2' is not a host's name"),
        ("fe80::1 slots=4", "'fe80::1' is not a host's name or IPv4 address"),
        ("hö2 slots=4", "'hö2' is not a host's name"),
        ("\ufeffh2 slots=4", "is not a host's name"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, error: str) -> None:
    path = write(tmp_path, f"h1 slots=4\n\n{line}\n")
    with pytest.raises(HvdlmError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert error in str(caught.value)
    assert str(caught.value).endswith(f"in {line!r}")


def test_a_host_is_listed_once(tmp_path: Path) -> None:
    path = write(tmp_path, "h1 slots=4\nh2 slots=1\nH1 slots=2\n")
    with pytest.raises(HvdlmError, match=r"line 3: H1 is also in line 1: .*slots=6"):
        read_hostfile(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# h1 slots=4\n"])
def test_a_list_of_no_hosts(tmp_path: Path, text: str) -> None:
    with pytest.raises(HvdlmError, match=r"hosts\.txt names no host: write lines such as"):
        read_hostfile(write(tmp_path, text))


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=r"cannot read host list .*absent: No such file"):
        read_hostfile(tmp_path / "absent")
    with pytest.raises(HvdlmError, match=r"cannot read host list .*: Is a directory"):
        read_hostfile(tmp_path)
    with pytest.raises(HvdlmError, match="Windows line endings"):
        read_hostfile(write(tmp_path, "h1 slots=4\r\n"))
    (tmp_path / "binary").write_bytes(b"\x80\xff")
    with pytest.raises(HvdlmError, match="is not text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("name", "slots"), [("one-machine.txt", [2]), ("two-hosts.txt", [4, 4]), ("gpu-cluster.txt", [8] * 8)]
)
def test_the_lists_that_we_ship(name: str, slots: list[int]) -> None:
    assert [host.slots for host in read_hostfile(REPOSITORY / "hostfiles" / name)] == slots
