"""Pruned models as others get them: a variant's transformer put together, its folder, which
diffusers alone loads, the proof of that, and LoRAs of the teacher for it. May import errors,
settings, runtime, storage, transformer, pruning, teacher, extraction, search, training and
closed_forms; evaluation and programs may import it.
"""
