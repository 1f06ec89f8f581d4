"""Markdown as a reader sees it."""

from markdown_it import MarkdownIt

_PARSER = MarkdownIt("commonmark").enable("table")


def tokens(text):
    return _PARSER.parse(text)


def tables(text):
    """Cells of every table, as plain text."""
    found, rows = [], None
    for token in tokens(text):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows is not None:
            rows[-1].append(plain(token))
        elif token.type == "table_close":
            found.append(rows)
            rows = None
    return found


def plain(token):
    """The text of a paragraph, heading or cell without its markup."""
    return "".join(child.content for child in token.children if child.type in ("text", "text_special", "code_inline"))


def code_blocks(text, language):
    return [token.content for token in tokens(text) if token.type == "fence" and token.info == language]


def raw_html(text):
    """HTML that a renderer would take over as it is."""
    parsed = tokens(text)
    inline = [child for token in parsed for child in token.children or () if child.type == "html_inline"]
    return [token.content for token in [*parsed, *inline] if token.type in ("html_block", "html_inline")]
