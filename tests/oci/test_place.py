"""Addresses of registries, and names of repositories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc_runtime.errors import UsageError
from cnncc_runtime.oci.place import place_of


@pytest.mark.parametrize(
    ("registry", "name", "url"),
    [
        ("https://registry.example.com", "vision", "https://registry.example.com/v2/vision"),
        ("registry.example.com:5000/team/models/", "vision", "https://registry.example.com:5000/v2/team/models/vision"),
        ("http://127.0.0.1:5000", "a/b", "http://127.0.0.1:5000/v2/a/b"),
        ("http://localhost", "a__b", "http://localhost/v2/a__b"),
        ("http://[::1]:5000", "a", "http://[::1]:5000/v2/a"),
    ],
)
def test_an_address_and_a_name_are_a_repository(registry: str, name: str, url: str) -> None:
    assert place_of(registry, name).url == url


def test_a_repository_has_others_below_it() -> None:
    assert str(place_of("https://r.io/team", "vision").beside("tuf")) == "r.io/team/vision-tuf"


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        ("ftp://r.io", "no address"),
        ("https://", "no address"),
        ("https://r.io:port", "no address"),
        ("https://r.io?x=1", "no address"),
        ("https://me:secret@r.io", "holds a name and a password"),
        ("http://r.io", "neither private nor authentic"),
        ("http://127.0.0.1.evil.io", "neither private nor authentic"),
        ("https://r.io/Team", "no name of a repository"),
        ("https://r.io/a/../b", "no name of a repository"),
    ],
)
def test_what_is_no_address_is_refused(registry: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        place_of(registry, "vision")
    assert caught.value.hint
    assert "secret" not in str(caught.value)


@given(st.text(max_size=300))
def test_every_name_is_a_path_below_the_registry_or_refused(name: str) -> None:
    try:
        place = place_of("https://r.io", name)
    except UsageError:
        return
    path = place.url.removeprefix("https://r.io/v2/")
    assert path == name
    assert not {"", ".", ".."} & set(path.split("/"))
    assert path.isascii()
