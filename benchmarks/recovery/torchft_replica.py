"""The training script of peer `torchft`: one replica group of one rank, as train_ddp.py of torchft's repository has it.

Timeouts are that script's. Each replica group reads its own part of every global batch, also when others have died; a
step that was not committed is done again on the same batch. The lighthouse is named by TORCHFT_LIGHTHOUSE.

Started by torchrun with REPLICA_GROUP_ID and NUM_REPLICA_GROUPS: torchft_replica.py SETTINGS RUN_DIR
"""

# Without `from __future__ import annotations`: PyTorch reads those of a hook as objects
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

from torch import Tensor
from torch.distributed import GradBucket
from torch.futures import Future
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport

from recovery.peer_training import PeerTraining, Step, StepLog


class Replica(DistributedDataParallel):
    """torchft's DDP, mended so that the others survive a rank that dies while Gloo sums gradients.

    Gloo raises such an error in wait(), where torchft 0.2.0 reports it to the manager as it should. But its hook goes
    on to a future that was not made then, and ends with an AssertionError (torchft/ddp.py, _comm_hook).
    """

    @staticmethod
    def _comm_hook(state: Manager, bucket: GradBucket) -> Future[Tensor]:
        gradients = bucket.buffer()
        state.allreduce(gradients).wait()  # in place; of an error the manager is told, and the step not committed
        averaged: Future[Tensor] = Future()
        averaged.set_result(gradients)
        return averaged


def main() -> None:
    replica, replicas = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
    training = PeerTraining()
    log = StepLog(training.run_dir, replica)
    group = ProcessGroupGloo(timeout=timedelta(seconds=5))

    def state_dict() -> dict[str, Any]:
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])

    manager = Manager(
        pg=group,
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"recovery_{replica}",
        timeout=timedelta(seconds=30),
        checkpoint_transport=PGTransport(group, timeout=timedelta(seconds=10), device="cpu"),
        init_sync=False,  # as its documentation says for replicas that are initialised alike
    )
    model = Replica(manager, training.model)
    optimizer = Optimizer(manager, training.optimizer)
    _wait_for_all(training.run_dir, replica, replicas)
    with training.open_batches(replica, replicas, start=0) as batches:
        batch = batches.next()
        while manager.current_step() < training.steps:
            while batch.index < manager.current_step():
                batch = batches.next()
            training.set_learning_rate(optimizer, batch.index)
            optimizer.zero_grad()
            loss = model(batch.inputs, batch.targets)
            loss.backward()
            training.clip_gradients()
            own = len(batch.inputs) if manager.is_participating() else 0
            ranks = manager.num_participants()
            before = manager.current_step()
            optimizer.step()  # or not, if another replica has died
            if manager.current_step() > before:
                log.write(Step(manager.current_step(), loss.item(), own, ranks * len(batch.inputs), ranks))
    manager.shutdown()


def _wait_for_all(run_dir: Path, replica: int, replicas: int) -> None:
    """Until all replicas are known to the lighthouse, which begins with those that are there."""
    (run_dir / f"ready{replica}").touch()
    while len(list(run_dir.glob("ready*"))) < replicas:
        time.sleep(0.05)


if __name__ == "__main__":
    main()
