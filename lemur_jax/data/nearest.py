"""The nearest known name, for messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], listed: int = 20) -> str:
    """'; did you mean ...?', or what there is (at most `listed` names)."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    more = f" and {len(known) - listed:,} more" if len(known) > listed else ""
    return f"; there are: {', '.join(known[:listed])}{more}"
