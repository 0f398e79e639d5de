"""An OpenAI-compatible server: one model, many sub-networks.

    api_error.py        a failed request, in OpenAI's shape
    fields.py           the fields of a JSON body, leniently read
    messages.py         conversations
    tools.py            tools that are offered, calls that are made
    requests.py         JSON bodies -> checked requests
    catalog.py          model names and tasks -> which sub-network answers
    engine.py           requests -> prompts, grammars and replies in the making
    generator.py        mlx-lm's generation thread
    subnet_provider.py  what it loads
    seen_subnets.py     what is known of them
    kv_caches.py        what it keeps of earlier requests
    replies.py          what comes back from it: text, calls, deadline, cancellation
    stop_strings.py     where text ends
    responses.py        the JSON objects of an answer
    access.py           keys, origins, host names
    bodies.py           reading request bodies
    request_log.py      one line a request
    metrics.py          counters for Prometheus
    task_views.py       what the page shows of tasks
    page_files.py       the page
    http.py             routes, limits, draining

mlx-lm's server supplies what generates: ``ResponseGenerator`` (one thread, continuous batching,
stop tokens, seeds) and its KV caches, of which each sub-network has its own. Its HTTP handler and
``ModelProvider`` are not used. The handler has errors of another shape than OpenAI's, no limits, no
keys, and fetches image addresses that a request names; the provider loads models by the path or hub
name that a request gives, where ours cuts sub-networks from the one model that is loaded.
"""
