"""Methods of another package that change weights, written with public names alone."""

from weights_plugin.informed import Informed
from weights_plugin.oft import LowRankOFT
from weights_plugin.vera import SeededVeRA

__all__ = ["Informed", "LowRankOFT", "SeededVeRA"]
