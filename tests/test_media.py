"Pictures from a folder or a download: limits, addresses, redirects, retries, what is left out and why."
import io
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boig.benches.media import LeftOut, Limits, Net, collect_media, fetch, inspect, is_public, sniff
from boig.core import BoigError


def packed(kind="PNG", size=(24, 24)):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(file := io.BytesIO(), kind)
    return file.getvalue()

PNG, JPEG = packed(), packed("JPEG")
HERE, OTHER = "127.0.0.1", "127.0.0.2"  # one machine, two addresses: the first is allowed in these tests
LIMITS = Limits(size=100_000, seconds=5, tries=3, wait=0.01, allow=(HERE,))


class Server(ThreadingHTTPServer):
    "Answers by path; remembers what was asked, by which name, and how much it could send."
    def __init__(self, address=("0.0.0.0", 0)):
        super().__init__(address, Handler)
        self.asked, self.hosts, self.sent = Counter(), [], Counter()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
    def url(self, path, host=HERE): return f"http://{host}:{self.server_port}/{path}"
    def handle_error(self, *_): pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, body=b"", status=200, length=None, **headers):
        self.send_response(status)
        if length is not False: self.send_header("Content-Length", str(length or len(body)))
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        for i in range(0, len(body), 4096): self.server.sent[self.path] += self.wfile.write(body[i:i + 4096])
    def do_GET(self):
        server, path = self.server, self.path
        server.asked[path] += 1
        server.hosts.append(self.headers["Host"])
        match path.split("/")[1]:
            case "png": self.answer(PNG, Content_Type="text/plain")
            case "jpeg": self.answer(JPEG)
            case "page": self.answer(b"<html>" + bytes(5_000_000), Content_Type="image/png")
            case "large": self.answer(PNG + bytes(20_000_000))
            case "endless": self.answer(PNG + bytes(20_000_000), length=False)
            case "cut": self.answer(PNG[:500], length=len(PNG))
            case "half": self.answer(PNG[:500])
            case "empty": self.answer()
            case "packed": self.answer(PNG, Content_Encoding="gzip")
            case "busy": self.answer(PNG, *((503,) if server.asked[path] < 3 else ()))
            case "later": self.answer(PNG, *((429,) if server.asked[path] < 2 else ()), Retry_After="7")
            case "to": self.answer(status=302, Location=path[4:])
            case "round": self.answer(status=301, Location="/round")
            case "slow":
                self.send_response(200)
                self.end_headers()
                for b in PNG: self.wfile.write(bytes([b])); self.wfile.flush(); time.sleep(0.05)
            case "drip":
                for b in b"HTTP/1.1 200 OK\r\n" + b"X-Still: here\r\n" * 999: self.wfile.write(bytes([b])); self.wfile.flush(); time.sleep(0.05)
            case _: self.answer(status=404)


@pytest.fixture(scope="module")
def server():
    with Server() as s:
        yield s
        s.shutdown()

def fate(net, url, rest=lambda s: None):
    "A picture's bytes, or why not."
    try: return fetch(net, url, rest)
    except LeftOut as e: return e.why

def got(url, limits=LIMITS, rest=lambda s: None):
    with Net(limits) as net: return fate(net, url, rest)


def test_types_are_sniffed(server):
    assert [sniff(packed(k)) for k in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")] == [".png", ".jpg", ".gif", ".webp", ""]
    assert got(server.url("png")) == PNG and got(server.url("jpeg")) == JPEG  # whatever the server calls them
    assert got(server.url("page"), replace(LIMITS, size=10_000_000)) == "not a JPEG, PNG, GIF or WebP"
    assert server.sent["/page"] < 5_000_000  # and the rest was not taken


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 3000), st.sampled_from([PNG, JPEG]))
def test_inspect_never_breaks(noise, at, picture):
    for data in (noise, picture[:at], picture[:at] + noise + picture[at + len(noise):]):
        try: assert inspect(data) in (".png", ".jpg", ".gif", ".webp")
        except LeftOut: pass


def test_too_large_is_stopped_early(server):
    for path in ("large", "endless"):  # told by Content-Length, and not told
        assert got(server.url(path)) == "too large"
        assert server.sent[f"/{path}"] < 19_000_000  # what was in the network's buffers, at most
    assert got(server.url("png"), replace(LIMITS, size=len(PNG))) == PNG
    assert got(server.url("png"), replace(LIMITS, size=len(PNG) - 1)) == "too large"


