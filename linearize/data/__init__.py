"""Text to batches: sources are read, tokenised once and cached as pools; a corpus draws rows from the pools."""

from .assemble import build, load_pool
from .corpus import Corpus
from .pool import Pool

__all__ = ["Corpus", "Pool", "build", "load_pool"]
