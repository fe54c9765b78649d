"""The embedded teacher: pictures of coloured digits with captions, a judge that reads them, and the
training of a tiny stock pipeline on them. May import settings; the ablation, train_teacher.py and
evaluate.py may import it.
"""
