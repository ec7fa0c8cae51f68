"""The parts of python/evaluate.py: networks, data, scoring, figures, galleries, report."""
