"""Methods of another package that change weights, written with public names alone."""

from weights_plugin.oft import OFT
from weights_plugin.vera import VeRA

__all__ = ["OFT", "VeRA"]
