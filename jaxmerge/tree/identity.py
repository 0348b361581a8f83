"""A tensor's identity: a stable 64-bit hash of its checkpoint name."""

import functools
import hashlib


@functools.lru_cache(maxsize=1 << 16)
def name_words(name: str) -> tuple[int, int]:
    """Hashes a tensor's name to two 32-bit words (high, low), the same on every machine and in every run.

    The words are the first 8 bytes of BLAKE2b of the UTF-8 name. Random draws for a tensor come from the caller's key
    folded with them, so that they do not depend on the order or the number of the other tensors.

    Example:
      >>> name_words("layers/3/attn/kernel") == name_words("layers/3/attn/kernel")
      True
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
