"""Real conversations that every Python machine carries: functions and what is written about them.

    what   the question shows a signature, the answer is the first paragraph of the docstring
    write  the question shows signature and docstring, the answer is the body

From the documents of `lemur data corpus`, whose split decides each file's: no held-out answer has
its file in training.
"""

import ast
import inspect
import json
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from lemur_jax.data.files import fraction_of, read_documents
from lemur_jax.data.prose import is_prose

CHARACTERS_PER_QUESTION = 400
CHARACTERS_PER_ANSWER = 400
LEAST_CHARACTERS = 30  # of an answer


def write(code: str | Path, out: str | Path, most: int = 4000, seed: int = 0) -> dict[str, int]:
    """Writes at most `most` conversations of `code` (code.jsonl of a corpus) as messages records.

    Chosen by a seeded hash, half of each kind as far as there are any; no answer is there twice.
    Returns the number of conversations of each split.
    """
    found: dict[str, list[dict]] = {"what": [], "write": []}
    for document in read_documents([str(code)], "code", "text", "split"):
        for kind, name, question, answer in conversations(document.text):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            record = {"messages": messages, "split": document.split, "kind": kind}
            found[kind].append(record | {"path": f"{document.path}:{name}"})
    chosen, answers = [], set()
    for records in found.values():
        records.sort(key=lambda record: fraction_of(f"{seed} {record['path']}"))
        taken = 0
        for record in records:
            answer = record["messages"][1]["content"]
            if taken < most // 2 and answer not in answers:
                answers.add(answer)
                chosen.append(record)
                taken += 1
    with open(out, "w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in chosen)
    splits = [record["split"] for record in chosen]
    return {split: splits.count(split) for split in ("train", "validation")}


def conversations(source: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, function's name, question, answer) of a Python source; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if not docstring:
            continue
        summary = inspect.cleandoc(docstring).split("\n\n")[0].strip()
        head = f"def {node.name}({ast.unparse(node.args)}):"
        if len(head) > CHARACTERS_PER_QUESTION or not is_prose(summary):
            continue
        what = " ".join(summary.split())
        if LEAST_CHARACTERS <= len(what) <= CHARACTERS_PER_ANSWER:
            yield "what", node.name, f"What does this function do?\n\n{head}", what
        if len(node.body) > 1:
            body = lines[node.body[1].lineno - 1 : node.body[-1].end_lineno]
            answer = textwrap.dedent("\n".join(body)).strip()
            question = f'Write the body.\n\n{head}\n    """{what}"""'
            if LEAST_CHARACTERS <= len(answer) <= CHARACTERS_PER_ANSWER >= len(question):
                yield "write", node.name, question, answer
