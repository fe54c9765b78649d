"""What a transformer is here: its family's entry in the registry, or what its source tells of it,
its blocks as one sequence, and its recorded calls. It knows no pipeline. May import errors and
storage; every package above may import it.
"""
