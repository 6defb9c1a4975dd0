"""Pictures that a client of the server names: no address that was not allowed is asked, and no bomb is decoded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from running import running_bundle, running_spec
from serving import CHAT, serving
from vlm_models.errors import ImageError, InputError
from vlm_runtime.server import fetch
from vlm_runtime.server.images import (
    Host,
    ImagePolicy,
    check_picture,
    fetch_image,
    fetch_images,
    image_policy,
    parse_host,
)
from vlm_runtime.server.limits import Limits

PUBLIC = "93.184.216.34"


def encoded(kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fetched(url: str, policy: ImagePolicy | None = None) -> bytes:
    return asyncio.run(fetch_image(url, policy or ImagePolicy()))


def refused(url: str, policy: ImagePolicy | None = None) -> str:
    """Why it is refused, which is one short line of text."""
    with pytest.raises(ImageError) as error:
        fetched(url, policy)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_data_url_gives_its_bytes(kind: str) -> None:
    assert fetched(data_url(encoded(kind), f"image/{kind.lower()}")) == encoded(kind)


@pytest.mark.parametrize("head", ["data:image/jpeg;base64,", "DATA:image/png;name=a.png;base64,", "data:;base64,"])
def test_what_is_in_the_bytes_decides_and_not_which_kind_of_picture_they_are_said_to_be(head: str) -> None:
    assert fetched(head + base64.b64encode(encoded()).decode()) == encoded()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("data:image/png;base64,", "the picture is empty"),
        ("data:image/png;base64", "must be data:image/png;base64"),
        ("data:image/png,abc", "must be data:image/png;base64"),
        ("data:image/png;base64,%89PNG", "is not base64"),
        ("data:image/png;base64,iVBORw0KGgo", "is not base64"),
        ("data:image/png;base64,\udce9", "is not base64"),
        (data_url(encoded(), "image/svg+xml"), "of type 'image/svg+xml' is no picture"),
        (data_url(encoded(), "text/html"), "of type 'text/html' is no picture"),
        (data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "are no picture: allowed are PNG, JPEG"),
        (data_url(encoded("TIFF")), "are no picture"),
        (data_url(encoded("ICO", (16, 16))), "are no picture"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "are no picture"),
        (data_url(encoded()[:20]), "are no picture"),
        (data_url(b"\0" * 100), "the 100 bytes are no picture"),
    ],
)
def test_a_data_url_of_no_picture_is_refused(url: str, why: str) -> None:
    assert why in refused(url)


def png(width: int, height: int) -> bytes:
    """A valid head and next to nothing behind it: the pixels are only claimed."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("lossless", [False, True])
def test_every_kind_of_webp_says_its_size_before_it_is_opened(
    lossless: bool, extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    metadata = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"} if extended else {}
    Image.new("RGB", (70, 30), "red").save(file, "WEBP", lossless=lossless, **metadata)
    assert file.getvalue()[12:16] == (b"VP8X" if extended else b"VP8L" if lossless else b"VP8 ")
    check_picture(file.getvalue(), Limits(pixels=2100, edge=70))
    monkeypatch.setattr(Image, "open", lambda *given, **options: pytest.fail("it was opened"))
    with pytest.raises(ImageError, match="70 × 30 pixels"):
        check_picture(file.getvalue(), Limits(edge=69))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (png(8000, 8000), "8000 × 8000"),
        (png(10_001, 1), "10001 × 1"),
        (webp(16_384, 16_384), "16384 × 16384"),
        (encoded("GIF")[:6] + struct.pack("<HH", 60_000, 60_000) + encoded("GIF")[10:], "50000000 pixels"),
        (png(200_000, 200_000), "50000000 pixels"),
    ],
)
def test_a_bomb_is_refused_by_its_head(content: bytes, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("the bomb was decoded"))
    assert size in refused(data_url(content))


