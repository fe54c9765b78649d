"""The library of the workflow's programs."""

from ppcl import collector, put_off, quiet, surroundings

collector.rest()
surroundings.forget()  # before torch, accelerate and diffusers read them
quiet.start()
put_off.start()
