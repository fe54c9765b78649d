"""The embedded teacher: pictures of coloured digits with captions, a judge that reads them, and the
training of a tiny stock pipeline on them. May import settings; the judges and
train_teacher.py may import it.
"""
