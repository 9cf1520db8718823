"""An HTTP server that OpenAI's clients can talk to, over a backend that serves tokens.

    uvicorn -> middleware.py (ids, log, keys, size) -> endpoints_*.py -> backend.py -> AsyncLLM

The endpoints know a `Backend` and no engine. See docs/serving.md for what clients may send.
"""
