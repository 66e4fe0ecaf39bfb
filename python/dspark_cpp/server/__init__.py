"""A server that answers Ollama's and OpenAI's clients on one port, with DSpark inside.

`make_app` builds the ASGI application, `serve` runs it. The two dialects (`ollama_api`, `openai_api`) are pure: JSON
in, requests out, and back. `generation` runs one request, `engine_pool` keeps the models, `access` guards the door.
"""
