"""`[data]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hvdlm.config.section import Section, UserPath


class DataSection(Section):
    """`[data]`: where the tokens come from."""

    path: UserPath = Field("data/python-stdlib", min_length=1, description="directory written by `hvdlm prepare`")
    cache: str = Field(
        "",
        description="a directory on a disk of each host, where the shards that its ranks read are copied to, and read "
        "from then; may hold variables of a rank's environment, such as $TMPDIR; empty: none",
    )
    read_ahead: int = Field(2, gt=0, description="batches a rank reads ahead of the step that uses them")
    token_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the input tokens in training that are replaced by random ones"
    )
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail",
        description="where a shard is damaged or gone in mid-run: fail: the job ends, with its steps saved; skip: the "
        "sequences that cannot be read are left out, and counted",
    )
