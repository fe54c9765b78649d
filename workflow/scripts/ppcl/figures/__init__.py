"""Figures, each a function from tables to a matplotlib Figure, how they look, and the catalogue of
all. Needs no torch, and computes nothing that a table could hold. May import errors, settings,
judges, benchmarks and storage; the ablation's report, plot.py and the rules may import it.
"""
