"""A saved student behind HTTP: transformers' own server and ours, with a client that knows nothing of either."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from transformers import pipeline

from linearize import checkpoint, state
from linearize.convert import convert
from linearize.generate import generate
from linearize.loading import load
from linearize.modeling.errors import CheckpointError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.serve import serve

pytest.importorskip("fastapi", reason="the server's packages are missing: pip install 'linearize[serve]'")
pytest.importorskip("openai", reason="the server's packages are missing: pip install 'linearize[serve]'")

PROMPT = "The old man and"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded teacher, converted and untrained."""
    model, tokenizer = load("books-5m")
    convert(model, LolcatsConfig(window=16), [0, 1, 2])
    return checkpoint.save(model, tokenizer, tmp_path_factory.mktemp("run") / "student")


@pytest.fixture(scope="module")
def student(folder):
    return checkpoint.load(folder)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextmanager
def server(command):
    """The address of a server in a process of its own."""
    address = f"http://localhost:{(port := free_port())}"
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE)
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        wait_for(address, lambda: process.poll() is None)
        yield address
    finally:
        process.terminate()
        process.wait()
        reader.join()
        process.stderr.close()
        print(b"".join(errors).decode())  # shown where a test fails


def wait_for(address, alive):
    while True:
        try:
            return urllib.request.urlopen(f"{address}/health").read()
        except OSError:
            assert alive()
            time.sleep(0.2)


def post(address, path, **body):
    body = json.dumps({"temperature": 0, "generation_config": '{"do_sample": false}', **body}).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def complete(address, folder, prompt, tokens=10, **body):
    """The text that the server writes; streamed pieces together."""
    words = {"model": str(folder), "prompt": prompt, "max_tokens": tokens}
    told = post(address, "completions", **words, **body)
    if not body.get("stream"):
        return json.loads(told)["choices"][0]["text"]
    pieces = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    assert len(pieces) > tokens / 2  # it came token by token
    return "".join(piece["choices"][0].get("text") or "" for piece in pieces)


def together(*calls):
    """What several calls return that are made at once."""
    found = [None] * len(calls)

    def call(index):
        found[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_transformers_serve_runs_the_folder(folder, student):
    """Streaming, two requests at once, and one that is longer than what the teacher was trained on."""
    from transformers.cli.serve import Serve  # what the command `transformers serve` runs

    long = "It rained all day. " * 900
    assert len(student[1](long).input_ids) > student[0].config.max_position_embeddings
    address = f"http://localhost:{(port := free_port())}"
    served = Serve(str(folder), trust_remote_code=True, device="cpu", port=port, non_blocking=True)
    try:
        wait_for(address, lambda: True)
        assert complete(address, folder, PROMPT) == generate(*student, PROMPT, 10)
        first, second = together(
            lambda: complete(address, folder, PROMPT, stream=True),
            lambda: complete(address, folder, "It was a dark", 14, stream=True),
        )
        assert first == generate(*student, PROMPT, 10)
        assert second == generate(*student, "It was a dark", 14)
        assert complete(address, folder, long, 3) == generate(*student, long, 3)
    finally:
        served.kill_server()


def test_every_request_goes_on_from_a_saved_state(folder, student, tmp_path):
    """In a process that never sees the text."""
    text, questions = "Once upon a time there was a fox. " * 60 + "The fox", [" said", " went to"]
    file = tmp_path / "fox.state"
    state.save(state.read(*student, text), file)
    command = [sys.executable, "-m", "linearize", "serve", str(folder), "--state", str(file)]
    with server([*command, "--device", "cpu"]) as address:
        told = together(*(lambda q=q: complete(address, folder, q) for q in questions))
        assert told == [generate(*student, text + question, 10) for question in questions]
        assert complete(address, folder, " said", stream=True) == told[0]
        asked = [{"role": "user", "content": "Who?"}]  # a base model has no template; ours is a transcript
        chat = json.loads(post(address, "chat/completions", model=str(folder), messages=asked, max_tokens=5))
        expected = generate(*student, text + "User: Who?\nAssistant:", 5)
        assert chat["choices"][0]["message"]["content"].strip() == expected.strip()


def test_a_pipeline_runs_the_folder(folder, student):
    made = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    told = made(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert told[0]["generated_text"] == generate(*student, PROMPT, 8)


def test_a_state_of_another_model_is_refused_before_anything_is_served(folder, student, tmp_path):
    other = convert(load("books-5m")[0], LolcatsConfig(window=8), [0])
    with torch.no_grad():
        state.save(state.read(other, student[1], "A fox."), tmp_path / "fox.state")
    with pytest.raises(CheckpointError, match="another checkpoint"):
        serve(folder, state=tmp_path / "fox.state")
