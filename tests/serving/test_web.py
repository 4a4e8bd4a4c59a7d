"""`vilu web` as its own process before the real server: by HTTP, and in headless Chromium as a person uses it."""

import asyncio
import http.client
import json
import os
import urllib.error
import urllib.request

import pytest

from tests.serving.browser import Browser, find_chromium, web
from vilu.serving import Access, AsyncClient, Server
from vilu.serving.classes import put_set

pytest.importorskip("starlette", reason="no starlette: pip install 'vilu[web]'")
pytest.importorskip("uvicorn", reason="no uvicorn: pip install 'vilu[web]'")
pytestmark = pytest.mark.server
PROBABILITY = 1e-4  # what parity allows in float32
LIMIT = 200_000
OCTETS = {"Content-Type": "application/octet-stream"}
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """The page's URL; what it wrote into its folders is nothing."""
    folder = tmp_path_factory.mktemp("web")
    environment = {**os.environ, "TMPDIR": str(folder)}
    options = ["--max-image-bytes", str(LIMIT), "--allow-host", "vilu.example"]
    with web(server.grpc_url, *options, cwd=folder, env=environment) as (process, url):
        yield url
        assert process.poll() is None
    assert process.returncode in (0, 130)  # 130: of an interrupt, where the launcher did not have it ignored
    assert list(folder.iterdir()) == []


def post(url, body, headers=OCTETS):
    """(status, told) of a question."""
    request = urllib.request.Request(f"{url}api/ask", body, {**headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def question(image, **asked):
    return json.dumps(asked).encode() + b"\n" + image


def test_the_page_gets_the_eager_models_answers(page, photos, eager):
    for photo in photos[:6]:
        status, told = post(page, question(photo))
        label, confidence, failure = eager(photo)
        assert (status, told["label"]) == (200, label)
        assert told["confidence"] == pytest.approx(confidence, abs=PROBABILITY)
        assert told["failure_probability"] == pytest.approx(failure, abs=PROBABILITY)
        assert told["accept"] == (told["failure_probability"] < 0.505)


def test_details_come_with_every_answer(page, photos, checkpoint):
    status, told = post(page, question(photos[0], class_set="default"))
    assert (status, told["class_set"]) == (200, "default@1")
    for pairs, first in ((told["top"], told["label"]), (told["concepts"], None)):
        names, weights = zip(*pairs, strict=True)
        assert len(names) == 5
        assert set(names) <= set(checkpoint.class_set.names)
        assert list(weights) == sorted(weights, reverse=True)
        assert sum(weights) <= 1 + PROBABILITY
        assert first in (None, names[0])
    assert told["top"][0][1] == pytest.approx(told["confidence"], abs=PROBABILITY)
    status, told = post(page, question(photos[0], class_set="absent"))
    assert (status, list(told)) == (400, ["error"])
    assert "absent" in told["error"]


def test_own_labels_are_the_only_candidates(page, photos):
    labels = ["ein Löffel", "<b>handwritten</b> two"]
    status, told = post(page, question(photos[0], labels=labels))
    assert status == 200
    assert told["label"] in labels


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "labels must be"),
        (b"[]\nx", 400, "labels must be"),
        (b"[" * 100_000 + b"\nx", 400, "labels must be"),
        (b'{"labels": []}\nx', 400, "labels must be"),
        (b'{"labels": "cat"}\nx', 400, "labels must be"),
        (b'{"labels": [1]}\nx', 400, "labels must be"),
        (b'{"labels": ["\\ud800"]}\nx', 400, "labels must be"),
        (b'{"class_set": 3}\nx', 400, "labels must be"),
        (b"{}\n", 400, "empty (0 bytes)"),
        (b"{}\ngarbage", 400, "not a JPEG, PNG or WEBP image"),
        (b'{"labels": ["a", "a"]}\n{png}', 400, "label 2 ('a') repeats label 1"),
        (b"{}\n" + bytes(LIMIT), 400, "not a JPEG"),
        (b"{}\n" + bytes(LIMIT + 1), 413, f"the limit is {LIMIT} bytes"),
    ],
    ids=range(13),
)
def test_a_bad_question_is_told_in_one_line(page, photos, body, status, text):
    found, told = post(page, body.replace(b"{png}", photos[1]))
    assert (found, list(told)) == (status, ["error"])
    assert text in told["error"]
    assert "\n" not in told["error"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Host": "evil.example"}, 421),
        ("/", {"Host": ""}, 421),
        ("/", {"Host": "127.0.0.1.evil.example:80"}, 421),
        ("/", {"Host": "vilu.example"}, 200),
        ("/", {"Host": "LOCALHOST:9"}, 200),
        ("/", {"Host": "[::1]:9"}, 200),
        ("/api/ask", {**OCTETS, "Origin": "http://evil.example"}, 403),
        ("/api/ask", {**OCTETS, "Origin": "null"}, 403),
        ("/api/ask", {"Content-Type": "text/plain"}, 415),
        ("/api/served", {"Origin": "http://evil.example"}, 403),
        ("/examples/999", {}, 404),
        ("/examples/-1", {}, 404),
        ("/../pyproject.toml", {}, 404),
    ],
)
def test_foreign_pages_names_and_paths_are_refused(page, photos, path, headers, status):
    link = http.client.HTTPConnection(page.split("/")[2], timeout=30)
    method, body = ("POST", question(photos[0])) if path == "/api/ask" else ("GET", None)
    link.request(method, path, body, headers)
    reply = link.getresponse()
    assert reply.status == status
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in reply.headers
    link.close()