def test_limits_of_pixels_are_those_that_were_given() -> None:
    check_picture(encoded(size=(10, 10)), Limits(pixels=100, edge=10))
    with pytest.raises(ImageError, match="10 × 10 pixels, at most 99 and 10 an edge"):
        check_picture(encoded(size=(10, 10)), Limits(pixels=99, edge=10))
    with pytest.raises(ImageError, match="1 × 11 pixels"):
        check_picture(encoded(size=(1, 11)), Limits(pixels=99, edge=10))


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("cdn.example.com", Host("cdn.example.com")),
        ("CDN.Example.com.", Host("cdn.example.com")),
        ("cdn.example.com:8443", Host("cdn.example.com", 8443)),
        ("10.0.0.5", Host("10.0.0.5", None, ipaddress.ip_address("10.0.0.5"))),
        ("[::1]:90", Host("::1", 90, ipaddress.ip_address("::1"))),
        ("nas=10.0.0.5", Host("nas", None, ipaddress.ip_address("10.0.0.5"))),
        ("nas:81=[fd00::1]", Host("nas", 81, ipaddress.ip_address("fd00::1"))),
    ],
)
def test_an_allowed_host_is_a_name_or_an_address(text: str, host: Host) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", "*", "*.example.com", "https://a.com", "a.com/x", "a b", "a.com:99999", "a.com:x"),
        *("=1.2.3.4", "a=b", "u@a", "a=", "1.2.3.4=5.6.7.8", "-a.com", "é.com", "[::1", "a.com\n"),
    ],
)
def test_what_is_no_host_is_not_taken_as_an_allowed_one(text: str) -> None:
    with pytest.raises(InputError, match=r"--image-host .* is no host: write"):
        image_policy(["ok.example.com", text], Limits())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "/etc/passwd",
        "",
        "a.png",
        "ftp://cdn.example.com/a.png",
        "gopher://cdn.example.com/",
        "javascript:alert(1)",
        "https:cdn.example.com",
        "https:///a.png",
        "//cdn.example.com/a.png",
        "http://localhost/a.png",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::1",
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/a.png",
        "https://cdn.example.com.evil.com/a.png",
        "https://evil.com#cdn.example.com",
        "https://evil.com?cdn.example.com",
        "https://evil.com/cdn.example.com",
        "https://evil.com\\@cdn.example.com/a.png",
        "https://user:password@cdn.example.com/a.png",
        "https://cdn.example.com@evil.com/a.png",
        "https://@cdn.example.com/a.png",
        "https://cdn.example.com:22/a.png",
        "https://cdn.example.com:99999/a.png",
        "https://cdn.example.com:x/a.png",
        "https://cdn.example.com/a b.png",
        "https://cdn.example.com/a\r\nHost: evil.com",
        "https://cdn.exa\tmple.com/a.png",
        "https://cdn。example.com/a.png",
        "https://cdn.example.com/é.png",
        "https://cdn.example.com/\udce9.png",
        "https://cdn.example.com/" + "a" * 2048,
    ],
)
def test_an_address_that_was_not_allowed_is_refused_before_any_name_is_resolved(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "addresses", lambda place: pytest.fail(f"{place} was to be resolved"))
    refused(url, image_policy(["cdn.example.com"], Limits()))


def test_without_allowed_hosts_only_data_urls_are_taken() -> None:
    assert refused("https://cdn.example.com/a.png").endswith("are not taken: allowed are data URLs")


def test_a_port_is_allowed_where_it_was_named() -> None:
    policy = image_policy(["a.example.com:8443"], Limits())
    assert fetch.locate("https://A.example.com.:8443/x?y#z", policy).target == "/x?y"
    with pytest.raises(ImageError, match="are not taken"):
        fetch.locate("https://a.example.com/x", policy)


