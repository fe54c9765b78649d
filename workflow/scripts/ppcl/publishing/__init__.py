"""What a published variant says of itself: its model card, with base model and licence from the
teacher's card, what was removed, metrics, how to load it, and putting that into its folder. May
import errors, settings, storage and teacher; programs may import it.
"""
