"""The page's files over HTTP: types, caching, and a content security policy that leaves no way out."""

import re
from pathlib import Path

import pytest
from chat_client import client_of

from glm5.serve import page

FILES = sorted(path.name for path in Path(page.__file__).parent.iterdir() if path.suffix in (".css", ".js", ".svg"))
TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client():
    return client_of("ok")


def test_every_file_has_its_type_and_strict_headers(client):
    assert {"app.js", "style.css", "icon.svg"} <= set(FILES)
    for path in ["/", *(f"/page/{name}" for name in FILES)]:
        response = client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == TYPES.get(path.rsplit(".")[-1], "text/html; charset=utf-8")
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert client.head(path).headers["etag"] == response.headers["etag"]


def test_a_kept_file_is_not_sent_twice(client):
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_page_links_to_files_that_exist_and_to_nothing_outside(client):
    html = client.get("/").text
    named = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', html))
    assert named and all(client.get(f"/{name}").status_code == 200 for name in named)
    for name in FILES:
        text = client.get(f"/page/{name}").text
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in FILES, (name, imported)
        for address in re.findall(r"https?://[\w./]+", text):
            assert address == "http://www.w3.org/2000/svg", (name, address)
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert way not in text, (name, way)


def test_other_paths_are_not_files(client):
    for path in ("/page/", "/page/routes.py", "/page/../app.py", "/page/%2e%2e/app.py", "/index.html"):
        assert client.get(path).status_code == 404, path
