"""Shards behind a real web server: the same bytes as from the folder, whatever the server does wrong, or one clear sentence."""

from __future__ import annotations

import json
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.http_server import Handler, Server, serving
from tests.data.test_shards import CLASSES, SAMPLES, make_sample, write_set
from xkd_fast.data import http_folder
from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.shards import CorruptSampleError, ShardSet, index_path
from xkd_fast.errors import UserError

QUICK = RemoteOptions(timeout=0.5, attempts=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write_set(root / "set", [SAMPLES[:3], [], SAMPLES[3:]])
    return root


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_folder, "FIRST_PAUSE", 0.01)
    with serving(folder) as running:
        yield running


def once(answer: Callable[[Handler], None], times: int = 1) -> Callable[[Handler], bool]:
    """Misbehave at the first requests for a tar, then no more."""
    left = [times]

    def misbehave(handler: Handler) -> bool:
        if ".tar" not in handler.path or not left[0]:
            return False
        left[0] -= 1
        answer(handler)
        return True

    return misbehave


def begin(handler: Handler) -> None:
    """The head of a right answer, and the first bytes of its body."""
    start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    handler.send_response(206)
    handler.send_header("Content-Length", str(end + 1 - start))
    handler.send_header("Content-Range", f"bytes {start}-{end}/*")
    handler.end_headers()
    handler.wfile.write(b"x" * 10)
    handler.wfile.flush()
    handler.close_connection = True


def stall(handler: Handler) -> None:
    begin(handler)
    time.sleep(1.5)


def hang_up(handler: Handler) -> None:
    begin(handler)


def busy(handler: Handler) -> None:
    handler.answer(503, b"later", {"Retry-After": "0"})


def spoil(handler: Handler) -> None:
    """The part asked for, with one bit flipped."""
    start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    data = bytearray((handler.server.folder / handler.path.lstrip("/")).read_bytes())
    total = len(data)
    data[start + 100] ^= 1
    handler.answer(206, bytes(data[start : end + 1]), {"Content-Range": f"bytes {start}-{end}/{total}"})


def another_part(handler: Handler) -> None:
    """As many bytes as were asked for, from the start of the file."""
    start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    data = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
    handler.answer(206, data[: end + 1 - start], {"Content-Range": f"bytes 0-{end - start}/{len(data)}"})


def no_number(handler: Handler) -> None:
    """The part asked for, of a length that is no number."""
    start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    data = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
    headers = {"Content-Length": "12 bytes", "Content-Range": f"bytes {start}-{end}/{len(data)}"}
    handler.answer(206, data[start : end + 1], headers)


def test_an_address_gives_what_the_folder_gives(folder: Path, server: Server) -> None:
    """Red if samples, labels or the checksum that a resumed run compares depend on where the set lies; if a sample takes more
    than one request, an index is fetched twice, or every request opens a connection."""
    local, remote = ShardSet.open(folder / "set"), ShardSet.open(f"{server.url}/set/", remote=QUICK)
    assert (remote.crc32, remote.keys, remote.classes, len(remote)) == (local.crc32, local.keys, CLASSES, 4)
    assert len(server.requests) == 1 + 3, "the manifest and each index, once"
    opened = server.connections
    with ThreadPoolExecutor(2) as pool:
        for index, sample in enumerate(pool.map(remote.read, range(4))):
            assert (sample.video.tobytes(), sample.audio.tobytes()) == (SAMPLES[index].video, SAMPLES[index].audio)
    assert len(server.requests) == 4 + 4 and server.connections <= opened + 2
    assert remote.details(2) == local.details(2) and not any(remote.damage(index) for index in range(4))
    assert remote.record(3).shard == f"{server.url}/set/shard-000002.tar"


def test_folders_and_addresses_are_one_set(folder: Path, server: Server, tmp_path: Path) -> None:
    """Red if sets used together must all lie in the same kind of place."""
    other = write_set(tmp_path / "other", [[make_sample(9)]])
    shards = ShardSet.open([other, f"{server.url}/set"], remote=QUICK)
    assert [shards.read(index).key for index in range(5)] == ["00000009", *(sample.key for sample in SAMPLES)]


