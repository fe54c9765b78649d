"""The library of the workflow's programs."""

from ppcl import surroundings

surroundings.forget()  # before torch, accelerate and diffusers read them
