"""How students are taught: losses and lessons, a step of each training, the one training loop with
its optimizers and sharded models, kept inputs and shares of several jobs, and the price of a
change, which is the velocity error with it alone. May import errors, settings, provenance, program,
runtime, storage, transformer, pruning and teacher; every package above may import it.
"""
