"""Logins: Docker's files, credential helpers, and tokens that expire."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest

from cnncc_runtime.errors import CnnccError, DependencyMissing, NetworkFailed, RegistryRefused, UsageError
from cnncc_runtime.oci.credentials import Credentials, find_credentials
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository
from tests.oci import registries
from tests.oci.registries import LOGIN
from tests.oci.test_registry import put
from tests.oci.tokens import password_registry, token_server

HOST = "registry.example.com:5000"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's folder, empty."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def encoded(name: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


def write(path: Path, config: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def helper(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "cloud") -> None:
    """Install a credential helper."""
    program = folder / "bin" / f"docker-credential-{name}"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("auths", "found"),
    [
        ({}, None),
        ({"other.example.com": encoded("a", "b")}, None),
        ({HOST: encoded("a", "b:c")}, Credentials("a", "b:c")),
        ({f"https://{HOST}/v2/": encoded("a", "b")}, Credentials("a", "b")),
        ({HOST: {"username": "a", "password": "b"}}, Credentials("a", "b")),
        ({HOST: {**encoded("<token>", ""), "identitytoken": "t"}}, Credentials(token="t")),
        ({HOST: {}}, None),
    ],
)
def test_what_docker_stored_is_found(home: Path, auths: object, found: Credentials | None) -> None:
    assert find_credentials(HOST) is None
    write(home / "config.json", {"auths": auths, "HttpHeaders": {"more": "of Docker's"}})
    assert find_credentials(HOST) == found


def test_the_hub_goes_by_its_old_address(home: Path) -> None:
    write(home / "config.json", {"auths": {"https://index.docker.io/v1/": encoded("a", "b")}})
    assert find_credentials("docker.io") == Credentials("a", "b")


def test_other_tools_files_are_read_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run/containers/auth.json", {"auths": {HOST: encoded("podman", "p")}})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert find_credentials(HOST) == Credentials("podman", "p")
    write(home / "config.json", {"auths": {HOST: encoded("docker", "d")}})
    assert find_credentials(HOST) == Credentials("docker", "d")
    write(tmp_path / "own.json", {"auths": {HOST: encoded("own", "o")}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "own.json"))
    assert find_credentials(HOST) == Credentials("own", "o")


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"Username": "AWS", "Secret": "s"}, Credentials("AWS", "s")),
        ({"Username": "<token>", "Secret": "t"}, Credentials(token="t")),
    ],
)
def test_a_helper_is_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch, key: str, told: dict[str, str], found: Credentials
) -> None:
    script = f"read host; [ \"$1 $host\" = 'get {HOST}' ] && echo '{json.dumps({**told, 'ServerURL': HOST})}'"
    helper(home, monkeypatch, script)
    write(home / "config.json", {key: "cloud" if key == "credsStore" else {HOST: "cloud"}, "auths": {HOST: {}}})
    assert find_credentials(HOST) == found


def test_a_helper_that_knows_no_login_leaves_the_file_to_say(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "echo credentials not found in native keychain; exit 1")
    write(home / "config.json", {"credsStore": "cloud", "auths": {HOST: encoded("a", "b")}})
    assert find_credentials(HOST) == Credentials("a", "b")


@pytest.mark.parametrize(
    ("script", "said"), [("echo expired sso session >&2; exit 1", "expired sso session"), ("echo {}", "did not say")]
)
def test_a_helper_that_fails_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    helper(home, monkeypatch, script)
    write(home / "config.json", {"credsStore": "cloud"})
    with pytest.raises(RegistryRefused, match=said) as caught:
        find_credentials(HOST)
    assert "docker-credential-cloud get" in caught.value.hint


@pytest.mark.parametrize("name", ["absent", "../../bin/sh"])
def test_a_helper_that_is_not_installed_is_named(home: Path, name: str) -> None:
    write(home / "config.json", {"credsStore": name})
    with pytest.raises(DependencyMissing, match="not installed"):
        find_credentials(HOST)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"auths": 1}', json.dumps({"auths": {HOST: {"auth": "%%%"}}}), "\xff"]
)
def test_a_damaged_file_is_named(home: Path, content: str) -> None:
    (home / "config.json").write_text(content, "latin-1")
    with pytest.raises(UsageError, match=r"config.json holds"):
        find_credentials(HOST)


@pytest.mark.parametrize("login", [LOGIN, Credentials(token="identity")])
def test_a_token_is_fetched_and_used_until_it_expires(tmp_path: Path, login: Credentials) -> None:
    with (
        token_server(tmp_path / "tokens", login) as tokens,
        registries.registry(tmp_path / "registry", tokens=tokens.words) as own,
    ):
        repository = own.repository(login=login)
        tokens.lifetime = -100
        with pytest.raises(RegistryRefused):
            repository.tags()
        tokens.lifetime = 300
        tokens.asked.clear()
        entry = put(repository, "hello", tag="v1")
        assert repository.has(entry.digest)
        assert repository.tags() == {"v1"}
        methods = [method for method, _ in tokens.asked]
        assert methods == ["POST" if login.token else "GET"] * 2, "one token to read, one to write, each once"
        assert {fields["scope"] for _, fields in tokens.asked} == {repository.pull, repository.push}
        assert {fields["service"] for _, fields in tokens.asked} == {"registry.test"}


JSON_KEY = json.dumps({"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\n:\n"}, indent=2)
NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        # az acr login: nobody's name without a password, and what stands for us
        ({**encoded(NOBODY, ""), "identitytoken": "eyJ.refresh"}, Credentials(token="eyJ.refresh")),
        # az acr login --expose-token, and docker login with that
        (encoded(NOBODY, "eyJ.refresh"), Credentials(NOBODY, "eyJ.refresh")),
        # docker login -u _json_key, whose password has colons and ends of lines
        (encoded("_json_key", JSON_KEY), Credentials("_json_key", JSON_KEY)),
        (encoded("oauth2accesstoken", "ya29.a0"), Credentials("oauth2accesstoken", "ya29.a0")),
        # Alibaba's temporary password has a colon in it
        (encoded("cr_temp_user", "eyJ0aW1l:0705733"), Credentials("cr_temp_user", "eyJ0aW1l:0705733")),
        (encoded("AWS", "eyJwYXls"), Credentials("AWS", "eyJwYXls")),
    ],
)
def test_what_the_clouds_logins_store_is_found(home: Path, entry: object, found: Credentials) -> None:
    write(home / "config.json", {"auths": {HOST: entry}})
    assert find_credentials(HOST) == found


@pytest.mark.parametrize("name", ["ecr-login", "acr-env", "gcloud", "gcr"])
def test_each_clouds_helper_is_asked_for_its_registry_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    helper(home, monkeypatch, 'echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"s\\"}"', name)
    write(home / "config.json", {"credHelpers": {HOST: name}, "auths": {"other.example.com": encoded("a", "b")}})
    assert find_credentials(HOST) == Credentials("u", "s")
    assert find_credentials("other.example.com") == Credentials("a", "b")


@pytest.mark.parametrize("login", [Credentials(token="eyJ.refresh"), Credentials(NOBODY, "eyJ.refresh")])
def test_a_refresh_token_of_azures_kind_is_exchanged_for_an_access_token(tmp_path: Path, login: Credentials) -> None:
    with (
        token_server(tmp_path / "tokens", login) as tokens,
        registries.registry(tmp_path / "registry", tokens=tokens.words) as own,
    ):
        tokens.word = "access_token"
        put(own.repository(login=login), "hello", tag="v1")
        [(method, fields), *_] = tokens.asked
        assert method == ("POST" if login.token else "GET")
        if login.token:
            assert (fields["grant_type"], fields["refresh_token"]) == ("refresh_token", login.token)


@pytest.mark.parametrize("login", [Credentials("_json_key", JSON_KEY), Credentials("cr_temp_user", "eyJ0aW1l:0705733")])
def test_passwords_that_are_documents_reach_a_token_server_as_they_are(tmp_path: Path, login: Credentials) -> None:
    with (
        token_server(tmp_path / "tokens", login) as tokens,
        registries.registry(tmp_path / "registry", tokens=tokens.words) as own,
    ):
        put(own.repository(login=login), "hello", tag="v1")


def test_a_password_that_expired_is_asked_for_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(
        home, monkeypatch, f'echo "{{\\"Username\\": \\"AWS\\", \\"Secret\\": \\"$(cat {home}/now)\\"}}"', "ecr-login"
    )
    with password_registry("monday") as own:
        host = f"localhost:{own.port}"
        write(home / "config.json", {"credHelpers": {host: "ecr-login"}})
        (home / "now").write_text("monday")
        place = place_of(f"http://{host}", "vision")
        repository = Repository(place, Connection(place.host, sleep=lambda _: None))
        assert repository.tags() == {"1.0.0"}
        assert own.said == ["", "monday"]
        own.good, own.expired = {"tuesday"}, {"monday"}
        (home / "now").write_text("tuesday")
        assert repository.tags() == {"1.0.0"}
        assert own.said[2:] == ["monday", "tuesday"]

        own.good, own.expired = set(), {"monday", "tuesday"}
        own.said.clear()
        with pytest.raises(RegistryRefused, match="403"):
            repository.tags()
        assert own.said == ["tuesday"], "the same password is not tried twice"
        (home / "now").write_text("monday")
        own.said.clear()
        with pytest.raises(RegistryRefused, match="403"):
            repository.tags()
        assert own.said == ["tuesday", "monday"], "nor a second one for ever"


def test_a_token_server_that_does_not_know_us_is_named(tmp_path: Path) -> None:
    with (
        token_server(tmp_path / "tokens", LOGIN) as tokens,
        registries.registry(tmp_path / "registry", tokens=tokens.words) as own,
    ):
        for login in (None, Credentials("engineer", "wrong"), Credentials(token="wrong")):
            with pytest.raises(RegistryRefused, match="login") as caught:
                own.repository(login=login).tags()
            assert "docker login" in caught.value.hint
        tokens.answer = b"[]"
        with pytest.raises(RegistryRefused, match="gave no token"):
            own.repository(login=LOGIN).tags()


def test_logins_are_not_sent_where_everybody_could_read_them(tmp_path: Path) -> None:
    words = f"realm: 'http://tokens.example.com/token', service: s, issuer: i, rootcertbundle: {tmp_path / 'ca.pem'}"
    with token_server(tmp_path / "tokens", LOGIN) as tokens:
        (tmp_path / "ca.pem").write_bytes(tokens.bundle.read_bytes())
    with registries.registry(tmp_path / "registry", tokens=words) as own:
        repository = own.repository(login=LOGIN)
        with pytest.raises(RegistryRefused, match="where everybody could read them"):
            repository.tags()


def test_a_place_that_is_nowhere_is_said_quickly() -> None:
    place = place_of("https://nowhere.invalid", "vision")
    with pytest.raises(NetworkFailed, match=r"nowhere\.invalid") as caught:
        Repository(place, Connection(place.host, sleep=lambda _: None)).tags()
    assert isinstance(caught.value, CnnccError)
