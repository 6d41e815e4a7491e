"""English prose that every Python installation carries: topics, descriptions, docstrings.

Docstrings are also inside code files, so each document names the file that it came from
(`path` before the "#"); `corpus.py` holds out whole files, never single documents.
"""

import ast
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Iterator

LETTERS_FRACTION = 0.8  # of a paragraph's characters: letters, spaces, commas, full stops
WORDS_PER_PARAGRAPH = 8
CHARACTERS_PER_DOCUMENT = 200

_PARAGRAPHS = re.compile(r"\n\s*\n")
_PLAIN = re.compile(r"[A-Za-z ,.\n]")
_NOT_PROSE = re.compile(r"^\s*(>>>|\.\. |:\w+|@\w+|[-=~*#`|+]{3,})", re.MULTILINE)


def topics() -> Iterator[tuple[str, str]]:
    """(path, text) of Python's own help topics, what `help("assert")` shows."""
    from pydoc_data.topics import topics as by_name

    for name in sorted(by_name):
        yield f"stdlib/pydoc_data/topics.py#{name}", by_name[name].strip()


def description(distribution: importlib.metadata.Distribution) -> str:
    """A package's long description (usually its README); "" when it has none."""
    metadata = distribution.metadata
    if metadata is None:
        return ""
    text = metadata.get("Description") or metadata.get_payload() or ""
    return text.strip() if isinstance(text, str) and "\ufffd" not in text else ""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences rather than like a signature, table or example."""
    if len(paragraph.split()) < WORDS_PER_PARAGRAPH or _NOT_PROSE.search(paragraph):
        return False
    return len(_PLAIN.findall(paragraph)) >= LETTERS_FRACTION * len(paragraph)


def docstring_paragraphs(source: str) -> list[str]:
    """Prose paragraphs of every module, class and function docstring, in file order.

    Returns [] for a source that this interpreter cannot parse (Python 2 test data exists).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # A walk over statements only: expressions are nine tenths of a tree and hold no docstring.
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, owners):
            text = ast.get_docstring(node, clean=False)
            if text:
                cleaned = inspect.cleandoc(text)
                found += [p.strip("\n") for p in _PARAGRAPHS.split(cleaned) if is_prose(p)]
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                stack.extend(reversed(children))
    return found


def line_key(line: str) -> str:
    """A source or docstring line without indentation, quotes and string prefix, to compare them."""
    return line.strip().lstrip("rRuU").strip("\"' ")


def paragraph_keys(paragraph: str) -> list[str]:
    """Keys of the lines that are long enough to identify the paragraph (at least 30 characters)."""
    return [key for key in map(line_key, paragraph.splitlines()) if len(key) >= 30]
