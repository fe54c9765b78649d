"""What is known of a transformer: its family (an entry in the registry, or what inspection of its
source finds), its blocks as one sequence, and its recorded calls. Nothing here knows of pipelines.
May import errors and storage; every package above may import it.
"""
