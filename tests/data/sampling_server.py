"""A server that answers as vLLM or SGLang do, with a sampler of the test's behind it, and faults on demand."""

import json
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Sampler = Callable[[list[int], dict[str, Any]], list[int]]


class SamplingServer(ThreadingHTTPServer):
    """Attributes: `requests`, what was asked; `faults`, what happens to the next requests instead of an answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, sampler: Sampler, engine: str = "vllm", models: Sequence[dict] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sampler, self.engine = sampler, engine
        self.models = models or [{"id": "tiny", "owned_by": engine, "parent": None, "max_model_len": 256}]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: deque[Any] = deque()
        self.changes: dict[str, Any] = {}  # what of an answer is replaced
        self.delay = 0.0
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(sampler: Sampler, engine: str = "vllm", **options: Any):
    server = SamplingServer(sampler, engine, **options)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SamplingServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.popleft() if self.server.faults else None
            if fault is None:
                answer = self._vllm(request) if self.path == "/v1/completions" else self._sglang(request)
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault is not None:
            self._answer(fault, {"error": {"message": f"fault {fault}"}})
        else:
            self._answer(200, answer)

    def _vllm(self, request: dict[str, Any]) -> dict[str, Any]:
        ids = self.server.sampler(request["prompt"], request)
        stopped = ids[-1] in request["stop_token_ids"]
        choice = {"index": 0, "text": "", "finish_reason": "stop" if stopped else "length", "stop_reason": None}
        if request.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": request["prompt"]}
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": len(ids)}
        return {"object": "text_completion", "choices": [choice | self.server.changes], "usage": usage}

    def _sglang(self, request: dict[str, Any]) -> dict[str, Any]:
        sampling = request["sampling_params"]
        ids = self.server.sampler(request["input_ids"], sampling | {"max_tokens": sampling["max_new_tokens"]})
        stopped = ids[-1] in sampling["stop_token_ids"]
        end = {"type": "stop", "matched": ids[-1]} if stopped else {"type": "length", "length": len(ids)}
        meta = {"finish_reason": end, "prompt_tokens": len(request["input_ids"]), "completion_tokens": len(ids)}
        return {"text": "", "output_ids": ids, "meta_info": meta} | self.server.changes

    def _answer(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
