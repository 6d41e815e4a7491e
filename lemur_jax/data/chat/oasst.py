"""OpenAssistant 1: from trees of messages to conversations.

Two published layouts, told apart by their fields: one message a record ("message_id",
"parent_id"), or one tree a record ("prompt" with nested "replies").

How a tree becomes conversations is not stated by Lemur's paper. Two rules, by name:

    best    one conversation of each tree: at every turn the reply with the best "rank" (0 is the
            best), the first in the file among equals and among unranked ones, as long as an
            assistant's turn can still be reached
    leaves  one conversation for every assistant message with no assistant message below it;
            beginnings that are shared are learnt once for each
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lemur_jax.data.chat.conversation import Conversation, Message, fault

PATHS = ("best", "leaves")
_ROLES = {"prompter": "user", "assistant": "assistant"}

Refuse = Callable[[str, str], None]
Node = dict[str, Any]  # a message with its "replies", a list of nodes, and its "place"


def conversations(
    records: Iterable[tuple[str, Mapping[str, Any]]], refuse: Refuse, paths: str
) -> Iterator[Conversation]:
    """Conversations of one file, in the order of its trees.

    Messages are held until the file has ended: a reply may come before what it answers.
    Deleted messages and trees without an answer are refused by name. Of a tree that has one, what
    the rule of `paths` passes by (other replies, questions without an answer) is not counted.
    """
    for root in _trees(records, refuse):
        ends = [_best(root)] if paths == "best" else list(_ends(root, []))
        for number, path in enumerate(ends or [[]]):
            place = root["place"] + (f"#{number}" if number else "")
            messages = tuple(
                Message(_ROLES.get(node["role"], node["role"]), node["text"]) for node in path
            )
            reason = fault(messages) if messages else "no assistant turn"
            if reason is None:
                meta = {"lang": root["lang"]} if isinstance(root.get("lang"), str) else {}
                yield Conversation(messages, place, meta=meta)
            else:
                refuse(place, reason)


def _trees(records: Iterable[tuple[str, Mapping[str, Any]]], refuse: Refuse) -> Iterator[Node]:
    nodes: dict[str, Node] = {}
    for place, record in records:
        if isinstance(record.get("prompt"), dict):
            root = _nested(place, record["prompt"], refuse)
            if root is not None:
                yield root
            continue
        node = _node(place, record, refuse)
        if node is None:
            continue
        identity = record.get("message_id")
        if not isinstance(identity, str) or identity in nodes:
            refuse(place, f"message_id={identity!r} is missing or used twice")
            continue
        nodes[identity] = node | {"parent": record.get("parent_id")}
    for node in nodes.values():
        if node["parent"] is not None:
            if node["parent"] in nodes:
                nodes[node["parent"]]["replies"].append(node)
            else:
                refuse(node["place"], "its parent is not in the file, or was refused")
    roots = [node for node in nodes.values() if node["parent"] is None]
    reached, todo = set(), [*roots, *(n for n in nodes.values() if n["parent"] not in nodes)]
    while todo:
        node = todo.pop()
        reached.add(id(node))
        todo += node["replies"]
    for node in nodes.values():
        if id(node) not in reached:
            refuse(node["place"], "it answers itself: its parents form a circle")
    yield from roots


def _nested(place: str, record: Mapping[str, Any], refuse: Refuse) -> Node | None:
    node = _node(place, record, refuse)
    if node is None:
        return None
    for number, reply in enumerate(record.get("replies") or ()):
        child = _nested(f"{place}.{number}", reply, refuse)
        if child is not None:
            node["replies"].append(child)
    return node


def _node(place: str, record: Mapping[str, Any], refuse: Refuse) -> Node | None:
    if not isinstance(record.get("text"), str) or not isinstance(record.get("role"), str):
        refuse(place, "no field 'text' or 'role'")
        return None
    if record.get("deleted"):
        refuse(place, "deleted by OpenAssistant's moderators, with what answers it")
        return None
    rank = record.get("rank")
    rank = rank if isinstance(rank, int | float) and rank == rank else math.inf
    fields = {name: record[name] for name in ("text", "role")} | {"lang": record.get("lang")}
    return fields | {"place": place, "rank": rank, "replies": []}


def _reaches_answer(node: Node) -> bool:
    """Whether this message or one below it is an assistant's."""
    todo = [node]
    while todo:
        node = todo.pop()
        if node["role"] == "assistant":
            return True
        todo += node["replies"]
    return False


def _best(root: Node) -> list[Node]:
    path, node = [], root if _reaches_answer(root) else None
    while node is not None:
        path.append(node)
        going_on = [reply for reply in node["replies"] if _reaches_answer(reply)]
        node = min(going_on, key=lambda reply: reply["rank"], default=None)  # the first of equals
    return path


def _ends(root: Node, before: list[Node]) -> Iterator[list[Node]]:
    todo = [(root, before)]
    while todo:
        node, before = todo.pop()
        path = [*before, node]
        going_on = [reply for reply in node["replies"] if _reaches_answer(reply)]
        if not going_on and node["role"] == "assistant":
            yield path
        todo += [(reply, path) for reply in reversed(going_on)]
