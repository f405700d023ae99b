"""Personal data masked: e-mail and IP addresses, phone numbers, Chinese and American identities, payment cards."""

import ipaddress
import re
from collections.abc import Callable

from pretrain.cleaning.step import Outcome, Section


class Pii(Section):
    """Mask personal data: each key gives the placeholder for one kind, and null leaves that kind as it is.

    The placeholders of e-mail addresses, IP addresses and phone numbers are those of Dolma; OLMo's tokenizer keeps them
    as single tokens.
    """

    email: str | None = "|||EMAIL_ADDRESS|||"
    """The placeholder for e-mail addresses."""
    ip_address: str | None = "|||IP_ADDRESS|||"
    """The placeholder for public IP addresses."""
    resident_id: str | None = "|||RESIDENT_ID|||"
    """The placeholder for Chinese resident ID numbers."""
    social_security: str | None = "|||SOCIAL_SECURITY_NUMBER|||"
    """The placeholder for American social security numbers."""
    card: str | None = "|||CARD_NUMBER|||"
    """The placeholder for payment card numbers."""
    phone: str | None = "|||PHONE_NUMBER|||"
    """The placeholder for phone numbers."""


def pii(section: Pii, language: str) -> Callable[[str], Outcome]:
    """Mask personal data that a pattern can find, and count the masked items. Names and street addresses stay.

    Dolma (Soldaini et al. 2024, arXiv:2402.00159) masks e-mail addresses, American phone numbers and every IPv4
    address. FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.7) masks e-mail and public IP addresses; it leaves
    phone numbers because of false positives. This step masks the following kinds and verifies check digits:

        e-mail       with a top-level domain; not `logo@2x.png`, `getty@tty1.service`, `git@github.com`
        IP address   public IPv4 and IPv6; not `v1.20.3.4`, `section 10.1.2.3`, `3.3.3.11`
        resident ID  18 digits with province, date of birth and check digit (GB 11643-1999)
        social security   123-45-6789, if the number can be issued; none in 100 MB of encyclopaedia and books
        card         13 to 19 digits with an issuer's prefix, in its grouping, and Luhn's check (ISO/IEC 7812-1)
        phone        `+` and 8 to 15 digits (E.164); 415-555-0132, (415) 555 0132; a number after "tel:" or 电话;
                     Chinese mobile (138 0013 8000) and landline (010-62345678, (021) 5555 1234)
    """
    kinds = [(getattr(section, name), *rest) for name, *rest in KINDS if getattr(section, name) is not None]
    gates = {gate for _, gate, _ in kinds}

    def apply(text: str) -> Outcome:
        changes = 0
        for _ in range(PASSES):
            passed = {gate: gate.search(text) for gate in gates}  # 9 of 10 documents match none of the gates
            before = changes
            for placeholder, gate, patterns in kinds:
                for pattern, holds in patterns if passed[gate] else ():
                    text, count = _masked(text, pattern, holds, placeholder)
                    changes += count
            if changes == before:
                break
        return Outcome(text, changes)

    return apply


PASSES = 6  # of two numbers without a gap, the second is only found once the first is masked


def _masked(text: str, pattern: re.Pattern, holds: Callable[[re.Match], bool], placeholder: str) -> tuple[str, int]:
    count = 0

    def replacement(match: re.Match) -> str:
        nonlocal count
        if match["item"] == placeholder or not holds(match):  # FineWeb's placeholder, email@example.com, is an address
            return match[0]
        count += 1
        return match[0][: match.start("item") - match.start()] + placeholder

    return pattern.sub(replacement, text), count


# Around a number that is not a part of a longer number, a word or a decimal fraction.
BEFORE, AFTER = r"(?<![0-9A-Za-z_])(?<![0-9][.,])", r"(?![0-9A-Za-z_])(?![.,][0-9])"