class Resolver:
    """Every name has these addresses, and connections are only written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
        self.given, self.asked, self.connected = given, list[str](), list[tuple[str, int]]()
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(asyncio, "open_connection", self._open_connection)

    def _getaddrinfo(self, host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        kinds = [socket.AF_INET6 if ":" in a else socket.AF_INET for a in self.given]
        return [(kind, socket.SOCK_STREAM, 6, "", (a, port)) for kind, a in zip(kinds, self.given, strict=True)]

    async def _open_connection(self, host: str, port: int, **options: Any) -> None:
        self.connected.append((host, port))
        raise ConnectionRefusedError


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::"),
        *("::1", "fe80::1%lo", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:10.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1"),
        *("2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
    ],
)
@pytest.mark.parametrize("beside", [(), (PUBLIC,)])
def test_a_name_that_leads_into_a_private_network_is_refused(
    address: str, beside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(monkeypatch, *beside, address)
    why = refused("http://cdn.example.com/a.png", image_policy(["cdn.example.com"], Limits()))
    assert "is not on the open internet" in why
    assert address not in why
    assert resolver.connected == []


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, PUBLIC, "2606:2800:220:1::1")
    why = refused("https://cdn.example.com/a.png", image_policy(["cdn.example.com"], Limits()))
    assert why == "the picture of cdn.example.com could not be fetched: no connection"
    assert resolver.asked == ["cdn.example.com"]
    assert resolver.connected == [(PUBLIC, 443), ("2606:2800:220:1::1", 443)]


def test_an_address_that_was_listed_may_be_private_and_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, PUBLIC)
    refused("http://nas/a.png", image_policy(["nas=10.0.0.5"], Limits()))
    refused("http://10.0.0.6:81/a.png", image_policy(["10.0.0.6:81"], Limits()))
    assert (resolver.asked, resolver.connected) == ([], [("10.0.0.5", 80), ("10.0.0.6", 81)])


Serve = Callable[..., tuple[str, ImagePolicy, list[bytes]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(reply, …)`: a host that gives each connection the next reply; its address, a policy for it, what it was
    asked. After a reply of None it says nothing and keeps the connection."""
    listeners = list[socket.socket]()
    kept = list[socket.socket]()

    def start(*replies: bytes | None, **policy: Any) -> tuple[str, ImagePolicy, list[bytes]]:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        port, asked = listener.getsockname()[1], list[bytes]()

        def work() -> None:
            for reply in replies:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError):
                    asked.append(near.recv(65536))
                    near.sendall((reply or b"").replace(b"PORT", str(port).encode()))
                if reply is None:
                    kept.append(near)
                else:
                    near.close()

        threading.Thread(target=work, daemon=True).start()
        host = parse_host(f"pictures.test:{port}=127.0.0.1")
        return f"http://pictures.test:{port}/a.png", ImagePolicy((host,), **policy), asked

    yield start
    for one in [*listeners, *kept]:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def reply(content: bytes, *head: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *head]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + content


def test_a_picture_comes_from_an_allowed_host(serve: Serve) -> None:
    url, policy, asked = serve(reply(encoded(), "Content-Type: image/png", f"Content-Length: {len(encoded())}"))
    assert fetched(url, policy) == encoded()
    head = asked[0].decode().lower().split("\r\n")
    assert head[0] == "get /a.png http/1.1"
    assert f"host: {url[7:-6]}" in head
    assert not [line for line in head if line.startswith(("cookie", "authorization", "referer"))]


def test_a_picture_in_chunks_or_until_the_end_is_whole(serve: Serve) -> None:
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (encoded()[:9], encoded()[9:])) + b"0\r\n\r\n"
    url, policy, _ = serve(reply(chunked, "Transfer-Encoding: chunked"), reply(encoded()))
    assert fetched(url, policy) == fetched(url, policy) == encoded()


