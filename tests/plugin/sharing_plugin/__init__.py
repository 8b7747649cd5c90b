"""Methods of another package whose modules share leaves, by public names alone."""

from sharing_plugin.phm import Phm
from sharing_plugin.vera import SharedVeRA

__all__ = ["Phm", "SharedVeRA"]
