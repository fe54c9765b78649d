"""What a run needs before it runs, on the meta device: sizes, operations, memory, disk and hours.
May import errors, settings, runtime, storage, transformer, pruning, teacher, search, training,
closed_forms and evaluation; only programs may import it.
"""
