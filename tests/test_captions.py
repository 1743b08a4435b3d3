"""Cleaning of captions."""

import pytest

from longlive_jax.captions import clean


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a cat", "a cat"),
        ("  a \t\n cat  ", "a cat"),
        ("“a” ‘cat’", "\"a\" 'cat'"),
        ("猫，狗。", "猫,狗。"),
        ("ＡＢ！？", "AB!?"),
        ("a\u00a0cat\u3000sat", "a cat sat"),
        ("&lt;b&gt; &amp; co", "<b> & co"),
        ("&amp;amp; &amp;lt;", "& <"),
        ("a&nbsp;cat", "a cat"),
        ("&nbsp;", ""),
        ("schÃ¶n", "schön"),
        ("ﬁre", "fire"),
        ("a\x00cat\x1b[31m", "acat"),
        ("", ""),
    ],
)
def test_clean(text, want):
    assert clean(text) == want
    assert clean(clean(text)) == want
