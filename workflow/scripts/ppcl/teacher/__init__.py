"""The stock pipeline that is the teacher: its files in a folder or in the Hub's cache, its identity
and own code, its prompts and arguments, loading and running it, and recording what it asks of its
transformer. May import errors, settings, provenance, runtime, storage, transformer and pruning;
every package above may import it.
"""
