"""Python runs this file first where its folder is on PYTHONPATH: see old_names.py beside it."""

import old_names

old_names.start()
