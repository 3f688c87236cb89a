"""Parts of `experiments/puzzle_optimum.py`."""
