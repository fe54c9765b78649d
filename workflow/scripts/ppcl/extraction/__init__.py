"""Replays recorded calls and reduces the teacher's activations to moments for closed forms, a
sample of tokens for CKA, and moments of the inputs of modulation matrices. May import errors,
settings, runtime, storage, transformer and pruning; every package above may import it.
"""
