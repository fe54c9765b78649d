"""Which blocks go: probes, CKA and similarity, candidate intervals, what earlier stages measured of
them, the exact search for the cheapest set within each budget, and a verdict on each candidate.
May import errors, settings, provenance, storage, transformer and pruning; every package above may
import it.
"""
