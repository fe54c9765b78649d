"""What pruning makes of a transformer: descriptions of units and new blocks without torch, what a
config requires and forbids of them, narrow blocks, students, and the bytes of quantised weights.
Nothing is measured or trained here. May import errors, settings, runtime, storage and transformer;
every package above may import it, also `teacher`, since a teacher may be a pruned model itself.
"""
