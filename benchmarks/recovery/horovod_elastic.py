"""The training script of peer `horovod elastic`, as Horovod's guide to elastic training has it for PyTorch.

State is committed after every batch, which loses the least work; the guide leaves open how often. Each global batch is
divided among the ranks that are left, as the guide prefers, so that learning rates need no scaling.

Started by horovodrun: horovod_elastic.py SETTINGS RUN_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

import horovod.torch as hvd

from recovery.peer_training import PeerTraining, Step, StepLog


def main() -> None:
    hvd.init()
    training = PeerTraining()
    log = StepLog(training.run_dir, int(os.environ["HOROVOD_RANK"]))  # its rank at the start
    model = training.model
    optimizer = hvd.DistributedOptimizer(training.optimizer, named_parameters=model.named_parameters())
    # With empty moments: where there are none, TorchState makes them by a step, which changes the model
    optimizer.load_state_dict(training.optimizer.state_dict())

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        with training.open_batches(hvd.rank(), hvd.size(), start=state.batch) as batches:
            while state.batch < training.steps:
                batch = batches.next()
                training.set_learning_rate(optimizer, batch.index)
                optimizer.zero_grad()
                loss = model(batch.inputs, batch.targets)
                own = len(batch.inputs)
                # Horovod averages over ranks, whose parts of a batch may differ by a sequence
                (loss * own * hvd.size() / training.batch_size).backward()
                optimizer.synchronize()
                training.clip_gradients()
                with optimizer.skip_synchronize():
                    optimizer.step()
                state.batch += 1
                # Before commit(), which may fail when it has saved the step, and then does not have it done again
                log.write(Step(state.batch, loss.item(), own, training.batch_size, hvd.size()))
                state.commit()

    train(hvd.elastic.TorchState(model, optimizer, batch=0))


if __name__ == "__main__":
    main()
