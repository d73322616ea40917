"""Speed and memory beside the PyTorch reference: `python -m tests.benchmarks.compare --help`."""
