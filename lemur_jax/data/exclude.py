"""`lemur data exclude`: documents that are not learnt from now on, with a line in the ledger."""

import fnmatch
from collections.abc import Sequence

from lemur_jax.config import ConfigError
from lemur_jax.data import ledger, location, recorded
from lemur_jax.data.nearest import nearest
from lemur_jax.data.pipeline import read_manifest
from lemur_jax.data.store import RowStore


def exclude(
    path: str,
    documents: Sequence[str] = (),
    patterns: Sequence[str] = (),
    step: int | None = None,
    data: str | None = None,
) -> dict[str, dict[int, str]]:
    """Writes an exclusion into the ledger of a run, or for all future starts into a data set.

    Args:
      path: a run's directory, or a data set's.
      documents: paths of documents as the data set names them; every one of that path is meant.
      patterns: shell patterns of paths, e.g. '*/secrets/*'.
      step: steps that are still done with the documents; None: up to the next start.
      data: where a run's data set is now.

    Returns:
      {source: {number: path}} of what was excluded and was not before.

    Raises ConfigError for a path (with the nearest ones) or a pattern that no document has, and for
    a step that the run has passed, and when a source would have no document left.
    """
    if not documents and not patterns:
        raise ConfigError(["nothing to exclude: give --document=PATH or --pattern=GLOB"])
    if location.read(path, "manifest.json") is not None:
        if not location.is_local(path):
            raise ConfigError(
                [
                    f"{path!r} is in object storage, whose files cannot grow: exclude "
                    "from each RUN that reads it"
                ]
            )
        manifest, target = read_manifest(path), location.local(path) / ledger.EXCLUSIONS
        stores = {
            source: RowStore(
                location.join(path, source, "train"), about["splits"]["train"].get("parts")
            )
            for source, about in manifest["sources"].items()
        }
        before = ledger.exclusions(ledger.read_exclusions(path).entries, 0)
    else:
        found, pipeline = recorded.open_run(path, data)
        stores = {source: pipeline.store(source) for source in pipeline.sources}
        target, before = found.path, pipeline.exclusions
        _check_step(found, step)
    known = {(s, n) for exclusion in before for s, ns in exclusion.documents.items() for n in ns}
    matching = _matching(stores, documents, patterns)
    new = {
        source: {n: name for n, name in names.items() if (source, n) not in known}
        for source, names in matching.items()
    }
    new = {source: names for source, names in new.items() if names}
    _check_left(stores, known, new)
    if new:
        facts = {} if step is None else {"step": step}
        ledger.append(
            target,
            "exclude",
            documents={source: sorted(names) for source, names in new.items()},
            paths=sorted({name for names in new.values() for name in names.values()})[:100],
            asked={"documents": list(documents), "patterns": list(patterns)},
            **facts,
        )
    return new


def _check_step(found: ledger.Ledger, step: int | None) -> None:
    if step is not None and step < found.reached:
        raise ConfigError(
            [
                f"--step={step} lies behind the run's checkpoint {found.reached}: what was learnt "
                f"stays learnt; leave --step out, or give {found.reached} or more"
            ]
        )


def _check_left(
    stores: dict[str, RowStore], known: set[tuple[str, int]], new: dict[str, dict[int, str]]
) -> None:
    """A source without documents would feed steps of padding."""
    gone = {
        source: sum(s == source for s, _ in known) + len(names) for source, names in new.items()
    }
    problems = [
        f"source {source!r} has {stores[source].documents} documents, and none would be left: give "
        "it rate 0 in its place, with DataConfig.weight_changes"
        for source, count in gone.items()
        if count >= stores[source].documents
    ]
    if problems:
        raise ConfigError(problems)


def _matching(
    stores: dict[str, RowStore], documents: Sequence[str], patterns: Sequence[str]
) -> dict[str, dict[int, str]]:
    matching: dict[str, dict[int, str]] = {source: {} for source in stores}
    wanted, seen, near = set(documents), set(), {}
    for source, store in stores.items():
        for number, name in store.paths():
            by = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
            if name in wanted or by:
                matching[source][number] = name
                seen.update([*by, *({name} & wanted)])
            elif wanted and len(near) < 20_000:
                near[name] = source
    problems = [
        f"--document={name!r}: no document has this path{nearest(name, near)}"
        for name in documents
        if name not in seen
    ]
    problems += [f"--pattern={p!r}: no document's path matches" for p in patterns if p not in seen]
    if problems:
        raise ConfigError(problems)
    return matching


def print_excluded(found: dict[str, dict[int, str]]) -> None:
    """Says what was excluded: every document up to 20 of a source, then their number."""
    for source, names in found.items():
        for number, name in list(names.items())[:20]:
            print(f"excluded {source} document {number}: {name}")
        if len(names) > 20:
            print(f"excluded {len(names) - 20:,} more documents of {source}")
    if not found:
        print("nothing new: all of them are excluded already")
    else:
        print("in force from the next start on (or the step asked for); see `lemur data why`")
