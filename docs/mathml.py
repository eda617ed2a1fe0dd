"""Render mathematics as MathML while the site is built, so that a page asks no other host for a script."""

import html
import re

from latex2mathml.converter import convert

_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace what the arithmatex extension has marked."""

    def rendered(match: re.Match[str]) -> str:
        tag, opening, latex = match.groups()
        math = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        return f"<{tag}>{math}</{tag}>"

    return _MATH.sub(rendered, content)
