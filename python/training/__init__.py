"""The parts of train.py, one concern each; train.py itself reads top to bottom."""
