"""The benchmarks of the field: prompts as their authors publish them, the folders of pictures that
their own scorers read, and the files in which these leave scores. Needs no torch. May import
errors, settings, storage and teacher; configuration, evaluation, figures, rules and programs may
import it.
"""