def test_bombs_and_damage(server):
    file = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")
    with pytest.raises(LeftOut, match="144,000,000 pixels, more than 100,000,000"): inspect(file.getvalue())
    assert got(server.url("half")) == "cannot be unpacked" and got(server.url("empty")) == "not a JPEG, PNG, GIF or WebP"
    assert got(server.url("packed")) == "packed answer"
    before = server.asked["/cut"]
    assert got(server.url("cut")) == "connection broken" and server.asked["/cut"] - before == LIMITS.tries  # less came than was said: tried again


def test_retries_wait(server):
    waits = []
    assert got(server.url("busy/1"), rest=waits.append) == PNG and len(waits) == 2
    assert 0.0075 <= waits[0] <= 0.0125 and 0.015 <= waits[1] <= 0.025
    waits.clear()
    assert got(server.url("later/1"), rest=waits.append) == PNG and waits == [7]
    assert got(server.url("later/2"), replace(LIMITS, longest_wait=2), waits.append) == PNG and waits == [7, 2]
    assert got(server.url("busy/2"), replace(LIMITS, tries=2)) == "HTTP 503"
    assert got(server.url("nowhere"), rest=waits.append) == "HTTP 404" and len(waits) == 2  # final: no wait


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_a_try_has_a_deadline(server, path):
    "However steadily the other side drips, in the body or in the headers."
    start = time.monotonic()
    assert got(server.url(path), replace(LIMITS, seconds=0.3, tries=2)) == "time-out"
    assert time.monotonic() - start < 3


def test_addresses():
    "Against the registries' special blocks, by their first and last addresses."
    closed = ["0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.127.255.255", "127.0.0.1", "127.255.255.255", "169.254.0.0", "169.254.169.254", "172.16.0.0",
              "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.0.0", "192.168.255.255", "198.18.0.0", "198.19.255.255", "198.51.100.1", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1",
              "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:a00:1::1", "fc00::1", "fdff::1",
              "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1"]
    opened = ["1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.1", "172.15.255.255", "172.32.0.0", "192.167.255.255", "223.255.255.255", "2606:4700::1111",
              "2a00:1450::1", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]
    assert [a for a in closed if is_public(a)] == [] and [a for a in opened if not is_public(a)] == []


def names(monkeypatch, **table):
    "A name server of our own: each look-up of a name takes the next answer; numbers stand for themselves."
    real, asked = socket.getaddrinfo, []
    def answer(host, port, *args, **more):
        if host not in table: return real(host, port, *args, **more)
        asked.append(host)
        found = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]
    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def test_redirects_do_not_lead_inwards(server):
    assert got(server.url(f"to/{server.url('png')}")) == PNG and got(server.url("to//png")) == PNG  # a redirect as such is fine
    hidden = ("127.0.0.2", "2130706434", "0x7f.2", "[::1]", "[::ffff:127.0.0.2]", "0.0.0.0", "10.0.0.1", "169.254.169.254")
    for host in hidden: assert got(server.url(f"to/{server.url('secret', host)}")) == "address refused", host
    assert got(server.url(f"to///{OTHER}:{server.server_port}/secret")) == "address refused" and server.asked["/secret"] == 0
    for url in ("file:///etc/passwd", "ftp://1.1.1.1/x", "gopher://1.1.1.1", "data:image/png;base64,AAAA", "javascript:1"): assert got(server.url(f"to/{url}")) == "not http or https"
    assert got(server.url("round")) == "too many redirects"
    assert got(server.url("png", OTHER)) == "address refused" and got(server.url("png"), Limits()) == "address refused"


def test_a_name_is_looked_up_once_and_its_name_stays(server, monkeypatch):
    "DNS rebinding: what was checked is what is connected to."
    asked = names(monkeypatch, **{"rebind.test": [[HERE], [OTHER]], "mixed.test": [[HERE, OTHER]], "moved.test": [[HERE]]})
    assert got(server.url("png", "rebind.test")) == PNG and asked == ["rebind.test"]
    assert server.hosts[-1] == f"rebind.test:{server.server_port}"
    assert got(server.url("png", "rebind.test")) == "address refused"  # the next connection is checked again
    assert got(server.url("png", "mixed.test")) == "address refused"  # one bad address spoils the name
    assert got(server.url("to/" + server.url("png", "mixed.test"), "moved.test")) == "address refused"


