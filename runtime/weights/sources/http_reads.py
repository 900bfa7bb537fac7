"""Plain GETs whose bodies are large: little work per byte, connections kept open between ranges.

The Hub's own client spends five times the processor time per byte, all of it holding the interpreter.
"""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import urllib3


class Connections:
    """Connections to any number of hosts, straight or through the proxies of the environment."""

    def __init__(self, per_host: int, timeout_s: float) -> None:
        self._per_host = per_host
        # The certificates that the system trusts, or SSL_CERT_FILE's: as the Hub's client has it.
        self._ssl_context = ssl.create_default_context()
        self._timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        self._direct = urllib3.PoolManager(maxsize=per_host, ssl_context=self._ssl_context)
        self._proxied: dict[str, urllib3.PoolManager] = {}

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """One answer, redirects included as they are. Raises urllib3's HTTPError and OSError."""
        response = self._pool(url).request(
            "GET",
            url,
            headers=dict(headers),
            preload_content=False,
            decode_content=False,
            redirect=False,
            retries=False,
            timeout=self._timeout,
        )
        try:
            yield response
        finally:
            # A body that was read to its end has given its connection back already.
            response.close()

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
            return self._direct
        if proxy not in self._proxied:
            self._proxied[proxy] = self._through(proxy if "://" in proxy else f"http://{proxy}")
        return self._proxied[proxy]

    def _through(self, proxy: str) -> urllib3.ProxyManager:
        user = urlsplit(proxy)
        login = None
        if user.username is not None:
            login = urllib3.make_headers(
                proxy_basic_auth=f"{unquote(user.username)}:{unquote(user.password or '')}"
            )
        return urllib3.ProxyManager(
            proxy, maxsize=self._per_host, ssl_context=self._ssl_context, proxy_headers=login
        )
