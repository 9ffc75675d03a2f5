"""Two tokenizations of the same bytes: which tokens belong together, and where a word may end."""

from jaxdistill.align.chunks import Alignment, Chunks, Placed, align, boundary_mask

__all__ = ["Alignment", "Chunks", "Placed", "align", "boundary_mask"]