def test_a_dead_address_is_passed_over(monkeypatch):
    "A name with two addresses, the first of which does not answer."
    with Server((HERE, 0)) as one:
        names(monkeypatch, **{"two.test": [[OTHER, HERE]]})
        assert got(one.url("png", "two.test"), replace(LIMITS, allow=(HERE, OTHER), tries=1)) == PNG
        one.shutdown()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_tls_knows_the_name(tmp_path, monkeypatch):
    "Connected to a checked address, but SNI and certificate are the name's."
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=pictures.test",
                    "-addext", "subjectAltName=DNS:pictures.test"], cwd=tmp_path, check=True, capture_output=True)
    context, told = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(tmp_path/"cert.pem", tmp_path/"key.pem")
    context.sni_callback = lambda sock, name, ctx: told.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path/"cert.pem"))
    names(monkeypatch, **{"pictures.test": [[HERE]], "others.test": [[HERE]]})
    with Server() as safe:
        safe.socket = context.wrap_socket(safe.socket, server_side=True)
        assert got(f"https://pictures.test:{safe.server_port}/png") == PNG and told == ["pictures.test"]
        assert got(f"https://others.test:{safe.server_port}/png", replace(LIMITS, tries=1)) == "connection broken"  # the certificate is not theirs
        safe.shutdown()


ODD = ["http://", "http:///x", "http://a:99999/", "http://\x00/", "http://%00/", "http://..", "http://" + "a" * 300, "//x", "https://[::1", "http://1.1.1.1:0/", "http://é.example/ü?ö#ß"]

@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"https?://[^/]{0,20}(:[0-9]{1,6})?/.*"), st.sampled_from(ODD)))
def test_no_url_breaks_it(nowhere, url):
    with pytest.MonkeyPatch.context() as patch:  # nothing is looked up, nothing is connected to
        patch.setattr(socket, "getaddrinfo", lambda host, port, *a, f=socket.getaddrinfo, **k: f(host, port, flags=socket.AI_NUMERICHOST, type=socket.SOCK_STREAM))
        patch.setattr(socket.socket, "connect", lambda *_: (_ for _ in ()).throw(OSError("no network here")))
        assert isinstance(fate(nowhere, url), str)

@pytest.fixture(scope="module")
def nowhere():
    with Net(replace(LIMITS, tries=1)) as net: yield net


def table(server, *paths): return pd.DataFrame({"media_key": [f"3_{i}" for i in range(len(paths))], "url": [server.url(p) for p in paths]})


def test_resume(server, tmp_path):
    "What is there is not asked for; what failed is asked for again; each picture counts once, whatever the order."
    posts = table(server, "png/a", "jpeg/b", "gone/c", "busy/resume", "png/d")
    posts = pd.concat([posts, posts.head(2)])  # a tweet that shows the same pictures
    first = collect_media(posts, tmp_path/"m", download=True, limits=replace(LIMITS, tries=2))
    assert sorted(p.name for p in (tmp_path/"m").iterdir()) == ["3_0.png", "3_1.jpg", "3_4.png"] and first.fetched == 3
    assert {k: e.why for k, e in first.left_out.items()} == {"3_2": "HTTP 404", "3_3": "HTTP 503"}
    second = collect_media(posts, tmp_path/"m", download=True, limits=LIMITS)
    assert [server.asked[p] for p in ("/png/a", "/jpeg/b", "/png/d", "/gone/c")] == [1, 1, 1, 2]
    assert second.fetched == 1 and second.files.keys() == {"3_0", "3_1", "3_3", "3_4"} and second.read("3_1") == JPEG and second.read("3_2") is None
    summary = second.summary().pictures
    assert dict(summary) == {"there before": 3, "fetched": 1, "left out: HTTP 404": 1} and summary.sum() == posts.media_key.nunique()
    posts.to_parquet(tmp_path/"posts.parquet")
    assert collect_media(tmp_path/"posts.parquet", tmp_path/"m").files == second.files
    small = replace(LIMITS, size=len(PNG) - 1)
    assert "too large" in {e.why for e in collect_media(posts, tmp_path/"m", download=True, limits=small).left_out.values()}