# E-mail: at most 64 characters before the @ (RFC 5321, section 4.5.3.1), so matching takes linear time.
EMAIL = re.compile(
    r"(?<![0-9A-Za-zÀ-ɏ._%+-])(?P<item>(?P<local>(?:[A-Za-z]['’])?[0-9A-Za-zÀ-ɏ._%+-]{1,64})[@＠]"
    r"(?:[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?\.){1,8}(?P<top>[A-Za-z]{2,24}))(?![0-9A-Za-z_@-])"
)
# Endings that are no top-level domains: file types and systemd units.
NOT_TOP_LEVEL = re.compile(
    r"png|jpe?g|gif|svg|webp|bmp|ico|css|js|ts|json|xml|ya?ml|txt|md|conf|service|socket|target|timer|mount",
    re.IGNORECASE,
)


def _is_email(match: re.Match) -> bool:
    return not NOT_TOP_LEVEL.fullmatch(match["top"]) and match["local"].lower() != "git"


# IP addresses
IPV4 = re.compile(r"(?<![0-9A-Za-z_.])(?P<item>(?:[0-9]{1,3}\.){3}[0-9]{1,3})(?![0-9A-Za-z_]|\.[0-9])")
IPV6 = re.compile(
    r"(?<![0-9A-Za-z:.])(?P<item>[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4})(?![0-9A-Za-z:])"
)
DOTTED = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:")
NOT_AN_ADDRESS = re.compile(
    r"(?:\bv|\bver|version|release|rev|revision|build|firmware|software|update|section|sections|sec|§|chapter|clause|"
    r"article|appendix|annex|figure|fig|table|eq|item|no|[A-Za-z][-/]|第|版|版本|版本号|固件|软件|章|节|条|表|图|式)"
    r"[.:：]?\s{0,2}$",
    re.IGNORECASE,
)


def _is_public_ipv4(match: re.Match) -> bool:
    numbers = match["item"].split(".")
    if any(int(number) > 255 or (number[0] == "0" and number != "0") for number in numbers):
        return False
    if sum(int(number) >= 10 for number in numbers) < 2:  # 1.2.3.4 is a section or a version; 8.8.8.8 is no person's
        return False
    before = match.string[max(match.start() - 16, 0) : match.start()]
    address = ipaddress.ip_address(match["item"])
    return address.is_global and not address.is_multicast and not NOT_AN_ADDRESS.search(before)


def _is_public_ipv6(match: re.Match) -> bool:
    if len(list(filter(None, match["item"].split(":")))) < 3:  # `2010::2015` is a range of years
        return False
    try:
        return ipaddress.ip_address(match["item"]).is_global
    except ValueError:
        return False


# Chinese resident IDs
RESIDENT_ID = re.compile(
    BEFORE
    + r"(?P<item>(?P<province>[1-8][0-9])[0-9]{4} ?(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
    r" ?[0-9]{3}[0-9Xx])" + AFTER
)
PROVINCES = frozenset(  # GB/T 2260; 83 for residents from Taiwan
    [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83]
)


def _is_resident_id(match: re.Match) -> bool:
    digits = [10 if char in "xX" else int(char) for char in match["item"] if char != " "]
    # ISO 7064, MOD 11-2: each place weighs twice as much as the next one, and the sum is 1 modulo 11.
    return (
        int(match["province"]) in PROVINCES and sum(d * 2**place for place, d in enumerate(reversed(digits))) % 11 == 1
    )


SOCIAL_SECURITY = re.compile(
    BEFORE + r"(?<![0-9]-)(?P<item>(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4})(?!-[0-9])" + AFTER
)


# Payment cards: groups of four, 4-6-5 (American Express) or 4-6-4 (Diners Club), with the same separator throughout.
CARD = re.compile(
    BEFORE + r"(?P<item>[2-6][0-9]{3}(?P<separator>[ -]?)(?:[0-9]{4}(?P=separator)[0-9]{4}(?P=separator)?[0-9]{1,4}"
    r"(?:(?P=separator)[0-9]{1,3})?|[0-9]{6}(?P=separator)[0-9]{4,5}))" + AFTER
)
ISSUERS = (  # prefix, lengths
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"62"), (16, 17, 18, 19)),  # UnionPay
    (re.compile(r"6011|64[4-9]|65"), (16, 19)),  # Discover
    (re.compile(r"352[89]|35[3-8]"), (16,)),  # JCB
    (re.compile(r"30[0-5]|3[689]"), (14,)),  # Diners Club
)


