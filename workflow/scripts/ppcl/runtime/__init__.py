"""What a process runs on, and how it ends: devices and their memory, GPUs and CPU cores of a
machine, the processes of a stage, SIGTERM, variables of the environment and messages of libraries
that are left out, lazy imports, and Python's garbage collector. May import errors; every package
above may import it.
"""
