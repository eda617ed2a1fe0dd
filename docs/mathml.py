"""Render equations as MathML while the site is built, so that no page requests a script from another host."""

import html
import re

from latex2mathml.converter import convert

_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace the equations that the arithmatex extension has marked."""

    def rendered(match: re.Match[str]) -> str:
        tag, opening, latex = match.groups()
        math = convert(html.unescape(latex), display="block" if opening == "[" else "inline")
        return f"<{tag}>{math}</{tag}>"

    return _MATH.sub(rendered, content)
