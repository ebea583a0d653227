"""The parts of time_to_loss.py: its runs of `hvdlm train`, how long each method takes to a loss, table and picture."""
