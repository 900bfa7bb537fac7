"""Plain GETs whose bodies are large: little work per byte, connections kept open between ranges.

The Hub's own client spends five times the processor time per byte, all of it holding the interpreter.
"""

from __future__ import annotations

import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import urllib3


class Connections:
    """Connections to any number of hosts, straight or through the proxies of the environment."""

    def __init__(self, per_host: int, timeout_s: float) -> None:
        self._per_host = per_host
        self._timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        self._pools: dict[tuple[str, str], urllib3.PoolManager] = {}
        self._lock = threading.Lock()

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
        proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
        if proxy and urllib.request.proxy_bypass(parts.hostname or ""):
            proxy = ""
        with self._lock:
            if (parts.scheme, proxy) not in self._pools:
                self._pools[parts.scheme, proxy] = self._make_pool(parts.scheme, proxy)
            return self._pools[parts.scheme, proxy]

    def _make_pool(self, scheme: str, proxy: str) -> urllib3.PoolManager:
        # The certificates that the system trusts, or SSL_CERT_FILE's: as the Hub's client has it. It takes a
        # while to read them.
        encrypted = "https" in (scheme, urlsplit(proxy).scheme)
        context = ssl.create_default_context() if encrypted else None
        if not proxy:
            return urllib3.PoolManager(maxsize=self._per_host, ssl_context=context)
        user = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login = None
        if user.username is not None:
            login = urllib3.make_headers(
                proxy_basic_auth=f"{unquote(user.username)}:{unquote(user.password or '')}"
            )
        return urllib3.ProxyManager(
            user.geturl(), maxsize=self._per_host, ssl_context=context, proxy_headers=login
        )
