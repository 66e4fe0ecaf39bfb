"""Clients that bring much with them: `pip install --group clients` to run these."""

from __future__ import annotations

import pytest

from .conftest import QUESTION

BEGINNING = "We add column by column"


def test_langchain(server):
    langchain = pytest.importorskip("langchain_ollama")
    chat = langchain.ChatOllama(model="demo", base_url=server.url, temperature=0, num_predict=20)
    assert chat.invoke(QUESTION).content.startswith(BEGINNING)
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)).startswith(BEGINNING)
    embeddings = langchain.OllamaEmbeddings(model="demo", base_url=server.url)
    assert len(embeddings.embed_query("text")) == 256


@pytest.mark.parametrize(("model", "path"), [("ollama_chat/demo", ""), ("openai/demo", "/v1")])
def test_litellm(server, model, path):
    litellm = pytest.importorskip("litellm")
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(
        model=model, api_base=server.url + path, api_key="x", messages=messages, temperature=0, max_tokens=20
    )
    assert answer.choices[0].message.content.startswith(BEGINNING)
    assert answer.usage.prompt_tokens == 17
