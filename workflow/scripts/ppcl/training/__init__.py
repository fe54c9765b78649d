"""How students are trained: losses, lessons (the teacher's inputs and targets for a new block), a
step of each training, the one training loop with its optimizers and sharded models, cached teacher
streams, the split of distillation into jobs, and the price of a change, which is the velocity error
of the teacher with that change alone. May import errors, settings, provenance, program, runtime,
storage, transformer, pruning and teacher; every package above may import it.
"""
