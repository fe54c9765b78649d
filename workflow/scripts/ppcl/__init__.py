"""The library of the workflow's programs."""

from ppcl import collector, quiet, surroundings

collector.rest()
surroundings.forget()  # before torch, accelerate and diffusers read them
quiet.start()
