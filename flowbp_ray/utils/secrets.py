"""Secrets: what a configuration must not hold, since it is written down, and what is hidden in logs and messages.

A secret is the value of an environment variable such as WANDB_API_KEY or HF_TOKEN, Ray's token wherever Ray finds it, a
token whose form is known, and what an address or an Authorization header holds of that kind.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import string
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from flowbp_ray.utils.addresses import existing_path

HIDDEN = "***"
SHORTEST = 8  # characters from which the value of a variable counts; shorter ones are words such as "token" and "true"
LARGEST = 4096  # bytes of a file with a token; a larger one holds something else
LONG = 12  # characters from which a value that has it inside holds it
VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?|API_?KEY|ACCESS_KEY(?:_ID)?|KEY)$")
FLAG = re.compile(r"--?[\w-]*(?:token|secret|password|passwd|api[-_]?key)$", re.IGNORECASE)
KEY = re.compile(r"(?:^|_)(?:password|passwd|secret|api_?key|authorization|(?:access|auth|hf|bearer)_?token)$|^token$")
ASKED = r"(?:(?<=[?&])|(?<=&amp;)|(?<=\\u0026))"  # before a parameter of an address: as it is, in HTML, in JSON
GIVEN = r"=[^&\s\"'\\]+"
FORMS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),  # Hugging Face
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),  # OpenAI and those that took over its form
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    re.compile(r"\bwandb_v\d_\w{20,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS
    re.compile(r"(?<=://)[^/\s:@\"']*:[^/\s@\"']+(?=@)"),  # user:password@host
    re.compile(rf"{ASKED}(?:(?:access_)?token|(?:api_?)?key){GIVEN}", re.IGNORECASE),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    # What an address signs, as those of the Hub's and of object stores' files do; and other headers of a request.
    re.compile(
        rf"{ASKED}(?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig){GIVEN}", re.IGNORECASE
    ),
    # Base64 of at least 12 characters, and no word: with a digit, with = at its end, or with a capital inside.
    re.compile(
        r"\b(?i:Authorization\\?['\"]?\s*[:=]\s*\\?['\"]?Basic )"
        r"(?=[A-Za-z+/]*[0-9=]|[A-Za-z+/]+[A-Z])[A-Za-z0-9+/=]{12,}"
    ),
    re.compile(  # a path is none
        r"\b(?:x-)?api[-_]?key\\?['\"]?\s*[:=]\s*\\?['\"]?[A-Za-z0-9._~+=-]{16,}(?![A-Za-z0-9._~+/=-])",
        re.IGNORECASE,
    ),
)
UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
"""What an address holds as it is (RFC 3986, 2.3); of the others each library leaves some."""


registered: set[str] = set()
"""Secrets that this process has read from a place whose name does not say so."""


def register(value: str) -> str:
    """Hide this value from now on, too; return it."""
    registered.add(value)
    return value


def variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables that hold secrets, by name; a value that is the path of a file is none."""
    environ = os.environ if environ is None else environ
    held = {name: value.strip() for name, value in environ.items() if VARIABLE.search(name.upper())}
    return {name: value for name, value in held.items() if len(value) >= SHORTEST and existing_path(value) is None}


