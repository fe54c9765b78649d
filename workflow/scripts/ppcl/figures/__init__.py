"""Figures, each a function from tables to a matplotlib Figure, and how they look. Needs no torch,
and computes nothing that a table could hold. May import errors and storage; the ablation's report
and plot.py may import it.
"""
