"""The library of the workflow's programs."""

from ppcl import quiet, surroundings

surroundings.forget()  # before torch, accelerate and diffusers read them
quiet.start()
