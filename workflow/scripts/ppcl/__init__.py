"""The library of the workflow's programs, in packages by subject.

Each package says what it holds and may import; CONTRIBUTING.md has their order. Beside
them are errors, provenance, and program, which runs and ends a stage.
"""

from ppcl.runtime import collector, put_off, quiet, surroundings

collector.rest()
surroundings.forget()  # before torch, accelerate and diffusers read them
quiet.start()
put_off.start()