def test_an_upload_is_cut_off_where_the_limit_is(page):
    """Declared too long: refused before a byte of it has come. Not declared: at the first byte too many."""
    link = http.client.HTTPConnection(page.split("/")[2], timeout=30)
    link.putrequest("POST", "/api/ask")
    for name, value in {**OCTETS, "Content-Length": "100000000000"}.items():
        link.putheader(name, value)
    link.endheaders()
    assert link.getresponse().status == 413
    link = http.client.HTTPConnection(page.split("/")[2], timeout=30)
    link.putrequest("POST", "/api/ask")
    for name, value in {**OCTETS, "Transfer-Encoding": "chunked"}.items():
        link.putheader(name, value)
    link.endheaders()
    data = b"{}\n" + bytes(LIMIT + 1)
    link.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")  # and no last chunk: the client means to go on
    assert link.getresponse().status == 413


def test_without_a_server_the_page_stands_and_says_so(photos):
    with web("127.0.0.1:9", "--timeout", "5") as (process, url):
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert b"<title>vilu" in reply.read()
        status, told = post(url, question(photos[0]))
        assert (status, list(told)) == (503, ["error"])
        assert "127.0.0.1:9" in told["error"]
        assert process.poll() is None


@pytest.fixture
def browser(page):
    with Browser(find_chromium()) as found:
        found.go(page)
        found.wait("served !== null")
        yield found
        assert found.complaints == []
        assert all(url.startswith((page, "blob:", "data:")) for url in found.requests)