def ray_tokens(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tokens in the files from which Ray takes its own, by path; a file that cannot be read holds none."""
    environ = os.environ if environ is None else environ
    home = environ.get("HOME") or os.path.expanduser("~")
    paths = {os.path.expanduser(environ.get("RAY_AUTH_TOKEN_PATH", "")), os.path.join(home, ".ray", "auth_token")} - {
        ""
    }
    held = {path: _token_in(path) for path in sorted(paths)}
    return {path: value for path, value in held.items() if len(value) >= SHORTEST}


def _token_in(path: str) -> str:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:  # a pipe would be waited for
        return ""
    return _read_token(path, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _read_token(path: str, *_: int) -> str:
    """The token in a file, read once for each state of the file."""
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST).decode("utf-8", "ignore").strip()
    except OSError:
        return ""


def hidden(text: str) -> str:
    """The text with `***` in the place of each secret."""
    known = {*variables().values(), *ray_tokens().values(), *registered}
    for value in sorted(known, key=len, reverse=True):
        text = _spelled(value).sub(HIDDEN, text)
    for form in FORMS:
        text = form.sub(HIDDEN, text)
    return text


@lru_cache(maxsize=256)
def _spelled(value: str) -> re.Pattern[str]:
    """A secret as it is, in JSON, in a literal of Python's texts or bytes within either quotes, and in an address.

    The environment holds bytes that are no UTF-8 as surrogates, which neither repr nor JSON minds.
    """
    raw = _bytes(value)
    literals = {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        repr("'\"" + value)[4:-1],  # beside both quotes ' is escaped
        repr(raw)[2:-1],
        repr(b"'\"" + raw)[5:-1],
    }
    address = "".join(map(_in_address, value))
    return re.compile("|".join([address, *map(re.escape, sorted(literals - {value}, key=len, reverse=True))]))


def _in_address(letter: str) -> str:
    """A pattern for a character as it is or percent-encoded, and for a space as + too."""
    if letter in UNRESERVED:
        return re.escape(letter)
    encoded = "".join(f"%{byte:02X}" for byte in _bytes(letter))
    return f"(?:(?i:{encoded})|{'[ +]' if letter == ' ' else re.escape(letter)})"


def _bytes(value: str) -> bytes:
    """A text as the environment holds it; a surrogate that stands for no byte becomes three."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


class HidingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def check_no_secrets(plain: Mapping[str, Any]) -> None:
    """Raise ValueError, which does not show it, where a configuration holds a secret. plain: as YAML has it.

    config.yaml, reports, exports, wandb and every actor get the configuration, so a secret in it is one no longer.
    """
    held = {f"${name}": value for name, value in (variables() | _keys_of_judges(plain)).items()} | ray_tokens()
    for key, value in _texts(plain, ""):
        name = next((name for name, secret in held.items() if _holds(value, secret)), None)
        if name is not None or any(form.search(value) for form in FORMS):
            what = f"what {name} holds" if name is not None else "a token or a password"
            raise ValueError(f"{key} holds {what}, and a configuration is written down with the run; {advice(key)}")
    for key, names in _named(plain, ""):
        raise ValueError(f"{key} names a secret ({names}), and a configuration is written down with the run; "
                         f"{advice(key)}")  # fmt: skip


def _keys_of_judges(plain: Mapping[str, Any]) -> dict[str, str]:
    """The variables that `api_key_env` of a judge names, whatever they are called, and their values."""
    judges = plain.get("judges")
    named = [judge.get("api_key_env") for judge in judges if isinstance(judge, Mapping)] if judges else []
    held = {name: os.environ.get(name, "").strip() for name in named if isinstance(name, str)}
    return {name: value for name, value in held.items() if len(value) >= SHORTEST}


def _holds(value: str, secret: str) -> bool:
    """Whether a value is the secret or holds it. A short one, such as "postgres", may be part of a path by chance."""
    return value == secret or (len(secret) >= LONG and secret in value)


def advice(key: str) -> str:
    """What to write instead of a secret under `key`."""
    if key.startswith("judges"):
        return (
            "leave it out and set the variable where the run (on a cluster: each node) is started, which the judge's "
            "server inherits; api_key_env=NAME sends the key in $NAME"
        )
    return "leave it out, and set an environment variable, or name a file that holds it, such as rewards.token_file"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts in a tree, and the names of its keys, with their dotted places."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            yield f"a key in {key or 'the configuration'}", str(name)
            yield from _texts(inner, below)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{number}]")


def _named(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Where a tree gives a value to something that is called as a secret is: a key, a variable, a command's option."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            below, name = (f"{key}.{name}" if key else str(name)), str(name)
            of_environment = key.endswith(".env") and VARIABLE.search(name.upper())
            if isinstance(inner, str) and inner and (of_environment or KEY.search(name.lower())):
                yield below, name
            yield from _named(inner, below)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            if isinstance(inner, str):
                flag, equals, given = inner.partition("=")
                follows = number + 1 < len(value) and not str(value[number + 1]).startswith("-")
                if FLAG.match(flag) and (given if equals else follows):
                    yield f"{key}[{number}]", flag
            yield from _named(inner, f"{key}[{number}]")