@pytest.mark.parametrize("misbehave", [stall, hang_up, busy, spoil, another_part, no_number])
def test_what_passes_is_tried_again(folder: Path, server: Server, misbehave: Callable[[Handler], None]) -> None:
    """Red if one hiccup of the network ends a run of days, or wrong bytes are trained on."""
    shards = ShardSet.open(f"{server.url}/set", remote=QUICK)
    server.misbehave = once(misbehave)
    assert shards.read(1).video.tobytes() == SAMPLES[1].video
    assert len(server.asked(".tar")) == 2
    if misbehave is not spoil:
        server.misbehave = once(misbehave)
        assert shards.read_range(0, 600, 50) == (folder / "set" / "shard-000000.tar").read_bytes()[600:650], "without any CRC"


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        (stall, "no answer for 0.5 s, at the last of 3 attempts; .* data.remote.attempts or data.remote.timeout"),
        (hang_up, "the connection ended before the file did, at the last of 3 attempts"),
        (busy, "the server answers 503 Service Unavailable, at the last of 3 attempts"),
        (no_number, r"the server answers with Content-Length '12 bytes', which is no number, at the last of 3 attempts"),
        (lambda handler: handler.answer(403, b""), "the server answers 403 Forbidden; make it readable for everyone, or sign"),
        (lambda handler: handler.answer(404, b""), "the server answers 404 Not Found; check the address"),
        (lambda handler: handler.answer(416, b""), r"ends before byte \d+, but its manifest says \d+ bytes; copy or prepare"),
        (lambda handler: handler.answer(206, b"ab", {"Content-Range": "bytes 0-1/99"}), r"has 99 bytes, but its manifest says"),
    ],
)
def test_what_stays_is_told(server: Server, misbehave: Callable[[Handler], None], words: str) -> None:
    """Red if training hangs, tries for ever, or ends with a traceback; or if it tries again what cannot get better."""
    shards = ShardSet.open(f"{server.url}/set", remote=QUICK)
    server.misbehave = once(misbehave, times=99)
    with pytest.raises(UserError, match=words) as error:
        shards.read(0)
    assert f"{server.url}/set/shard-000000.tar" in str(error.value)
    assert len(server.asked(".tar")) == (3 if "attempts" in words else 1)


def test_wrong_bytes_are_named(server: Server) -> None:
    """Red if a shard that is damaged on the server is trained on, or stops a run that replaces damaged samples."""
    shards = ShardSet.open(f"{server.url}/set", remote=QUICK)
    server.misbehave = once(spoil, times=99)
    with pytest.raises(CorruptSampleError, match=r"http://.*/set/shard-000000\.tar, sample 00000000, video: 700 of 700 bytes"):
        shards.read(0)


def test_a_server_without_ranges_is_told_of(server: Server) -> None:
    """Red if every sample costs the transfer of a whole shard, unnoticed."""
    shards = ShardSet.open(f"{server.url}/set", remote=QUICK)
    server.ranges = False
    with pytest.raises(UserError, match=r"is sent whole where a part is asked for .*data\.cache\.folder=FOLDER"):
        shards.read(0)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "{url}/nowhere",
            "manifest.json, the manifest of a shard set, cannot be read: the server answers 404 Not Found; check",
        ),
        ("http://127.0.0.1:9/set", "Connection refused, at the last of 3 attempts"),
        ("http:///set", "http:///set is no address of a shard set"),
        ("http://host:99999/set", "is no address of a shard set"),
        ("https://me:secret@host/set", "https://host/set is given with a user or password"),
    ],
)
def test_addresses_that_lead_nowhere(server: Server, place: str, words: str) -> None:
    """Red if a typing error in an address is a traceback, or a password is printed."""
    with pytest.raises(UserError, match=re.escape(words)) as error:
        ShardSet.open(place.format(url=server.url), remote=QUICK)
    assert "secret" not in str(error.value)