@pytest.fixture
def files(photos, tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        path.write_bytes(photo)
    return paths


def percent(value):
    return f"{100 * value:.1f} %"


@needs_chromium
def test_a_person_chooses_an_image_and_moves_the_threshold(browser, files, photos, eager):
    for path, photo in list(zip(files, photos, strict=True))[:3]:
        browser.run("answer = null")
        browser.choose_file("#file", path)
        browser.wait("answer !== null")
        label, _, failure = eager(photo)
        assert browser.text("#label") == label
        told = float(browser.text("#risk").removesuffix(" %")) / 100
        assert told == pytest.approx(failure, abs=PROBABILITY + 0.0005)
        assert browser.text("#badge") == ("✓ Accept" if failure < 0.505 else "✕ Reject")
        assert float(browser.run("document.querySelector('#fill').style.width.slice(0, -1)")) == pytest.approx(
            100 * failure, abs=0.01
        )
    failure = browser.run("answer.failure_probability")
    for threshold, badge in ((failure + 0.01, "✓ Accept"), (failure - 0.01, "✕ Reject")):
        browser.run(f"threshold.value = {threshold}; threshold.dispatchEvent(new Event('input'))")
        assert browser.text("#badge") == badge
        assert browser.text("#threshold-value") == percent(threshold)
    requests = len(browser.requests)
    browser.run("document.querySelector('#threshold').focus()")
    browser.press("End")
    assert browser.text("#badge") == "✓ Accept"
    browser.press("Home")
    assert browser.text("#badge") == "✕ Reject"
    assert "rejected" in browser.text("#verdict")
    assert len(browser.requests) == requests, "the slider asks nobody"


@needs_chromium
def test_labels_with_markup_stay_text(browser, files):
    browser.choose_file("#file", files[1])
    browser.wait("answer !== null")
    evil = ["<img src=x onerror=alert(1)>", "<script>fail('run')</script>"]
    browser.run("answer = null; document.querySelector('#labels').focus()")
    browser.call("Input.insertText", text="\n".join(evil))
    assert browser.run("own.checked")
    browser.run("document.querySelector('#ask').click()")
    browser.wait("answer !== null")
    assert browser.text("#label") in evil
    assert browser.run("result.querySelectorAll('img, script').length") == 0
    assert browser.run("error.hidden")


@needs_chromium
def test_a_class_set_of_the_server_is_chosen(repository, files, tmp_path, monkeypatch):
    monkeypatch.setenv("VILU_CLASS_SETS", str(tmp_path / "sets"))
    token, names = "control-token-control-token", ["a drawing", "a photograph"]

    async def put(url):
        async with AsyncClient(url) as client:
            await put_set(client, "two", names, control_token=token, threshold=0.25)

    with Server(repository, log=tmp_path / "log", access=Access(control_token=token)) as server:
        asyncio.run(put(server.grpc_url))
        with web(server.grpc_url) as (_, url), Browser(find_chromium()) as browser:
            browser.go(url)
            options = "[...document.querySelectorAll('#class-set option')].map((one) => one.textContent)"
            browser.wait("served !== null")
            assert browser.run(options) == ["default (10 classes)", "two (2 classes)"]
            browser.choose_file("#file", files[0])
            browser.wait("answer !== null")
            assert browser.text("#threshold-value") == "50.5 %"
            browser.run("answer = null; document.querySelector('#class-set').focus()")
            browser.press("ArrowDown")
            browser.wait("answer !== null")
            assert browser.text("#label") in names
            assert browser.text("#threshold-value") == "25.0 %"
            assert "two@1" in browser.text("#facts")
            shown = browser.run("[...document.querySelectorAll('#top li')].map((one) => one.textContent)")
            assert len(shown) == 2
            assert browser.complaints == []


@needs_chromium
def test_errors_are_one_line_in_the_page(browser, tmp_path, files):
    for name, data, text in (
        ("cut.jpg", files[0].read_bytes()[:300], "image cannot be decoded"),
        ("text.png", b"no image", "not a JPEG, PNG or WEBP image"),
        ("large.png", bytes(LIMIT + 1), "200,001 bytes, the limit is 200,000"),
    ):
        (tmp_path / name).write_bytes(data)
        browser.run("error.hidden = true")
        browser.choose_file("#file", tmp_path / name)
        browser.wait("!error.hidden && !asking")
        assert text in browser.text("#error")
        assert browser.run("result.hidden")
    browser.run("own.checked = true; document.querySelector('#ask').click()")
    assert "at least two labels" in browser.text("#error")
    browser.run("document.querySelector('#served').checked = true")
    browser.choose_file("#file", files[0])
    browser.wait("answer !== null")
    assert browser.run("error.hidden")
    # The browser's own words about each refused request are no complaint of the page.
    browser.complaints = [told for told in browser.complaints if "status of 400" not in told]


@needs_chromium
def test_all_is_reached_by_keyboard_and_has_a_name(browser):
    for _ in range(40):
        browser.press("Tab")
        if browser.run("document.activeElement.closest('#examples') !== null"):
            break
    name = browser.run("document.activeElement.title")
    browser.press("Enter")
    browser.wait("answer !== null")
    assert name == browser.run("document.activeElement.title")
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    reached = set()
    for _ in range(40):
        browser.press("Tab")
        reached.add(browser.run("document.activeElement.id"))
    assert reached >= {"file", "served", "labels", "ask", "threshold"}
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "textbox", "slider", "radio", "combobox", "image", "meter", "region", "Button"}
    named = {n["role"]["value"]: n["name"]["value"] for n in nodes if n.get("role", {}).get("value") in kinds}
    unnamed = [
        n["role"]["value"] for n in nodes if n.get("role", {}).get("value") in kinds and not n["name"]["value"].strip()
    ]
    assert not unnamed
    assert {"button", "textbox", "slider", "radio", "meter"} <= set(named)


