"""Logs: one line of JSON for each request, in Ray Serve's own log files, beside what Ray and the service log there.

A line tells who asked for what, how it went and how long it took. It never holds a text, a picture, an answer or a key.
"""

import logging
from dataclasses import replace

from ray.serve.context import _get_serve_request_context, _serve_request_context

from serving.guard import Exchange

RAY = "ray.serve"
access = logging.getLogger(f"{RAY}.seqmodels")


def join_ray() -> None:
    """In a replica: what our modules log goes where Ray's own lines go, in the same form."""
    ours = logging.getLogger("serving")
    ours.handlers = logging.getLogger(RAY).handlers  # the list itself, which Ray changes when it is configured again
    ours.propagate = False
    access.setLevel(logging.INFO)


def name_request(exchange: Exchange) -> None:
    """Ray puts the id of a request into every line, as the client wrote it, whatever that is: here, as we know it."""
    context = replace(_get_serve_request_context(), request_id=exchange.request_id)
    _serve_request_context.set(context)


def log_request(exchange: Exchange) -> None:
    fields = {
        "request_id": exchange.request_id,
        "client": exchange.key.name,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "code": exchange.code,
        "model": exchange.model,
        "revision": exchange.revision,
        **exchange.usage,
        "first_byte_s": exchange.first_byte_s,
        "seconds": exchange.seconds,
    }
    access.info("request", extra={"log_to_stderr": False, "exchange": fields})
