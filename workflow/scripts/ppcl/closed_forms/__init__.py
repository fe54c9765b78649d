"""What is solved for instead of trained: linear maps in place of FFNs and text streams, modulation
of low rank, and students that begin at a least-squares solution. May import errors, settings,
provenance, runtime, storage, transformer, pruning, extraction, search and training; every package
above may import it.
"""
