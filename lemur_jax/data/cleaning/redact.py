"""Redaction: secrets, e-mail and IP addresses are replaced, and counted by kind."""

import dataclasses
import ipaddress
import math
import re
from collections import Counter

from lemur_jax.data.cleaning.steps import Apply, check
from lemur_jax.data.files import Document

# Formats that their issuers publish: a match is a key, whatever surrounds it.
_KEYS = {
    "private key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"(?:.*?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|.{0,8192})",
        re.S,
    ),
    "AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255})\b"),
    "GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "Google key": re.compile(r"\bAIza[\w-]{35}"),
    "Slack token": re.compile(r"\bxox[abposr]-[\w-]{10,}"),
    "Stripe key": re.compile(r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}\b"),
    "OpenAI key": re.compile(r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{32,}"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "PyPI token": re.compile(r"\bpypi-AgE[\w-]{50,}"),
    "JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
}
# Anything else that is assigned to a telling name: it must look random, too.
_ASSIGNED = re.compile(
    r"(?i)((?:api|access|auth|secret|private|client)[_-]?(?:key|token|secret)|secret|passw(?:or)?d"
    r"|token)(['\"]?\s*(?:=>|[:=])\s*)(['\"])([A-Za-z0-9+/_=.~-]{16,200})\3"
)
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]|-\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])")


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
        def assigned(match: re.Match, counts: Counter) -> str:
            value = match[4]
            digits = any(c.isdigit() for c in value)
            if not digits or entropy(value) < self.min_entropy:
                return match[0]
            counts["assigned secret"] += 1
            return f"{match[1]}{match[2]}{match[3]}{self.replacement}{match[3]}"

        def apply(document: Document, counts: Counter) -> Document:
            text = document.text
            for kind, pattern in _KEYS.items():
                text, found = pattern.subn(lambda _: self.replacement, text)
                if found:
                    counts[kind] += found
            text = _ASSIGNED.sub(lambda match: assigned(match, counts), text)
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
        def one_email(match: re.Match, counts: Counter) -> str:
            if re.search(r"@(?:[\w-]+\.)*example\.[a-z]+$", match[0], re.I):
                return match[0]
            counts["e-mail"] += 1
            return self.email

        def one_ip(match: re.Match, counts: Counter) -> str:
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                return match[0]
            version_like = address.version == 4 and int(match[0].split(".")[0]) < 10
            if not address.is_global or version_like:
                return match[0]
            counts["IP address"] += 1
            return self.ip

        def apply(document: Document, counts: Counter) -> Document:
            text = document.text
            if "@" in text:
                text = _EMAIL.sub(lambda match: one_email(match, counts), text)
            text = _IPV4.sub(lambda match: one_ip(match, counts), text)
            if "::" in text or text.count(":") >= 7:
                text = _IPV6.sub(lambda match: one_ip(match, counts), text)
            return _with_text(document, text)

        return apply


def _with_text(document: Document, text: str) -> Document:
    return document if text == document.text else dataclasses.replace(document, text=text)
