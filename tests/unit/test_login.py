"""The cookie of a browser's session: nobody makes one without a token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.config.web import ApiToken
from cdcbridge.web.access import LOCAL
from cdcbridge.web.pages.login import LASTS, cookie_for, proof_for, visitor_of

NOW = 1_800_000_000.0


def token(name: str, secret: str) -> ApiToken:
    return ApiToken(name=name, token=secret, role="viewer")  # type: ignore[arg-type]


TOKENS = [token("a", "one"), token("a.b", "two"), token("b", "three")]


@given(st.sampled_from(TOKENS), st.floats(0, 4e9))
def test_a_cookie_is_its_session(one: ApiToken, now: float) -> None:
    cookie = cookie_for(one, now)
    found = visitor_of(cookie, TOKENS, now)
    assert found is not None and found.name == one.name
    assert visitor_of(cookie, TOKENS, now + LASTS - 1) is not None
    assert visitor_of(cookie, TOKENS, now + LASTS + 1) is None
    assert visitor_of(cookie, [other for other in TOKENS if other is not one], now) is None
    assert one.token.get_secret_value() not in cookie and proof_for(cookie, TOKENS) not in cookie


@given(st.text(), st.floats(0, 4e9))
def test_a_text_is_no_session(text: str, now: float) -> None:
    assert visitor_of(text, TOKENS, now) is None and visitor_of(None, TOKENS, now) is None
    assert visitor_of(text, [], now) is LOCAL, "without tokens"


@given(st.data())
def test_a_changed_cookie_is_no_session(data: st.DataObject) -> None:
    cookie = cookie_for(TOKENS[1], NOW)
    place = data.draw(st.integers(0, len(cookie) - 1))
    letter = data.draw(st.characters(codec="utf-8").filter(lambda one: one != cookie[place]))
    assert visitor_of(cookie[:place] + letter + cookie[place + 1 :], TOKENS, NOW) is None
