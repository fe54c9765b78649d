"""What PPCL is compared with: the methods, how each chooses what goes and is taught, one run of
each, the report, and how well prices foretell errors. May import errors, settings, judges, storage,
transformer, pruning, teacher, extraction, search, training, closed_forms, evaluation and figures;
only rules and programs may import it.
"""
