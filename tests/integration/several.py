"""Several `hvdlm` commands, one after another in the same ranks, which start only once: `several.py FILE OUTPUT`.

FILE holds JSON: the words of each command. Rank 0 writes OUTPUT, JSON too: how many bytes its host had sent by eth0
before the first command and after each. The first command that fails ends the job with its status.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from hvdlm.cli import main

_SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def run_all(commands: list[list[str]], output: Path) -> int:
    sent = [int(_SENT.read_text())]
    for words in commands:
        status = main(words)
        if status:
            print(f"several.py: status {status} of {' '.join(words)}", file=sys.stderr)
            return status
        sent.append(int(_SENT.read_text()))
    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        output.write_text(json.dumps(sent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])))
