"""Makes text from foreign files safe to show: no control characters, no credentials of addresses."""

from __future__ import annotations

import re

HIDDEN = "***"
# All control characters but newline and tab, those that change the direction of text, and lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What precedes the @ of an address; a password may hold a slash if it is not a port.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#:@]+:(?!\d+(?:[/?#]|$))[^\s@]*)@")
_SECRET = (
    r"[\w.-]*(?:token|secret|passw|pwd|passphrase|signature|credential|auth|key)[\w.-]*"
    r"|sig|jwt|sas|session|x-(?:amz|goog|ms)-[\w.-]+"
)
_PARAMETER = re.compile(rf"([?&;#](?:{_SECRET})=)[^&;#\s'\"<>]+", re.IGNORECASE)


def printable(text: str) -> str:
    """The text as it may be shown on a terminal: control characters as escapes, credentials hidden."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), redacted(text))


def redacted(text: str) -> str:
    """The text with `***` for user and password of addresses and for secret parameters of their queries."""
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
    return _PARAMETER.sub(rf"\1{HIDDEN}", text)
