"""The folder of a run: its logs, metrics, checkpoints, and who may write."""
