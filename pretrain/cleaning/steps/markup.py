"""Remove remains of HTML from plain text."""

import html
import html.entities
import re
from collections.abc import Callable

from pretrain.cleaning.step import Outcome, Section


class Html(Section):
    """Remove remains of HTML: tags, comments, scripts and style sheets; decode entities."""


def html_remains(section: Html, language: str) -> Callable[[str], Outcome]:
    """Remove tags, comments, scripts and style sheets, decode entities, and count each of them.

    A tag has the name of an HTML element, and it closes the element, closes itself, has an attribute, or opens an
    element that the document also closes. So `a < b`, `x<y>z`, `<3`, `vector<int>`, `List<String>`,
    `#include <stdio.h>`, "the <title> tag" and `<user@host>` stay. Entities other than `&nbsp` need their semicolon
    (`?a=1&copy=2` stays). A block element becomes a line end, a cell a space, an inline element nothing. Escaped markup
    (`&lt;p&gt;`, also escaped twice, as in feeds) is removed too: text *about* HTML loses its examples, so switch this
    step off for it.
    """

    def apply(text: str) -> Outcome:
        if "<" not in text and "&" not in text:
            return Outcome(text)
        changes = 0
        for _ in range(PASSES):
            new, count = _stripped(text)
            if new == text:
                return Outcome(text, changes)
            text, changes = new, changes + count
        # Removing markup made new markup in every pass, as in `<<<b>b>b>`. No real page does this; drop the characters.
        return Outcome(text.replace("<", " ").replace("&", " "), changes + 1)

    return apply


PASSES = 6


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BLOCK = _names(
    """address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset figcaption
    figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html iframe legend li main menu nav noframes
    noscript ol option p pre section summary table tbody tfoot thead title tr ul video"""
)
CELL = _names("td th")
INLINE = _names(
    """a abbr acronym applet area audio b base basefont bdi bdo big blink button canvas cite code col colgroup data
    datalist del dfn em embed font frame i img input ins kbd label link map mark marquee meta meter nobr noembed object
    optgroup output param path picture progress q rp rt ruby s samp script select small source span strike strong style
    sub sup svg template textarea time track tt u var wbr"""
)
OFTEN_UNCLOSED = _names("br dd dt hr li p td th tr wbr")

# Every repetition in these patterns ends at the next `<` or is bounded, so matching takes linear time.
TAG = re.compile(
    r"<(?P<close>/?)(?P<name>[a-zA-Z][a-zA-Z0-9]{0,15}|o:[a-z]{1,8})"
    r"""(?P<rest>(?:[\s/](?:[^<>"']|"[^"<]*+"|'[^'<]*+'){0,2000}+)?|[\s/][^<>]{0,2000})>"""
)
ATTRIBUTE = re.compile(r"\s[a-zA-Z:@_][-\w:.@]*\s*=")
DECLARATION = re.compile(
    r"<!doctype\b[^<>]{0,2000}>|<\?xml\b[^<>]{0,2000}\?>|<!\[CDATA\[|<!\[(?:end)?if\b[^<>]{0,200}>", re.IGNORECASE
)
# The beginning of a comment, script or style sheet: nothing up to its end is text.
HIDDEN = re.compile(r"<!--|<(script|style)(?:[\s/][^<>]{0,2000})?>", re.IGNORECASE)
HIDDEN_END = {
    None: re.compile("-->"),
    "script": re.compile(r"</script\s{0,9}>", re.IGNORECASE),
    "style": re.compile(r"</style\s{0,9}>", re.IGNORECASE),
}
CLOSING = re.compile(r"</([a-zA-Z][a-zA-Z0-9]{0,15}|o:[a-z]{1,8})[\s>]")
ENTITY = re.compile(
    r"&(?:(?:amp|AMP|#0{0,5}38|#[xX]0{0,5}26);)*"
    r"(?P<name>#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[a-zA-Z][a-zA-Z0-9]{1,31};|nbsp(?![\w=;])|)"
)


def _stripped(text: str) -> tuple[str, int]:
    changes = 0
    if "<" in text:
        text, hidden = _without_hidden(text)
        text, declarations = DECLARATION.subn("", text)
        if declarations:
            text = text.replace("]]>", "")
        text, tags = _without_tags(text)
        changes += hidden + declarations + tags
    if "&" in text:
        text, entities = _decoded(text)
        changes += entities
    return text, changes


def _without_hidden(text: str) -> tuple[str, int]:
    """Remove comments, scripts and style sheets that are closed. Returns the text and how many were removed."""
    pieces, done, endless, count = [], 0, set(), 0
    for opened in HIDDEN.finditer(text):
        kind = opened[1] and opened[1].lower()
        if opened.start() < done or kind in endless:
            continue
        closed = HIDDEN_END[kind].search(text, opened.end())
        if closed is None:
            endless.add(kind)  # otherwise every `<!--` of a broken page would search to the end of the page
            continue
        pieces.append(text[done : opened.start()])
        done, count = closed.end(), count + 1
    return "".join(pieces) + text[done:], count


def _without_tags(text: str) -> tuple[str, int]:
    closed = {match[1].lower() for match in CLOSING.finditer(text)}
    count = 0

    def replacement(tag: re.Match) -> str:
        nonlocal count
        name, rest = tag["name"].lower(), tag["rest"]
        known = name in BLOCK or name in CELL or name in INLINE or name.startswith("o:")
        if not known or not (tag["close"] or rest.endswith("/") or ATTRIBUTE.search(rest) or _opens(tag, closed)):
            return tag[0]
        count += 1
        if name in BLOCK:
            return "\n"
        return " " if name in CELL and tag["close"] else ""

    return TAG.sub(replacement, text), count


def _opens(tag: re.Match, closed: set[str]) -> bool:
    """Whether a bare name in angle brackets is a tag: the document also closes it, or it is often left unclosed."""
    name = tag["name"].lower()
    if tag["rest"].strip():
        return False
    between = (
        tag.string[max(tag.start() - 1, 0) : tag.start()].isalnum() and tag.string[tag.end() : tag.end() + 1].isalnum()
    )
    return name in closed or (name in OFTEN_UNCLOSED and not (name == "p" and between))


def _decoded(text: str) -> tuple[str, int]:
    count = 0

    def replacement(entity: re.Match) -> str:
        nonlocal count
        name = entity["name"]
        if name.startswith("#") or name.rstrip(";") + ";" in html.entities.html5:
            decoded = html.unescape(f"&{name.rstrip(';')};")
        else:
            decoded = "&" + name
        count += decoded != entity[0]
        return decoded

    return ENTITY.sub(replacement, text), count
