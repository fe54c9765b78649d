"""How good, fast and large models are: pictures of teacher and variants side by side, metrics and
their intervals, latencies, memory, and the summary of a run. May import errors, settings,
provenance, judges, runtime, storage, transformer, pruning, teacher, benchmarks, search,
closed_forms and export; planning, ablation, rules and programs may import it.
"""
