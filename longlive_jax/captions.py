"""The cleaning that every caption went through before the text encoder saw it."""

import html
import re

import ftfy


def clean(text: str) -> str:
    """The text as the text encoder's tokenizer takes it; may be empty.

    ftfy repairs broken encodings and rewrites curly quotes, full-width punctuation and the like;
    HTML entities are resolved twice, for text that was escaped twice; runs of white space become
    one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()
