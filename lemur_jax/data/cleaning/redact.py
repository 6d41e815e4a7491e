"""Redaction: secrets, e-mail and IP addresses are replaced, and counted by kind."""

import dataclasses
import ipaddress
import math
import re
from collections import Counter

from lemur_jax.data.cleaning.steps import Apply, check
from lemur_jax.data.files import Document

# Formats that their issuers publish: a match is a key, whatever surrounds it. The words in front
# are looked for first: most documents have none of them, which is told a hundred times faster.
_KEYS = {
    "private key": (
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:.*?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|.{0,8192})",
            re.S,
        ),
    ),
    "AWS key": (("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    "GitHub token": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255})\b"),
    ),
    "GitLab token": (("glpat-",), re.compile(r"\bglpat-[\w-]{20,}")),
    "Google key": (("AIza",), re.compile(r"\bAIza[\w-]{35}")),
    "Slack token": (("xox",), re.compile(r"\bxox[abposr]-[\w-]{10,}")),
    "Stripe key": (("k_live_", "k_test_"), re.compile(r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}\b")),
    "OpenAI key": (("sk-",), re.compile(r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{32,}")),
    "Hugging Face token": (("hf_",), re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    "npm token": (("npm_",), re.compile(r"\bnpm_[A-Za-z0-9]{36}\b")),
    "PyPI token": (("pypi-AgE",), re.compile(r"\bpypi-AgE[\w-]{50,}")),
    "JSON web token": (
        ("eyJ",),
        re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ),
}
# scheme://user:password@host; not a password that a program fills in ($X, {x}, <x>, %s).
_IN_URL = re.compile(r"(://[^\s/:@'\"<>]{0,64}:)[^\s/@:'\"<>${}%*]{3,128}(?=@)")
# Anything else in quotes that is assigned to a telling name: it must look random, too.
_QUOTED = re.compile(r"(['\"])([A-Za-z0-9+/_=.~-]{16,200})\1")
_ASSIGNED = re.compile(
    r"(?i)(?:(?:api|access|auth|secret|private|client)[_-]?(?:key|token|secret)|secret|passw(?:or)?d"
    r"|token)['\"]?\s{0,8}(?:=>|[:=])\s{0,8}\Z"
)
_NAME_LENGTH = 48  # characters in front of a quoted value that `_ASSIGNED` looks at
# All begin with what is rare: an expression that begins with a word would be tried at every word.
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@-])")
_LOCAL_PART = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}\Z")
_IPV4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}(?:\.\d{1,3}){3}(?![\w.]|-\w)")
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:.])"
)


def entropy(text: str) -> float:
    """Bits per character under the text's own distribution of characters."""
    counts = Counter(text).values()
    return sum(-n / len(text) * math.log2(n / len(text)) for n in counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedactSecrets:
    """Replaces keys, tokens, passwords and private-key blocks.

    Attributes:
      replacement: what stands in their place.
      min_entropy: bits per character that a value assigned to a name like "api_key" must have;
        "changeme_changeme" has 2.8, random hexadecimal 3.5 to 4, random base64 more than 4.
    """

    replacement: str = "<SECRET>"
    min_entropy: float = 3.4

    def __post_init__(self):
        wrong = not self.min_entropy > 0
        check(self, [f"min_entropy={self.min_entropy} must be > 0"] if wrong else [])

    def start(self) -> Apply:
        def quoted(match: re.Match, counts: Counter) -> str:
            start, value = match.start(), match[2]
            if not _ASSIGNED.search(match.string, max(0, start - _NAME_LENGTH), start):
                return match[0]
            if not any(map(str.isdecimal, value)) or entropy(value) < self.min_entropy:
                return match[0]
            counts["assigned secret"] += 1
            return f"{match[1]}{self.replacement}{match[1]}"

        def apply(document: Document, counts: Counter) -> Document:
            text = document.text
            for kind, (signs, pattern) in _KEYS.items():
                if any(sign in text for sign in signs):
                    text, found = pattern.subn(lambda _: self.replacement, text)
                    counts.update({kind: found} if found else {})
            if "://" in text:
                text, found = _IN_URL.subn(lambda match: match[1] + self.replacement, text)
                counts.update({"password in a URL": found} if found else {})
            text = _QUOTED.sub(lambda match: quoted(match, counts), text)
            return _with_text(document, text)

        return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedactAddresses:
    """Replaces e-mail addresses and public IP addresses.

    Private, loopback, reserved and unspecified addresses say nothing about a person and stay; so do
    e-mail addresses at example.* and IPv4 addresses that may be version numbers (first part 0 to 9,
    as in 1.2.3.4).
    """

    email: str = "<EMAIL>"
    ip: str = "<IP_ADDRESS>"

    def start(self) -> Apply:
        def one_ip(match: re.Match, counts: Counter) -> str:
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                return match[0]
            if address.version == 4:
                other = int(match[0].split(".")[0]) < 10
            else:  # x[2000::3] is a slice
                other = len(re.findall(r"\w+", match[0])) < 3
            if other or not address.is_global:
                return match[0]
            counts["IP address"] += 1
            return self.ip

        def apply(document: Document, counts: Counter) -> Document:
            text = document.text
            text = self._without_emails(text, counts)
            text = _IPV4.sub(lambda match: one_ip(match, counts), text)
            text = _IPV6.sub(lambda match: one_ip(match, counts), text)
            return _with_text(document, text)

        return apply

    def _without_emails(self, text: str, counts: Counter) -> str:
        parts, done = [], 0
        for domain in _DOMAIN.finditer(text):
            at = domain.start()
            local = _LOCAL_PART.search(text, max(done, at - 64), at)
            if local is None or _is_example(domain[0]):
                continue
            counts["e-mail"] += 1
            parts += [text[done : local.start()], self.email]
            done = domain.end()
        return "".join([*parts, text[done:]])


def _is_example(domain: str) -> bool:
    return re.search(r"[@.]example\.[a-z]+\Z", domain, re.I) is not None


def _with_text(document: Document, text: str) -> Document:
    return document if text == document.text else dataclasses.replace(document, text=text)