@needs_chromium
def test_no_server_is_told_in_the_page(files):
    with web("127.0.0.1:9", "--timeout", "5") as (_, url), Browser(find_chromium()) as browser:
        browser.go(url)
        browser.choose_file("#file", files[0])
        browser.wait("!error.hidden && !asking")
        assert "127.0.0.1:9" in browser.text("#error")
        assert browser.run("result.hidden")


@needs_chromium
def test_what_the_page_offers_is_of_the_served_classes(browser, checkpoint):
    names = set(checkpoint.class_set.names)
    titles = browser.run("[...document.querySelectorAll('#examples button')].map((one) => one.title)")
    assert titles
    assert set(titles) <= names, "the embedded shapes are no class of this server"
    assert set(browser.run("document.querySelector('#labels').placeholder").split("\n")) <= names


@needs_chromium
def test_repeated_labels_are_refused_as_elsewhere(browser, files):
    browser.run("served.class_sets.length")
    browser.choose_file("#file", files[0])
    browser.wait("answer !== null")
    browser.run("document.querySelector('#labels').value = 'a star\\na star\\na cross'; own.checked = true; ask()")
    browser.wait("!error.hidden && !asking")
    assert "repeats label 1" in browser.text("#error")
    browser.complaints = [told for told in browser.complaints if "status of 400" not in told]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_page_holds_long_and_hostile_labels(page, files, dark):
    evil = [
        "Donaudampfschifffahrtsgesellschaft" * 5,
        "<svg onload=alert(1)>" * 8,
        "\u202eright to left \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "a\u0300" * 60,
        "'\"`${alert(1)}&lt;",
    ]
    with Browser(find_chromium(), 390, 844, dark) as browser:
        browser.go(page)
        browser.wait("served !== null")
        browser.choose_file("#file", files[1])
        browser.wait("answer !== null")
        browser.run("answer = null; own.checked = true")
        browser.run(f"document.querySelector('#labels').value = {json.dumps(evil)}.join('\\n')")
        browser.run("document.querySelector('#ask').click()")
        browser.wait("answer !== null")
        assert browser.text("#label") in evil
        assert browser.run("document.querySelector('#label').title") == browser.text("#label")
        assert browser.run("[...document.querySelectorAll('#top span')].map((one) => one.title).sort()") == sorted(evil)
        assert browser.run("result.querySelectorAll('svg, script, img').length") == 0
        browser.run("document.querySelector('#words').open = true")
        assert "Doctor score:" in browser.text("#words")
        assert browser.run("document.documentElement.scrollWidth") <= 390, "nothing is wider than the screen"
        texts = "[...document.querySelectorAll('#label, #top span, #doubt-title')]"
        assert browser.run(f"Math.max(...{texts}.map((one) => one.clientHeight))") < 90, "long labels are cut"
        small = "[...document.querySelectorAll('button, select, summary')].filter((one) => one.offsetParent)"
        assert browser.run(f"Math.min(...{small}.map((one) => one.getBoundingClientRect().height))") >= 20
        assert browser.complaints == []


@needs_chromium
def test_a_large_upload_is_an_error_that_says_so(page, tmp_path):
    with Browser(find_chromium()) as browser:
        browser.go(page)
        browser.wait("served !== null")
        (tmp_path / "large.png").write_bytes(bytes(30_000_000))
        browser.choose_file("#file", tmp_path / "large.png")
        assert "30,000,000 bytes, the limit is 200,000" in browser.text("#error")
        browser.run("served.max_bytes = 1e9")  # as if the page did not know the limit
        browser.run("error.hidden = true")
        browser.choose_file("#file", tmp_path / "large.png")
        browser.wait("!error.hidden && !asking")
        said = browser.text("#error")
        assert "this image is too large" in said or "does not take an image of 30,000,000 bytes" in said
        assert browser.run("result.hidden")
        browser.run("served.max_bytes = 200000; document.querySelector('#examples button').click()")
        browser.wait("answer !== null")
        assert browser.run("error.hidden"), "the page goes on"
