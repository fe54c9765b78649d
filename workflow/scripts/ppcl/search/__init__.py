"""Which blocks go: probes, CKA and similarity, candidate intervals, what earlier stages measured of
<<<<<<< HEAD
them, the exact search for the cheapest set within each budget, and its reasons. May import errors,
settings, provenance, storage, transformer and pruning; every package above may import it.
=======
them, the exact search for the cheapest set within each budget, and a verdict on each candidate.
May import errors, provenance, storage, transformer, pruning and configuration; every package above
may import it.
>>>>>>> origin/main
"""
