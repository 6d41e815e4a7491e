"""What `lemur check` found, as files in the run directory, and whose run it speaks of.

RUN/certificate.json    for machines: everything below
RUN/certificate.md      the same for people
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 1
JSON = "certificate.json"
MARKDOWN = "certificate.md"
PASSED, NOTED, FAILED = "passed", "noted", "failed"


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
      name: of the check.
      status: PASSED; NOTED: not judged, or not as usual but as intended; FAILED.
      summary: one line for a person.
      figures: what was counted and measured, as JSON.
      fixes: what to do, one line for each thing that is wrong.
    """

    name: str
    status: str
    summary: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixes: tuple[str, ...] = ()


def judge(
    name: str, summary: str, figures: dict[str, Any], fixes: list[str], noted: bool = False
) -> Result:
    """A Result that failed if there is anything to fix, else is noted or passed."""
    status = FAILED if fixes else NOTED if noted else PASSED
    return Result(name, status, summary, figures, tuple(fixes))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All results for one run.

    Attributes:
      fingerprint: of `fingerprint`: which run it speaks of.
      setting: what was checked: model, mesh, attention, rows.
      reduced: where that is less than the run's own, one line each; empty: it is the run's own.
      results: of every check.
    """

    fingerprint: str
    setting: dict[str, Any]
    reduced: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(result.status != FAILED for result in self.results)

    def verdict(self) -> str:
        """One line."""
        failed = [result.name for result in self.results if result.status == FAILED]
        if failed:
            return f"FAILED: {', '.join(failed)}"
        noted = sum(result.status == NOTED for result in self.results)
        less = f", on less than the run ({len(self.reduced)})" if self.reduced else ""
        return f"passed: {len(self.results) - noted} checks, {noted} noted{less}"

    def write(self, run_dir: str | Path) -> Path:
        """Writes both files; returns the readable one."""
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "passed": self.passed, "verdict": self.verdict()}
        content |= dataclasses.asdict(self)
        (run_dir / JSON).write_text(json.dumps(content, indent=1) + "\n")
        (run_dir / MARKDOWN).write_text(self.markdown())
        return run_dir / MARKDOWN

    def markdown(self) -> str:
        """The certificate for a person."""
        lines = ["# Certificate of `lemur check`", "", self.verdict(), ""]
        lines += [f"Fingerprint of config and data: `{self.fingerprint}`", ""]
        lines += [f"- {name}: {value}" for name, value in self.setting.items()]
        lines += [f"- **less than the run:** {line}" for line in self.reduced]
        for result in self.results:
            lines += ["", f"## {result.name}: {result.status}", "", result.summary]
            lines += [f"- to do: {fix}" for fix in result.fixes]
            if result.figures:
                figures = json.dumps(result.figures, indent=1)
                lines += ["", "```json", figures, "```"]
        return "\n".join(lines) + "\n"


def fingerprint(operative_config: str, manifest: dict[str, Any]) -> str:
    """Of a run: its operative config and the manifest of its data, which has the rows' digests."""
    both = [operative_config, json.dumps(manifest, sort_keys=True)]
    return hashlib.sha256(json.dumps(both).encode()).hexdigest()


def found_for(run_dir: str | Path, operative_config: str, manifest: dict[str, Any]) -> str:
    """Says in a line whether the run directory has a certificate for this config and data."""
    path = Path(run_dir) / JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, verdict = content["fingerprint"], content["verdict"]
    except FileNotFoundError:
        return "certificate: none; `lemur check` with the same flags makes one"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"certificate: {path} cannot be read ({type(error).__name__}): run `lemur check`"
    if known != fingerprint(operative_config, manifest):
        return f"certificate: {path} is of another config or data: run `lemur check` again"
    return f"certificate of this config and data: {verdict}"
