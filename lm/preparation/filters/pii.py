"""Personal data masked: e-mail addresses, phone and card numbers, IP addresses, ID numbers.

A number is masked where its check digits, length or numbering plan say that it is one: cards by
Luhn, ID numbers by python-stdnum, phones by Google's libphonenumber, addresses by `ipaddress`.
(datatrove's own formatter knows e-mail and IPv4; its pattern of e-mail takes time that grows with
the square of a line of base64, and its replacements depend on what was replaced before.)
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lm.preparation.filters import Filter, installed, words
from lm.sources import Document

PACKAGES = ("phonenumbers", "python-stdnum")  # a version may know other numbers
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_EMAIL = (
    rf"(?<!{_ATOM})(?<!{_ATOM}\.){_ATOM}{{1,64}}(?:\.{_ATOM}{{1,64}}){{0,8}}"
    rf"@(?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,63}}(?![A-Za-z0-9-])"
)
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.-])", r"(?![A-Za-z0-9_-])"  # no part of a longer number
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"(?<![A-Za-z]/)(?=[\d.]*\d\d){_OCTET}(?:\.{_OCTET}){{3}}(?!\.[A-Za-z0-9])"  # no 4.3.2.1
_IPV6 = r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}[0-9A-Fa-f]"  # of the global range, 2000::/3
_CARD = r"[2-6]\d{3}(?:[ -]?\d{3,6}){2,3}(?:[ -]?\d{1,4})?"
_BRANDS = (
    re.compile(  # Visa, Mastercard, American Express, Diners, JCB, Discover, UnionPay, Maestro
        r"4\d{15}(?:\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}"
        r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}|(?:5[06-9]|6[37])\d{14}"
    )
)
_CUE = re.compile(
    r"(?i)\b(?:tel|tél|phone|mobile?|cell|fax|call|ring|sms|text|whatsapp)|电话|手机|電話"
)
_CUE_DISTANCE = 24  # characters before or after a number
_NINO = r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"
_IDS = {  # module of stdnum, "" where the pattern is all -> pattern of a candidate
    "us.ssn": r"\d{3}-\d\d-\d{4}",
    "iso7064.mod_11_2": r"[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])[0-3]\d{4}[\dXx]",  # of China
    "it.codicefiscale": r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]",
    "es.nif": r"(?:[XYZ]-?\d{7}|\d{8})-?[A-Z]",
    "fr.nir": r"[12] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d",
    "br.cpf": r"\d{3}\.?\d{3}\.?\d{3}-?\d\d",
    "in_.aadhaar": r"[2-9]\d{3}[ -]\d{4}[ -]\d{4}",
    "kr.rrn": r"\d{6}-\d{7}",
    "fi.hetu": r"\d{6}[-+A]\d{3}[0-9A-Y]",
    "se.personnummer": r"(?:\d\d)?\d{6}[-+]\d{4}",
    "mx.curp": r"[A-Z]{4}\d{6}[HMX][A-Z]{5}[0-9A-Z]\d",
    "iban": r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?",
    "": _NINO,
}
KINDS = ("email", "id", "card", "ip", "phone")  # in the order in which they are looked for


class _Rule(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool]


def build(*, kinds: str = ",".join(KINDS), regions: str = "US") -> Filter:
    """Return the filter that masks what it finds, and drops no document.

    kinds: of data, separated by commas. regions: countries whose phone numbers are also found
    without their +NN, such as US,GB,DE; each takes the time of its own.
    """
    chosen = words("--filter=pii kinds", kinds, KINDS)
    rules = [rule for rule in _rules() if rule.kind in chosen]
    matchers = [_phones(region) for region in regions.split(",")] if "phone" in chosen else []
    return partial(_mask_document, rules, matchers)


def _rules() -> list[_Rule]:
    rules = [_Rule("email", re.compile(_EMAIL), lambda _: True)]
    for name, pattern in _IDS.items():
        is_valid = installed(f"stdnum.{name}", "python-stdnum").is_valid if name else bool
        rules.append(_rule("id", pattern, partial(_is_number, is_valid)))
    is_luhn = installed("stdnum.luhn", "python-stdnum").is_valid
    rules.append(_rule("card", _CARD, partial(_is_card, is_luhn)))
    return rules + [_rule("ip", pattern, _is_public) for pattern in (_IPV4, _IPV6)]


def _rule(kind: str, pattern: str, is_valid: Callable[[str], bool]) -> _Rule:
    return _Rule(kind, re.compile(f"{_BEFORE}(?:{pattern}){_AFTER}"), is_valid)


def _is_number(is_valid: Callable[[str], bool], text: str) -> bool:
    """Return True if the check digits are right, and the number is no placeholder of one digit."""
    return is_valid(text) and len(set(filter(str.isdigit, text))) > 1


def _is_card(is_luhn: Callable[[str], bool], text: str) -> bool:
    digits = re.sub("[ -]", "", text)
    return bool(_BRANDS.fullmatch(digits)) and _is_number(is_luhn, digits)


def _is_public(text: str) -> bool:
    """Return False for addresses that say nothing of a person: private, local, reserved."""
    import ipaddress

    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _phones(region: str) -> Callable[[str], list[tuple[int, int]]]:
    """Return a function from a line to the spans of its phone numbers."""
    phonenumbers = installed("phonenumbers")
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(f"--filter=pii regions: {region!r} is no country's code, such as US or GB")

    def find(line: str) -> list[tuple[int, int]]:
        matcher = phonenumbers.PhoneNumberMatcher(line, region, max_tries=len(line) + 1)
        return [(found.start, found.end) for found in matcher if _is_phone(line, found)]

    return find


def _is_phone(line: str, found) -> bool:
    """Return False for up to 10 digits without a separator or a zero in front, which many numbers
    have, if no word says that they are one.
    """
    text = found.raw_string
    if len(text) > 10 or not text.isdigit() or text[0] == "0":
        return True
    around = line[max(found.start - _CUE_DISTANCE, 0) : found.end + _CUE_DISTANCE]
    return bool(_CUE.search(around))


def _mask_document(rules, matchers, document: Document) -> Document:
    counts = Counter(dict(document.masked))
    fields = {k: _mask(rules, matchers, text, counts) for k, text in document.fields.items()}
    return Document(document.id, fields, tuple(sorted((+counts).items())))


def _mask(rules, matchers, text: str, counts: Counter[str]) -> str:
    has_digit = any(map(text.__contains__, "0123456789"))
    for kind, pattern, is_valid in rules:
        if "@" in text if kind == "email" else has_digit or kind == "ip":
            text, found = _substitute(pattern, is_valid, f"<{kind.upper()}>", text)
            counts[kind] += found
    for find in matchers:
        lines = text.split("\n") if has_digit else []
        for i, line in enumerate(lines):
            if sum(map(str.isdigit, line)) >= 7:
                for start, end in reversed(find(line)):
                    line = f"{line[:start]}<PHONE>{line[end:]}"
                    counts["phone"] += 1
                lines[i] = line
        text = "\n".join(lines) if lines else text
    return text


def _substitute(pattern, is_valid, mask: str, text: str) -> tuple[str, int]:
    found = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal found
        if not is_valid(match[0]):
            return match[0]
        found += 1
        return mask

    return pattern.sub(replace, text), found