def test_an_index_of_another_set_is_refused(folder: Path, server: Server) -> None:
    """Red if half of a newer copy on the server is taken for the set."""
    name = index_path(Path("shard-000000.tar")).name

    def other(handler: Handler) -> bool:
        if name not in handler.path:
            return False
        handler.answer(200, (folder / "set" / name).read_bytes().replace(b'"label": 0', b'"label": 1'))
        return True

    server.misbehave = other
    with pytest.raises(UserError, match=rf"http://.*/{re.escape(name)}, the index of a shard, is not the one"):
        ShardSet.open(f"{server.url}/set", remote=QUICK)


def test_a_signature_goes_with_every_request_and_into_no_message(server: Server) -> None:
    """Red if a signed address opens its manifest only, or a log gives the signature away."""
    shards = ShardSet.open(f"{server.url}/set?sig=SECRET", remote=QUICK)
    shards.read(0)
    assert (
        all(path.endswith("?sig=SECRET") for path, _ in server.requests) and "/set/shard-000000.tar?" in server.requests[-1][0]
    )
    server.misbehave = once(lambda handler: handler.answer(403, b""), 99)
    with pytest.raises(UserError, match="403") as error:
        shards.read(0)
    assert "SECRET" not in str(error.value) and "SECRET" not in shards.record(0).shard


def test_redirections_are_followed(server: Server) -> None:
    """Red if a set behind a redirection (as of many download sites) cannot be read, or a circle of them never ends."""

    def elsewhere(handler: Handler) -> bool:
        if not handler.path.startswith("/moved/"):
            return False
        handler.answer(302, b"", {"Location": handler.path.replace("moved", "set")})
        return True

    server.misbehave = elsewhere
    assert ShardSet.open(f"{server.url}/moved", remote=QUICK).read(3).video.tobytes() == SAMPLES[3].video
    server.misbehave = lambda handler: handler.answer(302, b"", {"Location": handler.path}) is None
    with pytest.raises(UserError, match=r"answers 302 Found 6 times in a row"):
        ShardSet.open(f"{server.url}/set", remote=QUICK)


def test_a_proxy_is_asked_where_the_environment_names_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if machines that reach the outside through a proxy alone cannot read a set, or no_proxy is not heeded."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)

    def forward(handler: Handler) -> bool:
        handler.path = handler.path.removeprefix("http://shards.invalid")
        return False

    server.misbehave = forward
    assert len(ShardSet.open("http://shards.invalid/set", remote=QUICK)) == 4
    assert all(path.startswith("http://shards.invalid/set/") for path, _ in server.requests)
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:p%40ss@"))
    told: list[str | None] = []
    server.misbehave = lambda handler: told.append(handler.headers["Proxy-Authorization"]) or forward(handler)
    assert len(ShardSet.open("http://shards.invalid/set", remote=QUICK)) == 4
    assert set(told) == {"Basic " + b64encode(b"user:p@ss").decode()}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.requests.clear()
    told.clear()
    assert len(ShardSet.open(f"{server.url}/set", remote=QUICK)) == 4
    assert json.dumps(server.requests).count("http://") == 0 and set(told) == {None}


def test_odd_letters_in_an_address_are_escaped_once(server: Server) -> None:
    """Red if they end in a traceback, are tried again and again, show the signature, or are escaped twice."""
    for folder, wanted in (("my shards", "/my%20shards/"), ("my%20shards", "/my%20shards/"), ("données", "/donn%C3%A9es/")):
        with pytest.raises(UserError, match="answers 404") as error:
            ShardSet.open(f"{server.url}/{folder}?sig=SE CRET", remote=QUICK)
        assert "CRET" not in str(error.value)
        assert server.requests[-1][0] == f"{wanted}manifest.json?sig=SE%20CRET"
    server.misbehave = lambda handler: handler.answer(302, b"", {"Location": "http://[SECRET"}) is None
    with pytest.raises(UserError, match="or one that it leads to, is malformed") as error:
        ShardSet.open(f"{server.url}/set", remote=QUICK)
    assert "SECRET" not in str(error.value)