def test_a_number_at_a_time(server, tmp_path):
    "What fails doesn't count, so a run of dead links does not stop the next calls."
    posts, few = table(server, "gone/1", "gone/2", "png/n1", "png/n2", "png/n3"), replace(LIMITS, number=1, at_once=1)
    for n in (1, 2, 3): assert collect_media(posts, tmp_path, download=True, limits=few).files.keys() == {f"3_{i}" for i in range(2, 2 + n)}


def test_keys_are_not_believed(server, tmp_path):
    posts = pd.DataFrame({"media_key": ["../evil", "a/b", ".hidden", "", "ok", None, "x" * 200], "url": server.url("png")})
    found = collect_media(posts, tmp_path/"m", download=True, limits=LIMITS)
    assert found.files.keys() == {"ok"} and {e.why for e in found.left_out.values()} == {"a key that is no file name"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["m", "ok.png"]


def test_a_folder(tmp_path):
    (tmp_path/"secret.png").write_bytes(PNG)
    folder = tmp_path/"m"
    folder.mkdir()
    for name, data in {"a.png": PNG, "b.jpg": PNG, "c.png": PNG[:500], "d.png": b"<html>", "e.png": PNG * 99, ".f.x.tmp": PNG}.items(): (folder/name).write_bytes(data)
    (folder/"g.png").symlink_to(tmp_path/"secret.png")
    posts = pd.DataFrame({"media_key": list("abcdefgh")})
    found = collect_media(posts, folder, limits=replace(LIMITS, size=len(PNG)))
    assert list(found.files) == ["a", "b", "e"]  # the limit of size is a download's: your own files may be large
    assert {k: e.why for k, e in found.left_out.items()} == {"c": "cannot be unpacked", "d": "not a JPEG, PNG, GIF or WebP", "f": "no file", "g": "outside the folder", "h": "no file"}
    assert "c" in collect_media(posts, folder, limits=LIMITS, unpack=False).files  # faster: only the first bytes
    rows = pd.DataFrame({"asset_id": [1, 2, 3, 4], "file": ["m/a.png", "../../etc/passwd", "/etc/passwd", None]})
    named = collect_media(rows, tmp_path, key="asset_id", file="file")
    assert list(named.files) == ["1"] and [e.why for e in named.left_out.values()] == ["outside the folder", "outside the folder", "no file"]


def test_a_name_that_no_file_can_have_is_left_out(tmp_path):
    (tmp_path/"a.png").write_bytes(PNG)
    (tmp_path/"loop.png").symlink_to("loop.png")
    rows = pd.DataFrame({"id": list("abcdef"), "file": ["a.png", "x" * 300 + ".png", "a\0b.png", "\ud800.png", "loop.png", "a.png/b.png"]}, dtype=object)
    found = collect_media(rows, tmp_path, key="id", file="file")
    assert list(found.files) == ["a"] and {e.why for e in found.left_out.values()} <= {"cannot be opened", "no file"} and found.summary().pictures.sum() == 6


def test_litter_of_a_killed_download(tmp_path):
    old, young = tmp_path/f".a.{'0' * 16}.tmp.png", tmp_path/f".b.{'0' * 16}.tmp.png"
    theirs = [tmp_path/n for n in (".tags.tmpl", ".a.1.tmp.png", f".a.{'0' * 16}.tmp.txt")]
    (folder := tmp_path/f".c.{'0' * 16}.tmp.png").mkdir()
    for p in (old, young, *theirs): p.write_bytes(PNG[:9])
    for p in (old, folder, *theirs): os.utime(p, (0, 0))
    posts = pd.DataFrame({"media_key": ["a"], "url": None})
    collect_media(posts, tmp_path)
    assert old.exists()  # a folder that is only read stays as it is
    collect_media(posts, tmp_path, download=True)
    assert set(tmp_path.iterdir()) == {young, folder, *theirs}  # the young one may still be written


def test_bad_calls(tmp_path):
    with pytest.raises(BoigError, match="no folder"): collect_media(pd.DataFrame({"media_key": ["a"]}), tmp_path/"nowhere")
    with pytest.raises(BoigError, match="lacks the columns url"): collect_media(pd.DataFrame({"media_key": ["a"]}), tmp_path, download=True)
    with pytest.raises(BoigError, match="not both"): collect_media(pd.DataFrame({"media_key": ["a"]}), tmp_path, download=True, file="file")