def test_pictures_of_one_conversation_have_a_limit_together(serve: Serve) -> None:
    each = reply(encoded())
    url, policy, asked = serve(*[each] * 5, limits=Limits(body_bytes=2 * len(encoded())))
    assert asyncio.run(fetch_images([url] * 2, policy)) == [encoded()] * 2
    with pytest.raises(ImageError, match="bytes together: send fewer or smaller ones"):
        asyncio.run(fetch_images([url] * 9, policy))
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(b"", status="404 Not Found"), "it answered with status 404"),
        (reply(b"", status="204 No Content"), "it answered with status 204"),
        (reply(b"<html>", "Content-Type: text/html"), "it is 'text/html' and no picture"),
        (reply(b"<svg/>", "Content-Type: image/svg+xml"), "it is 'image/svg+xml' and no picture"),
        (reply(b"", "Content-Length: 101"), "it has 101 bytes, more than 100"),
        (reply(b"a" * 101), "it has more than 100 bytes"),
        (reply(b"a" * 50, "Content-Length: 99"), "its answer is broken or cut off"),
        (reply(b"a", "Content-Encoding: gzip"), "it came compressed"),
        (reply(b"", "X: " + "a" * 200_000), "its answer is broken or cut off"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "its answer is broken or cut off"),
        (b"", "its answer is broken or cut off"),
        (None, "it took more than 0.5 seconds"),
        (reply(b"a" * 50), "are no picture"),
        (reply(b"", "Location: /a.png", status="302 Found"), "it redirects more than 3 times"),
        (reply(b"", status="302 Found"), "it redirects more than 3 times"),
        (reply(b"", "Location: http://127.0.0.1:PORT/", status="302 Found"), "are not taken"),
        (reply(b"", "Location: http://169.254.169.254/", status="307 Temporary"), "are not taken"),
        (reply(b"", "Location: file:///etc/passwd", status="301 Moved"), "is no address of a picture"),
        (reply(b"", "Location: //pictures.test/a", status="301 Moved"), "are not taken"),
        (reply(b"", "Location: http://u:p@pictures.test:PORT/", status="308 Moved"), "no user name"),
        (reply(b"", "Location: \xe9\x01", status="301 Moved"), ""),
    ],
)
def test_what_an_allowed_host_may_not_do(serve: Serve, answer: bytes | None, why: str) -> None:
    url, policy, asked = serve(*[answer] * 4, file_bytes=100, seconds=0.5)
    assert why in refused(url, policy)
    assert len(asked) == (4 if "redirects more" in why else 1)


def test_a_redirect_within_what_is_allowed_is_followed(serve: Serve) -> None:
    url, policy, asked = serve(reply(b"", "Location: ../b.png?c", status="302 Found"), reply(encoded()))
    assert fetched(url, policy) == encoded()
    assert asked[1].startswith(b"GET /b.png?c HTTP/1.1\r\n")


def test_tls_is_for_the_name_and_not_for_the_address(serve: Serve) -> None:
    url, policy, asked = serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert "could not be fetched: TLS failed" in refused(url.replace("http:", "https:"), policy)
    assert b"pictures.test" in asked[0]
    context = fetch._tls()
    assert (context.check_hostname, context.verify_mode.name) == (True, "CERT_REQUIRED")


def test_a_redirect_from_https_to_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def elsewhere(place: fetch.Place, policy: ImagePolicy) -> str:
        return "http://cdn.example.com/a.png"

    monkeypatch.setattr(fetch, "_ask", elsewhere)
    policy = image_policy(["cdn.example.com"], Limits())
    assert "from https to http" in refused("https://cdn.example.com/a.png", policy)


def test_vlm_serve_answers_about_a_picture_of_an_allowed_host(serve: Serve, tmp_path: Path) -> None:
    url, policy, asked = serve(*[reply(encoded())] * 2)
    (host,) = policy.hosts
    allowed = f"{host.name}:{host.port}={host.address}"
    bundle = running_bundle(tmp_path / "bundle", running_spec(eos_token_ids=()))
    with serving(bundle, "--threads", 1, "--image-host", allowed) as server:

        def answer(picture: str) -> httpx.Response:
            parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": parts}]
            return httpx.post(server.url + CHAT, json={"messages": messages, "max_tokens": 8}, timeout=60)

        near, far = answer(data_url(encoded())).json(), answer(url).json()
        assert near["choices"] == far["choices"]
        assert near["usage"]["prompt_tokens"] == far["usage"]["prompt_tokens"]
        other = answer(url.replace("pictures.test", "127.0.0.1"))
        assert other.status_code == 400
        assert "allowed are data URLs and pictures of pictures.test" in other.json()["error"]["message"]
    assert len(asked) == 1
