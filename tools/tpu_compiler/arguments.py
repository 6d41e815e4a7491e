"""Values that the measuring tools take on their command lines; what is wrong ends in exit 2."""

import argparse


def positive(text: str) -> int:
    """An integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer from 1 on")
    return int(text)


def heads(text: str) -> str:
    """ "H/K": query heads, and kv heads that divide them."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be query heads / kv heads, as 64/8")
    H, K = map(int, parts)
    if H % K:
        raise argparse.ArgumentTypeError(
            f"{text!r}: kv heads must divide the query heads; nearest: {H // K * K or K}/{K}"
        )
    return f"{H}/{K}"
