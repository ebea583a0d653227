"""The process that holds the network namespace of a fabric's switch, until it is killed.

Started by `Fabric.up` as `python -m hvdlm.cluster.fabric.switch STATE` in a new network namespace.
"""

from __future__ import annotations

import signal

from hvdlm.cluster.fabric.network import make_switch

if __name__ == "__main__":
    make_switch()
    print("ready", flush=True)
    while True:
        signal.pause()