def _is_card(match: re.Match) -> bool:
    number = re.sub("[ -]", "", match["item"])
    if not any(prefix.match(number) and len(number) in lengths for prefix, lengths in ISSUERS):
        return False
    doubled = (int(char) * (1 + place % 2) for place, char in enumerate(reversed(number)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


# Phone numbers
INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z_+])(?P<item>(?:[(（]\+[1-9][0-9]{0,2}[)）]|\+[1-9][ .()（）-]{0,2}[0-9])"
    r"(?:[ .()（）-]{0,2}[0-9]){6,13})" + AFTER
)
AMERICAN = re.compile(
    BEFORE + r"(?<![0-9]-)(?P<item>(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}"
    r"|[2-9][0-9]{2}(?P<separator>[.-])[2-9][0-9]{2}(?P=separator)[0-9]{4}))(?!-[0-9])" + AFTER
)
SPACED = re.compile(  # not within a row of numbers; no match in 110 MB of encyclopaedia, books and statutes
    BEFORE + r"(?<![0-9] )(?P<item>(?:1 )?[2-9][0-9]{2} [2-9][0-9]{2} [0-9]{4})(?! [0-9])" + AFTER
)
CHINESE_MOBILE = re.compile(
    BEFORE + r"(?P<item>(?:(?:0086|86)[ -]?)?1[3-9][0-9](?P<separator>[ -]?)[0-9]{4}(?P=separator)[0-9]{4})" + AFTER
)
CHINESE_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z_.,/-])(?P<item>(?:[(（]0[0-9]{2,3}[)）][ -]?|0[0-9]{2,3}[ -])"
    r"[2-9][0-9]{2,3}[ -]?[0-9]{4}(?:-[0-9]{1,5})?)" + AFTER
)
NAMED = re.compile(
    r"(?:\b(?:tel|telephone|phone|fax|mobile|cell|whatsapp)\b[ .]{0,2}(?:no\.?|nr\.?|number|#)?[ ]{0,2}[:：]"
    r"|(?:电话|手机|传真|座机|热线|電話|手機|傳真|座機|熱線)(?:号码|號碼|号|號)?[:：为為是]?)\s{0,3}"
    r"(?P<item>[+(（]?[0-9](?:[ .()（）-]{0,2}[0-9]){6,14})(?![0-9])",
    re.IGNORECASE,
)
YEARS = re.compile(r"(?:1[89]|20)[0-9]{2}\D{1,2}(?:1[89]|20)[0-9]{2}")
AMOUNT = re.compile(r"\s?(?:元|美元|人民币|人|个|吨|公里|千米|平方|立方|年|%|％)")


def _is_international(match: re.Match) -> bool:
    number = match["item"]
    return (
        (len(number) > 10 or not number[1:].isdigit())
        and sum(map(number.count, "(（")) == sum(map(number.count, ")）"))
        and number[-4:] != " 000"
    )


def _is_mobile(match: re.Match) -> bool:
    return not AMOUNT.match(match.string, match.end())


def _is_named(match: re.Match) -> bool:
    return not YEARS.fullmatch(match["item"])


def _always(match: re.Match) -> bool:
    return True


SEVEN_DIGITS = re.compile(r"[0-9](?:[ .()（）-]{0,2}[0-9]){6}")

# For each kind: its name, a gate that every text with such an item matches, and its patterns with their checks. They
# are applied in this order: the most certain patterns first.
KINDS = (
    ("email", re.compile("[@＠]"), ((EMAIL, _is_email),)),
    ("ip_address", DOTTED, ((IPV4, _is_public_ipv4), (IPV6, _is_public_ipv6))),
    ("resident_id", SEVEN_DIGITS, ((RESIDENT_ID, _is_resident_id),)),
    ("social_security", SEVEN_DIGITS, ((SOCIAL_SECURITY, _always),)),
    ("card", SEVEN_DIGITS, ((CARD, _is_card),)),
    (
        "phone",
        SEVEN_DIGITS,
        (
            (INTERNATIONAL, _is_international),
            (CHINESE_MOBILE, _is_mobile),
            (CHINESE_LANDLINE, _always),
            (AMERICAN, _always),
            (SPACED, _always),
            (NAMED, _is_named),
        ),
    ),
)
