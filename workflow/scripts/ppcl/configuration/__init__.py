"""What a person writes, read strictly: schema and defaults, the checks before anything runs, and a
first config for a model of one's own. Needs no torch. May import errors, settings, judges, storage,
transformer, pruning, benchmarks and teacher; every package above may import it.
"""
