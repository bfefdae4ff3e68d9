"""The judge against a real HTTP server on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from slothrl_rewards import judge_client
from slothrl_rewards.judge import llm_judge


class Judge(ThreadingHTTPServer):
    """Answers with `script`, one entry a request: a status, or a text; the last entry stays."""

    daemon_threads = True

    def __init__(self):
        self.script, self.seen, self.wait = ["Score: 7"], [], 0.0
        self.together = threading.Barrier(1)  # how many requests wait for each other
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address):
        pass  # a client that gave up

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        script = self.server.script
        step = script.pop(0) if len(script) > 1 else script[0]
        time.sleep(self.server.wait)
        self.server.together.wait()
        if isinstance(step, int):
            self.send_response(step)
            if 300 <= step < 400:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            return
        reply = step if isinstance(step, bytes) else json.dumps({"choices": [{"message": {"content": step}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge_client, "_memory", type(judge_client._memory)())
    server = Judge()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judged(server, completions=("good",), **options):
    options = {"model": "m", "backoff": 0.01, "timeout": 5.0, **options}
    prompts = ["What?"] * len(completions)
    return llm_judge(prompts=prompts, completions=list(completions), base_url=server.url, **options)


def test_success(server):
    assert judged(server) == [0.7]
    path, key, body = server.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", None, "m", 0.0)
    text = body["messages"][0]["content"]
    assert "What?" in text and "good" in text


def test_retry_after_errors_and_broken_replies(server):
    server.script = [500, 429, b"not json", "Thinking. Score: 2\nScore: 10"]
    metrics = {}
    assert judged(server, log_metric=metrics.__setitem__) == [1.0]
    assert metrics == {"llm_judge/failed": 0.0, "llm_judge/requests": 4.0}


def test_failures_are_none_and_not_remembered(server):
    server.script = [503]
    assert judged(server, retries=1) == [None]
    assert len(server.seen) == 2
    server.script = [400]
    assert judged(server) == [None]
    assert len(server.seen) == 3  # not tried again: the request itself is wrong
    server.script = [302]
    assert judged(server) == [None]
    assert len(server.seen) == 4  # nobody is redirected
    server.script = ["Score: 5"]
    assert judged(server) == [0.5]


def test_timeout(server):
    server.wait = 3.0
    start = time.monotonic()
    assert judged(server, timeout=0.2, retries=1) == [None]
    assert time.monotonic() - start < 2.0


def test_nobody_there():
    start = time.monotonic()
    scores = llm_judge(
        prompts=["?"], completions=["a"], base_url="http://127.0.0.1:9/v1", model="m", retries=2, backoff=0.01
    )
    assert scores == [None] and time.monotonic() - start < 3.0


def test_cache(server):
    assert judged(server, ["a", "b", "a"]) == [0.7, 0.7, 0.7]
    assert len(server.seen) == 2
    assert judged(server, ["b", "c"]) == [0.7, 0.7]
    assert len(server.seen) == 3
    assert judged(server, ["a"], temperature=0.5) == [0.7]
    assert len(server.seen) == 4


def test_requests_go_out_together(server):
    server.together = threading.Barrier(8, timeout=20)  # one after the other would break it
    assert judged(server, [str(n) for n in range(8)], concurrency=8) == [0.7] * 8


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 11", None), ("Score: -1", None), ("fine", None), ("**Score:** 0", 0.0), ("score: 2.5", 0.25)],
)
def test_reading_a_score(server, reply, score):
    server.script = [reply]
    assert judged(server) == [score]


def test_template_columns_and_scale(server):
    server.script = ["grade=3"]
    options = {
        "template": "{prompt}|{completion}|{answer}|{other}",
        "score_regex": r"grade=(\d)",
        "lowest": 1,
        "highest": 5,
    }
    completion = [{"role": "assistant", "content": "see {answer}"}]
    assert judged(server, [completion], answer=["42"], **options) == [0.5]
    assert server.seen[0][2]["messages"][0]["content"] == "What?|see {answer}|42|{other}"


def test_keys(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    judged(server, ["1"])
    (tmp_path / "key").write_text("from-file\n", encoding="utf-8")
    judged(server, ["2"], api_key_file=str(tmp_path / "key"))
    assert [key for _, key, _ in server.seen] == ["Bearer from-environment", "Bearer from-file"]
    with pytest.raises(ValueError, match="api_key_file"):
        judged(server, api_key_file=str(tmp_path / "gone"))
    assert "secret" not in repr(judge_client.Endpoint(server.url, "secret", 1.0, 0, 0.0))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_retry_can_mend(server, status):
    server.script = [status]
    with pytest.raises(ValueError, match=f"answers {status}"):
        judged(server, ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "no model"),
        ({"score_regex": "("}, "score_regex"),
        ({"score_regex": "x"}, "no group"),
        ({"lowest": 5, "highest": 5}, "lowest < highest"),
        ({"timeout": 0}, "timeout > 0"),
        ({"retries": -1}, "retries"),
    ],
)
def test_wrong_parameters(server, options, message):
    with pytest.raises(ValueError, match=message):
        judged(server, **options)


def test_only_http():
    with pytest.raises(ValueError, match="http address"):
        llm_judge(prompts=["?"], completions=["a"], base_url="file:///etc", model="m")
