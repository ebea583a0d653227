"""What every section is, and how values that are text are checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from hvdlm.arguments import duration, host_and_port
from hvdlm.paths import expand_path

UserPath = Annotated[str, AfterValidator(expand_path)]


class Section(BaseModel):
    """A group of settings; immutable, and strict about names and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @classmethod
    def setting_fields(cls) -> dict[str, FieldInfo]:
        """Its settings by the names that users write."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def check_duration(text: str) -> str:
    """`text`, which is a duration such as 30min; otherwise ValueError."""
    duration(text)
    return text


def check_optional_duration(text: str) -> str:
    """`text`, which is empty or a duration; otherwise ValueError."""
    return check_duration(text) if text else text


def check_signals(text: str) -> str:
    """`text`, which names signals, with commas between them; otherwise ValueError."""
    known = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if unknown := [name for name in text.split(",") if name not in known]:
        raise ValueError(f"{text!r}: {unknown[0]!r} is none of {', '.join(known)}")
    return text


def check_listen(text: str) -> str:
    """`text`, which is empty or HOST:PORT, perhaps without a host, or with port 0; otherwise ValueError."""
    if text:
        host_and_port(text)
    return text


def check_address(text: str) -> str:
    """`text`, which is empty or HOST:PORT; otherwise ValueError."""
    if text and not all(host_and_port(text)):
        raise ValueError(f"{text!r}: give a host and a port above 0, as in host1:7000")
    return text
