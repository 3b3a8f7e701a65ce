"""A server reaches itself though the environment names a proxy."""

from __future__ import annotations

from urllib.request import getproxies_environment, proxy_bypass_environment

import pytest

from lorelei.inference.server.process import no_proxy


@pytest.mark.parametrize(
    "given",
    [{}, {"no_proxy": ""}, {"no_proxy": "a.org"}, {"NO_PROXY": "a.org"}, {"NO_PROXY": "a.org,b"}],
)
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000"])
def test_loopback_is_never_behind_a_proxy(monkeypatch, given, host):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://proxy:1", **given, **no_proxy(given)}.items():
        monkeypatch.setenv(name, value)
    proxies = getproxies_environment()
    assert proxy_bypass_environment(host, proxies)
    assert not proxy_bypass_environment("c.org", proxies)
    if "a.org" in given.values():
        assert proxy_bypass_environment("a.org", proxies)
