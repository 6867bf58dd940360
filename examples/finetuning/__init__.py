"""What `examples/finetune.py` runs: sizes and methods, the task, training, the report."""
