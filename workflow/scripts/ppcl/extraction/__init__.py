"""What the teacher's activations are reduced to while recorded calls are replayed: moments for
closed forms, tokens for CKA, and what modulation matrices get. May import errors, settings,
runtime, storage, transformer and pruning; every package above may import it.
"""
