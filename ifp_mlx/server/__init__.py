"""An OpenAI-compatible server: one model, many sub-networks.

    api_error.py   a failed request, in OpenAI's shape
    requests.py    JSON bodies -> checked requests
    catalog.py     model names and tasks -> which sub-network answers
    engine.py      mlx-lm's generation thread, serving sub-networks
    replies.py     what comes back from it: text, stop strings, deadline, cancellation
    responses.py   the JSON objects of an answer
    http.py        routes, limits, keys, draining

mlx-lm's server supplies what generates: ``ResponseGenerator`` (one thread, continuous batching,
stop tokens, seeds) and its KV caches, of which each sub-network has its own. Its HTTP handler and
``ModelProvider`` are not used. The handler has errors of another shape than OpenAI's, no limits, no
keys, and fetches image addresses that a request names; the provider loads models by the path or hub
name that a request gives, where ours cuts sub-networks from the one model that is loaded.
"""
