"""What pruning makes of a transformer: units and new blocks in words that need no torch, what a
config requires and forbids of them, narrow blocks, and students. Nothing is measured or trained
here. May import errors, settings, storage and transformer; every package above may import it, the
teacher's as well: a teacher may be a pruned model itself.
"""
