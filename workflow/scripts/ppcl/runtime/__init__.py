"""What a process runs on, and what becomes of it: devices and their memory, GPUs and CPU cores of a
machine, the processes of a stage, SIGTERM, what the environment and other libraries would add, and
Python's collector. May import errors; every package above may import it.
"""
