"""The one source of random choices: a generator that is a pure function of what it is for.

No state, no order of calls: a choice depends neither on the rank that makes it, nor on the batch
a sample is in, nor on how often a run was stopped.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, key: str, *numbers: int) -> np.random.Generator:
    """Counter-based generator (Philox) for one purpose, one sample key and some numbers."""
    text = f"{seed}/{key}/{purpose}/{'/'.join(map(str, numbers))}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
